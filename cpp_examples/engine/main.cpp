// One engine rank as a process: it takes the trainer's weights in place and generates text with them.
//
//   engine_rank ENGINE --reference
//   engine_rank ENGINE --comm NAME --comm-rank R --world W [--spec JSON]
//   ENGINE: --model DIR --engine-rank R --engine-ranks N --padding-rows N --team-fd FD, the arguments of engine_open()
//
// With --spec the world spec says what its parameters hold, else its own tables do. With --reference the weights come from the model's
// file instead, by the engine's own tables: a witness that no spec has misled. Commands are lines on stdin, each answered by one line on stdout,
// "ok ..." or "error ...":
//   connect         meet the other ranks of the world and plan
//   sync V          take version V; lines "progress DONE TOTAL" come before the answer: what rs_container_describe() says
//   fingerprint     of the trainer's weights and of the engine's: two numbers
//   check V         all parameters are at their old addresses and whole at version V, the padding is untouched; answers their number
//   generate N ID.. the N tokens after the prompt
//   memcpy          this machine's rate of plain memcpy in bytes per second
#include <reshard.hpp>

#include <chrono>
#include <iomanip>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.h"

namespace {

void check_engine(int status) {
  if (status != 0) throw std::runtime_error(engine_error());
}

struct Close {
  void operator()(engine *e) const { engine_close(e); }
};
using Engine = std::unique_ptr<engine, Close>;

class Options {
 public:
  Options(int count, char **words) {
    for (int i = 1; i < count; i++) {
      const std::string key = words[i];
      if (key == "--reference")
        values_[key];
      else if (i + 1 < count)
        values_[key] = words[++i];
      else
        throw std::runtime_error("option " + key + " wants a value");
    }
  }
  bool has(const std::string &key) const { return values_.count(key) != 0; }
  const std::string &text(const std::string &key) const {
    if (!has(key)) throw std::runtime_error("option " + key + " is missing");
    return values_.at(key);
  }
  int number(const std::string &key) const { return std::stoi(text(key)); }

 private:
  std::map<std::string, std::string> values_;
};

// The engine's buffers, named as the spec's framework names them: it knows the rest.
reshard::Preset make_preset(const std::string &spec, int rank, const rs_layout_t *layout) {
  reshard::Preset preset(spec.c_str(), rank);
  for (size_t i = 0; i < layout->buffer_count; i++) {
    const rs_buffer_t &b = layout->buffers[i];
    preset.bind(b.name, b.data, b.size_bytes, b.dtype, reshard::Dims(b.shape, b.ndim), RS_TARGET);
  }
  return preset;
}

// The processes of this host; with --nixl those of other hosts too, and then --near-rank and --near-world say who is here.
reshard::Comm make_comm(const Options &options) {
  const std::string &name = options.text("--comm");
  const int rank = options.number("--comm-rank"), world = options.number("--world");
  if (!options.has("--nixl")) return reshard::Comm::local(name.c_str(), rank, world);
  const auto near = reshard::Comm::local(name.c_str(), options.number("--near-rank"), options.number("--near-world"));
  return reshard::Comm::composite(near, reshard::Comm::nixl(options.text("--nixl").c_str(), rank, world));
}

reshard::Container make_container(const Options &options, const rs_layout_t *layout) {
  const int rank = options.number("--comm-rank");
  const auto comm = make_comm(options);
  rs_config_t config = reshard::config(comm);
  config.name = "engine";
  if (options.has("--spec")) return reshard::Container(config, make_preset(options.text("--spec"), rank, layout));
  return reshard::Container(config, *layout);
}

// The library calls after every piece; a reader wants to hear of it twenty times a second.
void print_progress(void *last, uint64_t done, uint64_t total) {
  using Clock = std::chrono::steady_clock;
  auto &said = *static_cast<Clock::time_point *>(last);
  if (Clock::now() - said < std::chrono::milliseconds(50)) return;
  said = Clock::now();
  std::cout << "progress " << done << ' ' << total << std::endl;
}

std::string sync(reshard::Container &container, uint64_t version) {
  std::chrono::steady_clock::time_point said;
  auto request = reshard::sized<rs_sync_t>();
  request.version = version;
  request.progress = print_progress;
  request.progress_user = &said;
  container.sync(request);
  return container.describe(RS_DESCRIBE_STATS);
}

// The library's view of every parameter is the engine's own buffer, whole at `version`.
size_t check_params(const reshard::Container &container, const rs_layout_t *layout, uint64_t version) {
  for (size_t i = 0; i < layout->buffer_count; i++) {
    const rs_buffer_t &buffer = layout->buffers[i];
    const rs_param_t param = container.param(buffer.name);
    if (param.data != buffer.data) throw std::runtime_error(std::string(buffer.name) + " has moved");
    if (param.state != RS_PARAM_SYNCED || param.version != version)
      throw std::runtime_error(std::string(buffer.name) + " is in state " + std::to_string(param.state) + " at version " +
                               std::to_string(param.version) + ", not whole at " + std::to_string(version));
  }
  return layout->buffer_count;
}

// Two numbers in hexadecimal, as Python prints them.
std::string fingerprints(const reshard::Container &container) {
  std::ostringstream out;
  for (uint32_t role : {RS_SOURCE, RS_TARGET}) {
    const auto bytes = container.fingerprint(role);
    for (size_t i = bytes.size(); i-- > 0;) out << std::hex << std::setw(2) << std::setfill('0') << unsigned{bytes[i]};
    out << ' ';
  }
  return out.str();
}

std::string generate(engine *e, std::istream &words) {
  int count = 0;
  words >> count;
  std::vector<int32_t> prompt, tokens(count);
  for (int32_t token; words >> token;) prompt.push_back(token);
  check_engine(engine_generate(e, prompt.data(), static_cast<int>(prompt.size()), tokens.data(), count));
  std::ostringstream out;
  for (int32_t token : tokens) out << token << ' ';
  return out.str();
}

std::string answer(engine *e, reshard::Container &container, const std::string &line) {
  std::istringstream words(line);
  std::string command;
  uint64_t version = 0;
  words >> command;
  if (command == "generate") return generate(e, words);
  if (command == "memcpy") return std::to_string(engine_memcpy_rate(e));
  if (!container.get()) throw std::runtime_error("no command of a rank with --reference: " + line);
  if (command == "connect") return container.connect(), "";
  if (command == "sync" && words >> version) return sync(container, version);
  if (command == "fingerprint") return fingerprints(container);
  if (command == "check" && words >> version) {
    check_engine(engine_check_padding(e));
    return std::to_string(check_params(container, engine_layout(e), version));
  }
  throw std::runtime_error("unknown command: " + line);
}

}  // namespace

int main(int count, char **words) try {
  const Options options(count, words);
  const char *model = options.text("--model").c_str();
  const Engine e(engine_open(model, options.number("--engine-rank"), options.number("--engine-ranks"),
                             options.number("--padding-rows"), options.number("--team-fd")));
  if (!e) throw std::runtime_error(engine_error());
  engine_poison_padding(e.get());
  reshard::Container container;
  if (options.has("--reference"))
    check_engine(engine_load(e.get(), model));
  else
    container = make_container(options, engine_layout(e.get()));

  for (std::string line; std::getline(std::cin, line);) try {
      std::cout << "ok " + answer(e.get(), container, line) << std::endl;
    } catch (const std::exception &error) {
      std::cout << "error " << error.what() << std::endl;
    }
} catch (const std::exception &error) {
  std::cout << "error " << error.what() << std::endl;
  return 1;
}

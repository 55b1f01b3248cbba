// The C interface over Weights, Team and Model: no exception leaves it.
#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.hpp"
#include "team.hpp"
#include "weights.hpp"

struct engine {
  engine(const char *model_dir, int rank, int ranks, int padding_rows, int team_fd)
      : config(model_dir),
        weights(config, rank, ranks, padding_rows),
        team(team_fd, rank, ranks, static_cast<size_t>(Model::kChunk) * config.hidden),
        model(config, weights, team) {}

  Config config;
  Weights weights;
  Team team;
  Model model;
};

namespace {
thread_local std::string last_error;

template <class F>
int guarded(F body) {
  try {
    body();
    return 0;
  } catch (const std::exception &e) {
    last_error = e.what();
    return -1;
  }
}
}  // namespace

extern "C" {

engine *engine_open(const char *model_dir, int rank, int ranks, int padding_rows, int team_fd) {
  engine *e = nullptr;
  guarded([&] { e = new engine(model_dir, rank, ranks, padding_rows, team_fd); });
  return e;
}

void engine_close(engine *e) { delete e; }

const char *engine_error(void) { return last_error.c_str(); }

const rs_layout_t *engine_layout(const engine *e) { return &e->weights.tables(); }

int engine_load(engine *e, const char *model_dir) {
  return guarded([&] { e->weights.load(model_dir); });
}

void engine_poison_padding(engine *e) { e->weights.poison_padding(); }

int engine_check_padding(const engine *e) {
  return guarded([&] {
    if (!e->weights.padding_is_poisoned()) throw std::runtime_error("the vocabulary's padding was written");
  });
}

int engine_generate(engine *e, const int32_t *prompt, int prompt_count, int32_t *tokens, int count) {
  return guarded([&] {
    const std::vector<int32_t> out = e->model.generate({prompt, prompt + prompt_count}, count);
    std::memcpy(tokens, out.data(), out.size() * sizeof(int32_t));
  });
}

double engine_memcpy_rate(const engine *e) {
  using clock = std::chrono::steady_clock;
  const size_t bytes = e->weights.bytes();
  std::vector<char> from(bytes, 1), to(bytes, 2);
  const auto start = clock::now();
  double copied = 0, seconds = 0;
  while (seconds < 0.5) {
    std::memcpy(to.data(), from.data(), bytes);
    copied += static_cast<double>(bytes);
    seconds = std::chrono::duration<double>(clock::now() - start).count();
    volatile char seen = to[bytes / 2];  // so that no copy is left out
    (void)seen;
  }
  return copied / seconds;
}
}

#include "weights.hpp"

#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace {
constexpr uint16_t kPoison = 0xFFDE;  // a NaN that no arithmetic produces

Range part(int64_t n, int rank, int ranks) { return {rank * n / ranks, (rank + 1) * n / ranks}; }

Range scaled(Range range, int64_t factor) { return {range.begin * factor, range.end * factor}; }

std::ifstream open_file(const std::string &path, std::ios::openmode mode = std::ios::in) {
  std::ifstream file(path, mode);
  if (!file) throw std::runtime_error("cannot read " + path);
  return file;
}
}  // namespace

Config::Config(const std::string &model_dir) {
  std::map<std::string, double> values;
  std::ifstream file = open_file(model_dir + "/model.txt");
  for (std::string kind, key; file >> kind && kind == "config";) file >> key >> values[key];
  hidden = static_cast<int>(values.at("hidden_size"));
  layers = static_cast<int>(values.at("num_hidden_layers"));
  heads = static_cast<int>(values.at("num_attention_heads"));
  kv_heads = static_cast<int>(values.at("num_key_value_heads"));
  mlp = static_cast<int>(values.at("intermediate_size"));
  vocab = static_cast<int>(values.at("vocab_size"));
  context = static_cast<int>(values.at("max_position_embeddings"));
  rope_base = static_cast<float>(values.at("rope_theta"));
  norm_eps = static_cast<float>(values.at("rms_norm_eps"));
}

Weights::Weights(const Config &c, int rank, int ranks, int padding_rows) {
  if (ranks < 1 || ranks > c.heads || rank < 0 || rank >= ranks)
    throw std::runtime_error("engine rank " + std::to_string(rank) + " of " + std::to_string(ranks) + ": this model has " +
                             std::to_string(c.heads) + " heads, at most one rank for each");
  const int64_t d = c.head_dim(), hidden = c.hidden;
  heads = part(c.heads, rank, ranks);
  kv_heads = {heads.begin / c.heads_per_kv(), (heads.end - 1) / c.heads_per_kv() + 1};
  mlp = part(c.mlp, rank, ranks);
  vocab = part(c.vocab, rank, ranks);

  const std::string embed = "model.embed_tokens.weight";
  embedding = add(embed, {some_rows(embed, c.vocab, hidden, vocab)}, padding_rows);
  for (int i = 0; i < c.layers; i++) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    const std::string attn = layer + "self_attn.", ffn = layer + "mlp.";
    const int64_t kv_rows = c.kv_heads * d;
    Layer l;
    l.input_norm = add(layer + "input_layernorm.weight", {whole(layer + "input_layernorm.weight", hidden)});
    l.qkv = add(attn + "qkv_proj.weight", {some_rows(attn + "q_proj.weight", c.heads * d, hidden, scaled(heads, d)),
                                           some_rows(attn + "k_proj.weight", kv_rows, hidden, scaled(kv_heads, d)),
                                           some_rows(attn + "v_proj.weight", kv_rows, hidden, scaled(kv_heads, d))});
    l.o = add(attn + "o_proj.weight", {some_columns(attn + "o_proj.weight", hidden, c.heads * d, scaled(heads, d))});
    l.post_norm = add(layer + "post_attention_layernorm.weight", {whole(layer + "post_attention_layernorm.weight", hidden)});
    l.gate_up = add(ffn + "gate_up_proj.weight", {some_rows(ffn + "gate_proj.weight", c.mlp, hidden, mlp),
                                                  some_rows(ffn + "up_proj.weight", c.mlp, hidden, mlp)});
    l.down = add(ffn + "down_proj.weight", {some_columns(ffn + "down_proj.weight", hidden, c.mlp, mlp)});
    layers.push_back(l);
  }
  norm = add("model.norm.weight", {whole("model.norm.weight", hidden)});

  tables_ = layout_.get();
}

Weights::Piece Weights::whole(const std::string &tensor, int64_t size) { return {tensor, size, 0, {0, size}, {0, 0}}; }

Weights::Piece Weights::some_rows(const std::string &tensor, int64_t rows, int64_t columns, Range part) {
  return {tensor, rows, columns, part, {0, columns}};
}

Weights::Piece Weights::some_columns(const std::string &tensor, int64_t rows, int64_t columns, Range part) {
  return {tensor, rows, columns, {0, rows}, part};
}

Matrix Weights::add(const std::string &name, const std::vector<Piece> &pieces, int64_t padding_rows) {
  Matrix m;
  m.columns = pieces[0].columns.size();
  for (const Piece &piece : pieces) m.rows += piece.rows.size();
  m.rows += padding_rows;

  const int64_t width = m.columns ? m.columns : 1;
  const size_t bytes = static_cast<size_t>(m.rows * width) * sizeof(uint16_t);
  m.data = static_cast<uint16_t *>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (!m.data) throw std::bad_alloc();
  memory_.emplace_back(m.data);
  std::memset(m.data, 0, bytes);

  const reshard::Dims shape = m.columns ? reshard::Dims{m.rows, m.columns} : reshard::Dims{m.rows};
  const uint32_t buffer = layout_.buffer(name, m.data, bytes, reshard::bf16, shape, RS_TARGET);
  if (padding_rows) layout_.row(buffer).flags = RS_BUFFER_PADDED;
  int64_t first_row = 0;
  for (const Piece &piece : pieces) {
    describe(buffer, piece, first_row);
    first_row += piece.rows.size();
  }
  return m;
}

void Weights::describe(uint32_t buffer, const Piece &piece, int64_t first_row) {
  if (!piece.tensor_columns) {
    layout_.tile(layout_.tensor(piece.tensor, {piece.tensor_rows}), buffer);
    return;
  }
  const int64_t width = piece.columns.size();
  layout_.tile(layout_.tensor(piece.tensor, {piece.tensor_rows, piece.tensor_columns}), buffer,
               static_cast<uint64_t>(first_row * width) * sizeof(uint16_t), {piece.rows.begin, piece.columns.begin},
               {piece.rows.size(), width}, {width, 1});
}

uint64_t Weights::bytes() const {
  uint64_t sum = 0;
  for (size_t i = 0; i < tables_.buffer_count; i++) sum += tables_.buffers[i].size_bytes;
  return sum;
}

void Weights::load(const std::string &model_dir) {
  std::map<std::string, int64_t> offsets;
  std::ifstream index = open_file(model_dir + "/model.txt"), file = open_file(model_dir + "/weights.bin", std::ios::binary);
  for (std::string line; std::getline(index, line);) {
    std::istringstream words(line);
    std::string kind, name;
    words >> kind >> name;
    if (kind == "tensor") words >> offsets[name];
  }
  for (size_t i = 0; i < tables_.tile_count; i++) {
    const rs_tile_t &tile = tables_.tiles[i];
    const char *tensor = tables_.tensors[tile.tensor].name;
    const int64_t row_bytes = 2 * (tile.rank == 2 ? tile.view[1] : 1), run_bytes = 2 * (tile.rank == 2 ? tile.extent[1] : 1);
    int64_t from = offsets.at(tensor) + tile.origin[0] * row_bytes + 2 * tile.origin[1];
    char *to = static_cast<char *>(tables_.buffers[tile.buffer].data) + tile.byte_offset;
    for (int64_t row = 0; row < tile.extent[0]; row++, from += row_bytes, to += run_bytes) {
      if (row_bytes == run_bytes) {  // rows that follow each other in the file as well
        file.seekg(from).read(to, run_bytes * tile.extent[0]);
        break;
      }
      file.seekg(from).read(to, run_bytes);
    }
    if (!file) throw std::runtime_error(model_dir + "/weights.bin ends within " + tensor);
  }
}

void Weights::poison_padding() {
  std::fill(embedding.data + vocab.size() * embedding.columns, embedding.data + embedding.rows * embedding.columns, kPoison);
}

bool Weights::padding_is_poisoned() const {
  const uint16_t *end = embedding.data + embedding.rows * embedding.columns;
  for (const uint16_t *p = embedding.data + vocab.size() * embedding.columns; p < end; p++)
    if (*p != kPoison) return false;
  return true;
}

// One engine rank's parameters: their memory, under vLLM's names, and the tables that tell libreshard what belongs where.
//
// Knows which part of each Hugging Face tensor this rank holds. Must not know how the trainer cuts its weights, nor how bytes move.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <reshard.hpp>

// The model's sizes, from the `config` lines of model.txt.
struct Config {
  explicit Config(const std::string &model_dir);

  int hidden, layers, heads, kv_heads, mlp, vocab, context;
  float rope_base, norm_eps;
  int head_dim() const { return hidden / heads; }
  int heads_per_kv() const { return heads / kv_heads; }
};

// A run of rows, columns or heads.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// A bf16 matrix [rows, columns], row-major, or a vector of `rows` elements (columns 0).
struct Matrix {
  uint16_t *data = nullptr;
  int64_t rows = 0, columns = 0;
};

struct Layer {
  Matrix input_norm, qkv, o, post_norm, gate_up, down;
};

class Weights {
 public:
  // Rank `rank` of `ranks` holds the heads, MLP rows and vocabulary rows from floor(rank * n / ranks) to floor((rank + 1) * n / ranks),
  // and the KV heads that its heads use; `padding_rows` more rows of the vocabulary belong to no token.
  Weights(const Config &config, int rank, int ranks, int padding_rows);

  Range heads, kv_heads, mlp, vocab;
  Matrix embedding, norm;  // of the embedding, the rows from vocab.size() on are padding
  std::vector<Layer> layers;

  const rs_layout_t &tables() const { return tables_; }
  uint64_t bytes() const;

  void load(const std::string &model_dir);
  void poison_padding();
  bool padding_is_poisoned() const;

 private:
  // The box rows x columns of a Hugging Face tensor (of a vector: rows alone).
  struct Piece {
    std::string tensor;
    int64_t tensor_rows, tensor_columns;
    Range rows, columns;
  };
  static Piece whole(const std::string &tensor, int64_t size);
  static Piece some_rows(const std::string &tensor, int64_t rows, int64_t columns, Range part);
  static Piece some_columns(const std::string &tensor, int64_t rows, int64_t columns, Range part);

  // A parameter made of pieces of equal width, one below the other, and of padding rows that belong to no tensor.
  Matrix add(const std::string &name, const std::vector<Piece> &pieces, int64_t padding_rows = 0);
  // The piece lies in the buffer from row `first_row` on, rows one after the other.
  void describe(uint32_t buffer, const Piece &piece, int64_t first_row);

  struct Free {
    void operator()(void *memory) const { std::free(memory); }
  };
  std::vector<std::unique_ptr<uint16_t, Free>> memory_;
  reshard::Layout layout_;
  rs_layout_t tables_;  // of layout_, once it is complete
};

// The forward pass of a Llama model on one rank of a team, with its KV cache.
//
// Knows the mathematics and this rank's parameters. Must not know where the parameters' values came from.
#pragma once

#include <cstdint>
#include <vector>

#include "team.hpp"
#include "weights.hpp"

class Model {
 public:
  // Tokens that go through the layers together, at most.
  static constexpr int kChunk = 32;

  Model(const Config &config, const Weights &weights, Team &team) : config_(config), weights_(weights), team_(team) {}

  // The `count` most likely tokens after the prompt, one after the other. Collective over the team.
  std::vector<int32_t> generate(const std::vector<int32_t> &prompt, int count);

 private:
  struct Cache {  // of one layer: [position][local KV head][head_dim]
    std::vector<float> keys, values;
  };

  // Appends tokens to the cache; the most likely token after the last of them.
  int32_t forward(const int32_t *tokens, int count);
  void embed(const int32_t *tokens, int count, std::vector<float> &x);
  void attention(const Layer &layer, Cache &cache, int tokens, std::vector<float> &x);
  void attend(const float *query, const Cache &cache, int64_t kv_head, int positions, float *out) const;
  void feed_forward(const Layer &layer, int tokens, std::vector<float> &x);
  void add_to_residual(const Matrix &weight, const std::vector<float> &in, int tokens, std::vector<float> &x);

  const Config &config_;
  const Weights &weights_;
  Team &team_;
  std::vector<Cache> caches_;
  int position_ = 0;
};

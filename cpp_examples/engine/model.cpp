#include "model.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

std::vector<int32_t> Model::generate(const std::vector<int32_t> &prompt, int count) {
  if (prompt.empty() || count < 1) throw std::runtime_error("generate: the prompt and the answer need at least one token");
  if (static_cast<int>(prompt.size()) + count > config_.context)
    throw std::runtime_error("generate: prompt and answer have more than " + std::to_string(config_.context) + " tokens");
  caches_.assign(weights_.layers.size(), Cache());
  position_ = 0;

  int32_t next = 0;
  for (size_t i = 0; i < prompt.size(); i += kChunk)
    next = forward(prompt.data() + i, static_cast<int>(std::min<size_t>(kChunk, prompt.size() - i)));
  std::vector<int32_t> out = {next};
  while (static_cast<int>(out.size()) < count) out.push_back(forward(&out.back(), 1));
  return out;
}

int32_t Model::forward(const int32_t *tokens, int count) {
  std::vector<float> x(static_cast<size_t>(count) * config_.hidden);
  embed(tokens, count, x);
  for (size_t i = 0; i < weights_.layers.size(); i++) {
    attention(weights_.layers[i], caches_[i], count, x);
    feed_forward(weights_.layers[i], count, x);
  }
  position_ += count;

  // Tied head: the scores of this rank's true vocabulary rows; its padding rows take no part.
  std::vector<float> last(config_.hidden), scores(weights_.vocab.size());
  rms_norm(weights_.norm, config_.norm_eps, x.data() + static_cast<size_t>(count - 1) * config_.hidden, 1, last.data());
  matmul(weights_.embedding, weights_.vocab.size(), last.data(), 1, scores.data());
  const auto best = std::max_element(scores.begin(), scores.end());
  return team_.all_best(*best, static_cast<int32_t>(weights_.vocab.begin + (best - scores.begin())));
}

// Each token's row lies on one rank; the others add zeros.
void Model::embed(const int32_t *tokens, int count, std::vector<float> &x) {
  for (int t = 0; t < count; t++) {
    if (tokens[t] < 0 || tokens[t] >= config_.vocab) throw std::runtime_error("no token " + std::to_string(tokens[t]));
    if (tokens[t] < weights_.vocab.begin || tokens[t] >= weights_.vocab.end) continue;
    const uint16_t *row = weights_.embedding.data + (tokens[t] - weights_.vocab.begin) * config_.hidden;
    std::transform(row, row + config_.hidden, x.begin() + static_cast<ptrdiff_t>(t) * config_.hidden, from_bf16);
  }
  team_.all_reduce(x.data(), x.size());
}

void Model::attention(const Layer &layer, Cache &cache, int tokens, std::vector<float> &x) {
  const int d = config_.head_dim();
  const int64_t q_size = weights_.heads.size() * d, kv_size = weights_.kv_heads.size() * d;
  std::vector<float> normed(x.size()), qkv(tokens * layer.qkv.rows), mixed(tokens * q_size);
  rms_norm(layer.input_norm, config_.norm_eps, x.data(), tokens, normed.data());
  matmul(layer.qkv, layer.qkv.rows, normed.data(), tokens, qkv.data());

  for (int t = 0; t < tokens; t++) {
    float *q = qkv.data() + t * layer.qkv.rows, *k = q + q_size, *v = k + kv_size;
    for (float *head = q; head < v; head += d) rotate(head, d, position_ + t, config_.rope_base);  // of q and of k
    cache.keys.insert(cache.keys.end(), k, k + kv_size);
    cache.values.insert(cache.values.end(), v, v + kv_size);
    for (int64_t h = 0; h < weights_.heads.size(); h++) {
      const int64_t kv_head = (weights_.heads.begin + h) / config_.heads_per_kv() - weights_.kv_heads.begin;
      attend(q + h * d, cache, kv_head, position_ + t + 1, mixed.data() + t * q_size + h * d);
    }
  }
  add_to_residual(layer.o, mixed, tokens, x);
}

// One head of one token: softmax(query . keys / sqrt(d)) . values over the positions so far.
void Model::attend(const float *query, const Cache &cache, int64_t kv_head, int positions, float *out) const {
  const int d = config_.head_dim();
  const int64_t step = weights_.kv_heads.size() * d;
  std::vector<float> weight(positions);
  for (int p = 0; p < positions; p++) {
    const float *key = cache.keys.data() + p * step + kv_head * d;
    for (int i = 0; i < d; i++) weight[p] += query[i] * key[i];
    weight[p] /= std::sqrt(static_cast<float>(d));
  }
  const float greatest = *std::max_element(weight.begin(), weight.end());
  float sum = 0;
  for (float &w : weight) sum += w = std::exp(w - greatest);
  std::fill(out, out + d, 0.0f);
  for (int p = 0; p < positions; p++) {
    const float *value = cache.values.data() + p * step + kv_head * d;
    for (int i = 0; i < d; i++) out[i] += weight[p] / sum * value[i];
  }
}

void Model::feed_forward(const Layer &layer, int tokens, std::vector<float> &x) {
  const int64_t width = weights_.mlp.size();
  std::vector<float> normed(x.size()), gate_up(tokens * 2 * width), active(tokens * width);
  rms_norm(layer.post_norm, config_.norm_eps, x.data(), tokens, normed.data());
  matmul(layer.gate_up, layer.gate_up.rows, normed.data(), tokens, gate_up.data());
  for (int t = 0; t < tokens; t++) {
    const float *gate = gate_up.data() + t * 2 * width, *up = gate + width;
    for (int64_t i = 0; i < width; i++) active[t * width + i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
  }
  add_to_residual(layer.down, active, tokens, x);
}

// x += the sum over the team of weight * in: every rank holds some columns of the weight.
void Model::add_to_residual(const Matrix &weight, const std::vector<float> &in, int tokens, std::vector<float> &x) {
  std::vector<float> out(x.size());
  matmul(weight, weight.rows, in.data(), tokens, out.data());
  team_.all_reduce(out.data(), out.size());
  for (size_t i = 0; i < x.size(); i++) x[i] += out[i];
}

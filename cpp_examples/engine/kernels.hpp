// Arithmetic on rows of floats, with bf16 weights.
#pragma once

#include <cstdint>
#include <cstring>

#include "weights.hpp"

inline float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// y[t][r] = sum over c of w[r][c] * x[t][c], for `tokens` rows of x (w.columns floats each) and the first `rows` rows of w; a row of y
// has `rows` floats. fp32 sums in an order that does not depend on where the weights came from.
void matmul(const Matrix &w, int64_t rows, const float *x, int tokens, float *y);

// y = x / rms(x) * weight, for each token.
void rms_norm(const Matrix &weight, float eps, const float *x, int tokens, float *y);

// Rotates the halves of a head: element i with element i + size / 2 (Hugging Face's order).
void rotate(float *head, int size, int position, float base);

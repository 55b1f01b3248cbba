#include "kernels.hpp"

#include <cmath>

namespace {

// Sixteen sums side by side, so that a compiler may use vectors without reordering any of them.
constexpr int kLanes = 16;

#if defined(__GNUC__)
#define INLINE_ALWAYS inline __attribute__((always_inline))
#else
#define INLINE_ALWAYS inline
#endif

INLINE_ALWAYS float dot(const uint16_t *w, const float *x, int64_t n) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; lane++) sums[lane] += from_bf16(w[i + lane]) * x[i + lane];
  for (int lane = 0; i + lane < n; lane++) sums[lane] += from_bf16(w[i + lane]) * x[i + lane];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; lane++) sums[lane] += sums[lane + width];
  return sums[0];
}

INLINE_ALWAYS void matmul_rows(const Matrix &w, int64_t rows, const float *x, int tokens, float *y) {
  for (int64_t r = 0; r < rows; r++)
    for (int t = 0; t < tokens; t++) y[t * rows + r] = dot(w.data + r * w.columns, x + t * w.columns, w.columns);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void matmul_avx2(const Matrix &w, int64_t rows, const float *x, int tokens, float *y) {
  matmul_rows(w, rows, x, tokens, y);
}
#endif

}  // namespace

void matmul(const Matrix &w, int64_t rows, const float *x, int tokens, float *y) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) return matmul_avx2(w, rows, x, tokens, y);
#endif
  matmul_rows(w, rows, x, tokens, y);
}

void rms_norm(const Matrix &weight, float eps, const float *x, int tokens, float *y) {
  const int64_t n = weight.rows;
  for (int t = 0; t < tokens; t++, x += n, y += n) {
    float squares = 0;
    for (int64_t i = 0; i < n; i++) squares += x[i] * x[i];
    const float scale = 1 / std::sqrt(squares / static_cast<float>(n) + eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * from_bf16(weight.data[i]);
  }
}

void rotate(float *head, int size, int position, float base) {
  const int half = size / 2;
  for (int i = 0; i < half; i++) {
    const float angle = static_cast<float>(position) * std::pow(base, -static_cast<float>(i) / static_cast<float>(half));
    const float cosine = std::cos(angle), sine = std::sin(angle), a = head[i], b = head[i + half];
    head[i] = a * cosine - b * sine;
    head[i + half] = b * cosine + a * sine;
  }
}

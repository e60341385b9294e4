// Root mean square norm (Zhang and Sennrich, 2019) of rows, or of every head of a row.
#pragma once
#include "numbers.h"
#include "pool.h"

namespace tw {

// y = x / sqrt(mean(x^2) + EPSILON) * weight. EPSILON is a float's bits. x and y may be the same row.
template <int SIZE, uint32_t EPSILON>
TW_INLINE void norm_row(const float* x, const float* weight, float* y) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < SIZE; ++i) sum += x[i] * x[i];
  const float factor = 1.0f / sqrtf(sum / SIZE + float_of_bits(EPSILON));
#pragma omp simd
  for (int i = 0; i < SIZE; ++i) y[i] = x[i] * factor * weight[i];
}

// buffers x, y [rows, COLUMNS]; weights weight [SIZE] float32, SIZE being COLUMNS or the head's size.
template <int COLUMNS, int SIZE, uint32_t EPSILON>
struct rms_norm {
  static void run(const tw_step* step, const tw_run* run, const tw_worker* worker) {
    const float* x = (const float*)step->buffers[0];
    float* y = (float*)step->buffers[1];
    int64_t begin, end;
    share((int64_t)tw_rows(step, run) * (COLUMNS / SIZE), 1, worker, &begin, &end);
    for (int64_t unit = begin; unit < end; ++unit)
      norm_row<SIZE, EPSILON>(x + unit * SIZE, (const float*)step->weights[0], y + unit * SIZE);
  }
};

}  // namespace tw

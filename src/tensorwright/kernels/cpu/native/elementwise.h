// Ops that touch each number once: sums, products, activations, and copies of rows and columns. All move 4 bytes per
// number read and written, and nothing else.
#pragma once
#include "functions.h"
#include "numbers.h"
#include "pool.h"

namespace tw {

// body(begin, end) over this worker's share of `count` numbers; shares begin at whole cache lines.
template <class Body>
TW_INLINE void each_number(int64_t count, const tw_worker* worker, Body&& body) {
  int64_t begin, end;
  share(count, 64, worker, &begin, &end);
  body(begin, end);
}

// buffers a, b, y [rows, COLUMNS].
template <int COLUMNS>
struct add {
  static void run(const tw_step* step, const tw_run* run, const tw_worker* worker) {
    const float *a = (const float*)step->buffers[0], *b = (const float*)step->buffers[1];
    float* y = (float*)step->buffers[2];
    each_number((int64_t)tw_rows(step, run) * COLUMNS, worker, [=](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) y[i] = a[i] + b[i];
    });
  }
};

// buffers a, b, y [rows, COLUMNS].
template <int COLUMNS>
struct multiply {
  static void run(const tw_step* step, const tw_run* run, const tw_worker* worker) {
    const float *a = (const float*)step->buffers[0], *b = (const float*)step->buffers[1];
    float* y = (float*)step->buffers[2];
    each_number((int64_t)tw_rows(step, run) * COLUMNS, worker, [=](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) y[i] = a[i] * b[i];
    });
  }
};

// buffers x, y [rows, COLUMNS].
template <int COLUMNS, activation FUNCTION>
struct activate_op {
  static void run(const tw_step* step, const tw_run* run, const tw_worker* worker) {
    const float* x = (const float*)step->buffers[0];
    float* y = (float*)step->buffers[1];
    each_number((int64_t)tw_rows(step, run) * COLUMNS, worker, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += LANES) {
        const int count = end - i < LANES ? (int)(end - i) : LANES;
        store(y + i, activate<FUNCTION>(load(x + i, count)), count);
      }
    });
  }
};

// buffers x [rows, COLUMNS], y [rows, SIZE]: columns START .. START + SIZE.
template <int COLUMNS, int START, int SIZE>
struct slice {
  static void run(const tw_step* step, const tw_run* run, const tw_worker* worker) {
    const float* x = (const float*)step->buffers[0];
    float* y = (float*)step->buffers[1];
    int64_t begin, end;
    share(tw_rows(step, run), 1, worker, &begin, &end);
    for (int64_t row = begin; row < end; ++row)
      memcpy(y + row * SIZE, x + row * COLUMNS + START, SIZE * sizeof(float));
  }
};

// buffers x [T, COLUMNS], y [R, COLUMNS].
template <int COLUMNS>
struct gather_rows {
  static void run(const tw_step* step, const tw_run* run, const tw_worker* worker) {
    const float* x = (const float*)step->buffers[0];
    float* y = (float*)step->buffers[1];
    int64_t begin, end;
    share(run->num_outputs, 1, worker, &begin, &end);
    for (int64_t row = begin; row < end; ++row)
      memcpy(y + row * COLUMNS, x + (int64_t)run->output_rows[row] * COLUMNS, COLUMNS * sizeof(float));
  }
};

// buffers y [T, COLUMNS]; weights table [ROWS, COLUMNS]. A token id outside the table gives zeros, not a crash.
template <class Number, int ROWS, int COLUMNS>
struct embedding {
  static void run(const tw_step* step, const tw_run* run, const tw_worker* worker) {
    const Number* table = (const Number*)step->weights[0];
    float* y = (float*)step->buffers[0];
    int64_t begin, end;
    share(run->num_tokens, 1, worker, &begin, &end);
    for (int64_t row = begin; row < end; ++row) {
      const int32_t token = run->token_ids[row];
      float* to = y + row * COLUMNS;
      if (token < 0 || token >= ROWS) {
        memset(to, 0, COLUMNS * sizeof(float));
        continue;
      }
      const Number* from = table + (int64_t)token * COLUMNS;
      constexpr int WHOLE = COLUMNS / LANES * LANES;
      for (int i = 0; i < WHOLE; i += LANES) store(to + i, load(from + i));
      for (int i = WHOLE; i < COLUMNS; ++i) to[i] = to_float(from[i]);
    }
  }
};

}  // namespace tw

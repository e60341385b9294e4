// y = x' · weightᵀ + bias + residual for every weight type: how the work is cut and shared. Knows no number formats.
//
// Buffers: x, residual (if any), y [rows, N] float32. Weights: weight (panels of 64 outputs, the last one padded),
// bias [N], norm [K], both float32. y may be residual's own memory: each number is read, then written, by one worker.
// Bytes moved for few rows: the packed weight, once. For many rows the rows are cut into blocks that stay in the
// second-level cache, and a panel into chunks of inputs that stay in the first.
#pragma once
#include "linear_float.h"
#include "linear_integer.h"

namespace tw {

// Calls tile<ROWS> on runs of at most `most` rows; none is left with few rows for want of a better cut.
// The next block is asked for while the first run passes; where weights say so, a quarter of its lines or more by each
// of the first four runs: memory is not idle during the others then.
template <class Weights>
TW_INLINE void tiles(const uint8_t* panel, int k, int first, int last, const typename Weights::rows_type& rows,
                     int64_t num_rows, int most, float* sums) {
  const int64_t runs = (num_rows + most - 1) / most;
  const bool is_shared = Weights::SHARES_PREFETCH && last - first == 1 && runs > 2;
  const int64_t sharing = is_shared ? (runs < 4 ? runs : 4) : 1;
  for (int64_t row = 0, number = 0; row < num_rows; number++) {
    int64_t left = num_rows - row;
    int lines = 0;  // bit i: lines 4 n + i of the next block
    for (int i = 0; i < 4; i++) lines |= (i * sharing / 4 == number) << i;
    int64_t count = left <= most ? left : left < 2 * most ? left - left / 2 : most;
    auto run = [&](auto constant) TW_INLINE_LAMBDA {
      Weights::template tile<constant.value>(panel, k, first, last, rows.from_row(row), sums + row * PANEL, lines);
    };
    if constexpr (PANEL != TILE_COLUMNS)  // elsewhere a single row takes panel_times_row
      if (count == 1) run(index<1>());
    if (count == 2) run(index<2>());
    if constexpr (MAX_TILE_ROWS > 2) {
      if (count == 3) run(index<3>());
      if (count == 4) run(index<4>());
    }
    row += count;
  }
}

// Whole vectors to memory that is not read soon: past the caches, where a plain store would first fetch the line.
TW_INLINE void stream(float* to, floats vector) {
#if defined(TW_AVX512)
  _mm512_stream_ps(to, (__m512)vector);
#elif defined(TW_AVX2)
  _mm256_stream_ps(to, (__m256)vector);
#else
  store(to, vector);
#endif
}
// Makes what was streamed visible to whoever meets this worker at a barrier.
TW_INLINE void end_stream() {
#if defined(TW_AVX512) || defined(TW_AVX2)
  _mm_sfence();
#endif
}

// TILE_ROWS: of tiles whose weights lie in the first-level cache. CACHED_ROW_KIB: the x' of a block of rows, which
// should stay in the second-level cache. Neither changes a bit of y.
template <class Weights, class Input, int N, bool HAS_BIAS, bool HAS_RESIDUAL, int TILE_ROWS = CACHED_TILE_ROWS,
          int CACHED_ROW_KIB = 528>
struct linear {
  static_assert(TILE_ROWS > 1 && TILE_ROWS <= MAX_TILE_ROWS);
  static constexpr int K = Input::SIZE;
  static constexpr int PANELS = (N + PANEL - 1) / PANEL;
  static constexpr int FEW_ROWS = 32;         // up to here the weights' bytes are what costs
  static constexpr int ROW_GRAIN = 12;        // whole tiles of 2, 3 and 4 rows
  static constexpr int MAX_BLOCK_ROWS = 264;  // 66 KB of sums
  static constexpr int64_t CACHED_WEIGHT_BYTES = 34 << 10;

  static constexpr bool CAN_STREAM = N % LANES == 0 && !HAS_RESIDUAL;  // a residual's lines are at hand

  static constexpr int64_t block_rows() {
    int64_t rows = CACHED_ROW_KIB * (int64_t)1024 / (K * Weights::ROW_BYTES_PER_INPUT) / ROW_GRAIN * ROW_GRAIN;
    return rows < FEW_ROWS ? FEW_ROWS : rows > MAX_BLOCK_ROWS ? MAX_BLOCK_ROWS : rows;
  }
  static constexpr int chunk_blocks() {
    return Weights::BLOCK_BYTES < CACHED_WEIGHT_BYTES ? (int)(CACHED_WEIGHT_BYTES / Weights::BLOCK_BYTES) : 1;
  }

  static void run(const tw_step* step, const tw_run* run, const tw_worker* worker) {
    const int64_t rows = tw_rows(step, run);
    const float* x = (const float*)step->buffers[0];
    const float* residual = HAS_RESIDUAL ? (const float*)step->buffers[1] : nullptr;
    float* y = (float*)step->buffers[HAS_RESIDUAL ? 2 : 1];
    const float* norm = (const float*)step->weights[2];
    auto prepared = Weights::template prepare<Input>(x, norm, run->scratch, rows, worker);
    if (Weights::template NEEDS_PREPARATION<Input>) tw_barrier(worker);

    int64_t most_rows = block_rows();
    if (PANELS < worker->size && rows < most_rows * worker->size) most_rows = (rows + worker->size - 1) / worker->size;
    const int64_t row_blocks = most_rows ? (rows + most_rows - 1) / most_rows : 0;
    const bool is_streaming = CAN_STREAM && rows > FEW_ROWS && (uintptr_t)y % 64 == 0;
    for_each_task(PANELS * row_blocks, rows > FEW_ROWS, worker, [&](int64_t task) {
      int64_t first_row = task / PANELS * most_rows;
      int64_t num_rows = rows - first_row < most_rows ? rows - first_row : most_rows;
      panel_task(step, (int)(task % PANELS), prepared.from_row(first_row), num_rows,
                 HAS_RESIDUAL ? residual + first_row * N : nullptr, y + first_row * N, is_streaming);
    });
    if (is_streaming) end_stream();
  }

  // Few rows: neighbouring panels for each worker, one stream of weights. Many: whoever is free takes the next panel,
  // so that a worker whose core is lost for a while holds the others up by one panel at most.
  template <class Body>
  static void for_each_task(int64_t count, bool is_taken, const tw_worker* worker, Body&& body) {
    int64_t begin, end;
    share(count, 1, worker, &begin, &end);
    if (is_taken)
      for (int64_t task; (task = tw_take(worker)) < count;) body(task);
    else
      for (int64_t task = begin; task < end; task++) body(task);
  }

  // Some rows times one panel, into y.
  static void panel_task(const tw_step* step, int number, const typename Weights::rows_type& rows, int64_t num_rows,
                         const float* residual, float* y, bool is_streaming) {
    alignas(64) float sums[MAX_BLOCK_ROWS * PANEL];
    const uint8_t* panel = (const uint8_t*)step->weights[0] + number * Weights::panel_bytes(K);
    if (num_rows == 1 && PANEL == TILE_COLUMNS) {
      Weights::panel_times_row(panel, K, rows, sums);
    } else {
      const int chunk = num_rows <= FEW_ROWS ? 1 : chunk_blocks(), blocks = Weights::num_blocks(K);
      for (int first = 0; first < blocks; first += chunk)
        tiles<Weights>(panel, K, first, first + chunk < blocks ? first + chunk : blocks, rows, num_rows,
                       num_rows <= FEW_ROWS ? MAX_TILE_ROWS : TILE_ROWS, sums);
    }
    const float* bias = HAS_BIAS ? (const float*)step->weights[1] + number * PANEL : nullptr;
    const int columns = N - number * PANEL < PANEL ? N - number * PANEL : PANEL;
    for (int64_t row = 0; row < num_rows; row++)
      finish_row(panel, sums + row * PANEL, columns, bias, HAS_RESIDUAL ? residual + row * N + number * PANEL : nullptr,
                 y + row * N + number * PANEL, is_streaming);
  }

  static TW_INLINE_LAMBDA inline void finish_row(const uint8_t* panel, const float* sums, int columns,
                                                 const float* bias, const float* residual, float* y,
                                                 bool is_streaming) {
    for (int column = 0; column < columns; column += LANES) {
      int count = columns - column < LANES ? columns - column : LANES;
      floats value = load(sums + column);
      if constexpr (Weights::SCALES_OUTPUTS) value *= Weights::output_scale(panel, K, column);
      if constexpr (HAS_BIAS) value += load(bias + column, count);
      if constexpr (HAS_RESIDUAL) value += load(residual + column, count);
      if (CAN_STREAM && is_streaming) stream(y + column, value);
      else store(y + column, value, count);
    }
  }
};

}  // namespace tw

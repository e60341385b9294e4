// Attention of many query rows (prefill): two matrix products of a tile of cached positions, as float32, with the rows.
//
// A tile's keys are turned and its values widened once for all rows of a unit. TILE_STEP rows at a time then take
// scores, softmax and weighted values, so that only they and the tile pass through the first-level cache, and nothing
// is computed beyond the last position that any of them sees.
#pragma once
#include "attention_few.h"

namespace tw {

// Register tiles of a product: rows by vectors of columns, whose sums, one row of b and one number of a fit.
#if defined(TW_AVX512) || defined(__aarch64__)
constexpr int TILE_STEP = 6, TILE_VECTORS = 4;
#elif defined(TW_AVX2)
constexpr int TILE_STEP = 6, TILE_VECTORS = 2;
#else
constexpr int TILE_STEP = 4, TILE_VECTORS = 2;
#endif

// c[R][C vectors] = c * factors[R] + a[R][depth] · b[depth][C vectors]; without factors, c = a · b. Strides in floats.
template <int R, int C>
TW_INLINE void multiply_tile(const float* a, int a_stride, const float* b, int b_stride, float* c, int c_stride,
                             int depth, const float* factors) {
  floats sums[R * C];
  unrolled<R * C>([&](auto i) TW_INLINE_LAMBDA {
    constexpr int I = decltype(i)::value;
    sums[I] = factors ? load(c + I / C * c_stride + I % C * LANES) * broadcast(factors[I / C]) : floats{};
  });
  for (int k = 0; k < depth; ++k) {
    floats row[C];
    unrolled<C>([&](auto i) TW_INLINE_LAMBDA {
      constexpr int I = decltype(i)::value;
      row[I] = load(b + k * b_stride + I * LANES);
    });
    unrolled<R>([&](auto r) TW_INLINE_LAMBDA {
      constexpr int I = decltype(r)::value;
      const floats number = broadcast(a[I * a_stride + k]);
      unrolled<C>([&](auto v) TW_INLINE_LAMBDA {
        constexpr int V = decltype(v)::value;
        sums[I * C + V] = multiply_add(number, row[V], sums[I * C + V]);
      });
    });
  }
  unrolled<R * C>([&](auto i) TW_INLINE_LAMBDA {
    constexpr int I = decltype(i)::value;
    store(c + I / C * c_stride + I % C * LANES, sums[I]);
  });
}

// As multiply_tile for TILE_STEP rows and any number of whole vectors.
static inline void multiply_step(const float* a, int a_stride, const float* b, int b_stride, float* c, int c_stride,
                                 int columns, int depth, const float* factors) {
  int column = 0;
  for (; column + TILE_VECTORS * LANES <= columns; column += TILE_VECTORS * LANES)
    multiply_tile<TILE_STEP, TILE_VECTORS>(a, a_stride, b + column, b_stride, c + column, c_stride, depth, factors);
  for (; column < columns; column += LANES)
    multiply_tile<TILE_STEP, 1>(a, a_stride, b + column, b_stride, c + column, c_stride, depth, factors);
}

// A tile of one head as float32: keys turned, both times their scales.
template <class Head, class Number, int HEAD_SIZE>
struct wide_tile {
  static constexpr int VECTORS = (HEAD_SIZE + LANES - 1) / LANES, SIZE = VECTORS * LANES;
  alignas(64) float keys[SIZE][TILE];
  alignas(64) float values[TILE][SIZE];
  alignas(64) float key_scales[TILE + LANES], value_scales[TILE + LANES];

  // Positions [begin, end). Keys beyond the last are copies of it.
  void fill(const Head& head, int begin, int end) {
    if (Head::SCALED) {
      head.copy_scales(0, begin, end, key_scales);
      head.copy_scales(1, begin, end, value_scales);
    }
    for (int k = 0; k < end - begin; k += LANES) turn(head, begin, k, end - begin);
    for (int k = 0; k < end - begin; ++k) {
      const Number* from = head.row(1, begin + k);
      unrolled<VECTORS>([&](auto v) TW_INLINE_LAMBDA {
        constexpr int V = decltype(v)::value;
        const floats value = load_part<HEAD_SIZE, V>(from);
        store(values[k] + V * LANES, Head::SCALED ? value * broadcast(value_scales[k]) : value);
      });
    }
  }

  void turn(const Head& head, int begin, int first, int count) {
    const Number* rows[LANES];
    for (int i = 0; i < LANES; ++i) rows[i] = head.row(0, begin + (first + i < count ? first + i : count - 1));
    const floats scale = Head::SCALED ? load(key_scales + first) : floats{};
    unrolled<VECTORS>([&](auto v) TW_INLINE_LAMBDA {
      constexpr int V = decltype(v)::value;
      floats block[LANES];
      unrolled<LANES>([&](auto i) TW_INLINE_LAMBDA {
        constexpr int I = decltype(i)::value;
        block[I] = load_part<HEAD_SIZE, V>(rows[I]);
      });
      transpose(block);
      unrolled<LANES>([&](auto i) TW_INLINE_LAMBDA {
        constexpr int I = decltype(i)::value;
        store(keys[V * LANES + I] + first, Head::SCALED ? block[I] * scale : block[I]);
      });
    });
  }
};

// Scores [TILE_STEP][TILE] outside [first, last) of their row are put below all others.
static inline void hide(float* scores, int columns, int first, int last) {
  for (int k = 0; k < columns; k += LANES) {
    const ints position = lane_numbers() + k;
    store(scores + k, (position >= first) & (position < last) ? load(scores + k) : broadcast(-INFINITY));
  }
}

// Scores [TILE_STEP][TILE] become weights, of 2^(score - largest so far); `totals` [TILE_STEP][LANES] are sums by lane.
// `factors` [TILE_STEP]: what earlier weights are to be multiplied by.
static inline void soften_step(float* scores, int columns, float* largest, float* totals, float* factors) {
  for (int r = 0; r < TILE_STEP; ++r) {
    floats top = load(scores + r * TILE);
    for (int k = LANES; k < columns; k += LANES) top = maximum(top, load(scores + r * TILE + k));
    const float most = reduce_maximum(top), now = most > largest[r] ? most : largest[r];
    factors[r] = largest[r] - now;
    largest[r] = now;
  }
  for (int r = 0; r < TILE_STEP; r += LANES) store(factors + r, exponential2(load(factors + r)));
  for (int r = 0; r < TILE_STEP; ++r) {
    floats total = load(totals + r * LANES) * broadcast(factors[r]);
    for (int k = 0; k < columns; k += LANES) {
      const floats weight = exponential2(load(scores + r * TILE + k) - broadcast(largest[r]));
      store(scores + r * TILE + k, weight);
      total += weight;
    }
    store(totals + r * LANES, total);
  }
}

}  // namespace tw

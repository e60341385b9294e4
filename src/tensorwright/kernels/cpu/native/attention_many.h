// Attention of many query rows (prefill): two matrix products of a tile of cached positions, as float32, with the rows.
//
// A tile's keys are turned and its values widened once for all rows of a unit. TILE_STEP rows at a time then take
// scores, softmax and weighted values, so that only they and the tile pass through the first-level cache, and nothing
// is computed beyond the last position that any of them sees.
#pragma once
#include "attention_few.h"
#include "pairs.h"

namespace tw {

// Register tiles of a product: rows by vectors of columns, whose sums, one row of b and one number of a fit.
#if defined(TW_AVX512) || defined(__aarch64__)
constexpr int TILE_STEP = 6, TILE_VECTORS = 4;
#elif defined(TW_AVX2)
constexpr int TILE_STEP = 6, TILE_VECTORS = 2;
#else
constexpr int TILE_STEP = 4, TILE_VECTORS = 2;
#endif

// finish(r, column, sums) for each vector of a[R][depth] · b[depth][C vectors]; strides in numbers. Numbers are floats,
// or ints that hold pairs (pairs.h).
template <int R, int C, class Number, class Finish>
TW_INLINE void multiply_tile(const Number* a, int a_stride, const Number* b, int b_stride, int depth,
                             Finish&& finish) {
  using vector = decltype(load(b));
  vector sums[R * C] = {};
  for (int k = 0; k < depth; ++k) {
    vector row[C];
    unrolled<C>([&](auto i) TW_INLINE_LAMBDA {
      constexpr int I = decltype(i)::value;
      row[I] = load(b + k * b_stride + I * LANES);
    });
    unrolled<R>([&](auto r) TW_INLINE_LAMBDA {
      constexpr int I = decltype(r)::value;
      const vector number = broadcast(a[I * a_stride + k]);
      unrolled<C>([&](auto v) TW_INLINE_LAMBDA {
        constexpr int V = decltype(v)::value;
        sums[I * C + V] = multiply_add(number, row[V], sums[I * C + V]);
      });
    });
  }
  unrolled<R * C>([&](auto i) TW_INLINE_LAMBDA {
    constexpr int I = decltype(i)::value;
    finish(I / C, I % C * LANES, sums[I]);
  });
}

// As multiply_tile for TILE_STEP rows and any number of whole vectors.
template <class Number, class Finish>
TW_INLINE void multiply_step(const Number* a, int a_stride, const Number* b, int b_stride, int columns, int depth,
                             Finish&& finish) {
  for (int column = 0, wide = TILE_VECTORS * LANES; column < columns; column += wide) {
    const auto moved = [&](int r, int within, auto sums) TW_INLINE_LAMBDA { finish(r, column + within, sums); };
    if (columns - column < wide) wide = LANES;
    if (wide > LANES) multiply_tile<TILE_STEP, TILE_VECTORS>(a, a_stride, b + column, b_stride, depth, moved);
    else multiply_tile<TILE_STEP, 1>(a, a_stride, b + column, b_stride, depth, moved);
  }
}

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

// A tile of one head as float32: keys turned, both times their scales.
template <class Head, class Number, int HEAD_SIZE>
struct wide_tile {
  static constexpr int VECTORS = (HEAD_SIZE + LANES - 1) / LANES, SIZE = VECTORS * LANES;
  alignas(64) float keys[SIZE][TILE];
  alignas(64) float values[TILE][SIZE];
  alignas(64) float key_scales[TILE + LANES], value_scales[TILE + LANES];

  void prepare(int, const float*) {}  // query rows are used as they are

  // Scores [TILE_STEP][TILE] of query rows, which begin with number `row` of the unit's.
  void score(const float* q, int row, int columns, float* scores) const {
    multiply_step(q, SIZE, keys[0], TILE, columns, HEAD_SIZE, [&](int r, int column, floats sums) TW_INLINE_LAMBDA {
      store(scores + r * TILE + column, sums);
    });
  }

  void soften(int, float* scores, int columns, float* largest, floats* totals, float* factors) {
    soften_step(scores, columns, largest, (float*)totals, factors);
  }

  // sums [TILE_STEP][SIZE] = sums * factors + weights · values, of the first `last` positions.
  void add_values(const float* weights, int columns, int last, const float* factors, float* to) {
    multiply_step(weights, TILE, values[0], SIZE, SIZE, last, [&](int r, int column, floats sums) TW_INLINE_LAMBDA {
      float* place = to + r * SIZE + column;
      store(place, multiply_add(load(place), broadcast(factors[r]), sums));
    });
  }

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

}  // namespace tw

// Attention of many query rows with 16-bit operands: twice as fast as float32, and about as exact as a float16 cache.
//
// Fixed point, with a float32 scale for each query row, key and value, and for each row's weights of a tile. Its error
// is that of the largest numbers of a row, 2^-13 or so of them, where bfloat16 would lose 2^-9 of every number. Nothing
// of a row's result depends on positions that the row does not see. Measured against float64 (float16 cache, 2,048
// positions, scores with standard deviations of 1 and 3): 3e-4 and 4e-4 of the result, while rounding the cache to
// float16 itself costs 4e-4 and 7e-4, and bfloat16 operands would cost 5e-3 and 6e-3.
//
// Sums must fit 31 bits. Scores: a query and a key are held as vectors of length NORM, so that no part of their product
// is above NORM^2 < 2^30. Values: TILE * WEIGHT * VALUE < 2^31.
#pragma once
#include <type_traits>
#include "attention_many.h"

namespace tw {

// A tile of one head, and a unit's query rows. Int8 keys and values are used as they are, with their scales.
template <class Head, class Number, int HEAD_SIZE, int ROWS>
struct pair_tile {
  static constexpr int VECTORS = (HEAD_SIZE + LANES - 1) / LANES, SIZE = VECTORS * LANES;
  static constexpr int PAIRS = (VECTORS + 1) / 2, DEPTH = PAIRS * LANES;  // lane i: numbers 2 V LANES + i, + LANES
  static constexpr float NORM = 32000.0f, WEIGHT = Head::SCALED ? 32767.0f : 8191.0f, VALUE = 4095.0f, DISTANCE = 16.0f;
  alignas(64) int32_t q[ROWS][DEPTH];
  alignas(64) int32_t keys[DEPTH][TILE];
  alignas(64) int32_t values[TILE / 2][SIZE];
  alignas(64) int32_t weights[TILE_STEP][TILE / 2];
  alignas(64) float q_scales[ROWS], weight_scales[TILE_STEP];
  alignas(64) float key_scales[TILE + LANES], value_scales[TILE + LANES];

  // Pair vector P of a row times `factor`.
  template <int P, class From>
  TW_INLINE ints pair_of(const From* row, float factor) {
    const ints low = round_to_ints(load_part<HEAD_SIZE, 2 * P>(row) * factor);
    if constexpr (2 * P + 1 == VECTORS) return pair(low, ints{});
    else return pair(low, round_to_ints(load_part<HEAD_SIZE, 2 * P + 1>(row) * factor));
  }

  TW_INLINE floats squares(const Number* row) {
    floats sums = {};
    unrolled<VECTORS>([&](auto v) TW_INLINE_LAMBDA {
      const floats number = load_part<HEAD_SIZE, decltype(v)::value>(row);
      sums = multiply_add(number, number, sums);
    });
    return sums;
  }

  // Compared as integers, for which NaN is above infinity.
  TW_INLINE floats magnitudes(const Number* row) {
    ints largest = {};
    unrolled<VECTORS>([&](auto v) TW_INLINE_LAMBDA {
      largest = maximum(largest, (ints)load_part<HEAD_SIZE, decltype(v)::value>(row) & 0x7fffffff);
    });
    return (floats)largest;
  }

  // Query row `row` of the unit.
  void prepare(int row, const float* from) {
    float sum = 0.0f;
    for (int i = 0; i < SIZE; i += LANES) sum += reduce_add(load(from + i) * load(from + i));
    const float norm = sqrtf(sum), factor = norm > 0.0f ? NORM / norm : 0.0f;
    q_scales[row] = norm / NORM;
    unrolled<PAIRS>([&](auto v) TW_INLINE_LAMBDA {
      constexpr int P = decltype(v)::value;
      store(q[row] + P * LANES, pair_of<P>(from, factor));
    });
  }

  // Scores [TILE_STEP][TILE] of query rows from number `row` on.
  void score(const float*, int row, int columns, float* scores) const {  // without the scale of q
    multiply_step(q[row], DEPTH, keys[0], TILE, columns, DEPTH, [&](int r, int column, ints sums) TW_INLINE_LAMBDA {
      store(scores + r * TILE + column, to_floats(sums) * load(key_scales + column));
    });
  }

  // sums [TILE_STEP][SIZE] = sums * factors + weights · values, of the first `last` positions.
  void add_values(const float*, int, int last, const float* factors, float* to) {
    const int rest = last % (2 * LANES), depth = last / (2 * LANES) * LANES + (rest < LANES ? rest : LANES);
    const int32_t* own = weights[0];
    multiply_step(own, TILE / 2, values[0], SIZE, SIZE, depth, [&](int r, int column, ints sums) TW_INLINE_LAMBDA {
      float* place = to + r * SIZE + column;
      const floats product = to_floats(sums) * broadcast(weight_scales[r]);
      store(place, multiply_add(load(place), broadcast(factors[r]), product));
    });
  }

  // As soften_step, and the weights are left here as pairs, times the scales of their values, in units of the largest.
  // What they are relative to follows the largest score at a distance: it seldom changes, and never after the row.
  void soften(int row, const float* scores, int columns, float* largest, floats* totals, float* factors) {
    for (int r = 0; r < TILE_STEP; ++r) {
      const floats scale = broadcast(q_scales[row + r]);
      floats v[TILE / LANES], top;
      for (int i = 0; i < TILE / LANES; ++i) {
        v[i] = i * LANES < columns ? load(scores + r * TILE + i * LANES) : broadcast(-INFINITY);
        top = i ? maximum(top, v[i]) : v[i];
      }
      factors[r] = 1.0f;
      if (any(top * scale > broadcast(largest[r] + DISTANCE))) {
        const float now = reduce_maximum(top * scale);
        const floats factor = exponential2(broadcast(largest[r] - now));
        totals[r] = totals[r] * factor;
        factors[r] = factor[0];
        largest[r] = now;
      }
      floats total = totals[r], heaviest = {};
      for (int i = 0; i < TILE / LANES; ++i) {
        v[i] = exponential2<true>(multiply_add(v[i], scale, broadcast(-largest[r])));
        total += v[i];
        v[i] = v[i] * load(value_scales + i * LANES);
        heaviest = maximum(heaviest, v[i]);
      }
      totals[r] = total;
      const float most = reduce_maximum(heaviest);
      const floats factor = broadcast(most > 0.0f ? WEIGHT / most : 0.0f);
      weight_scales[r] = most * (1.0f / WEIGHT);
      for (int i = 0; i < TILE / LANES; i += 2)
        store(weights[r] + i / 2 * LANES, pair(round_to_ints(v[i] * factor), round_to_ints(v[i + 1] * factor)));
    }
  }

  // Positions [begin, end). Keys beyond the last are copies of it, values are 0.
  void fill(const Head& head, int begin, int end) {
    const int count = end - begin;
    if (Head::SCALED) {
      head.copy_scales(0, begin, end, key_scales);
      head.copy_scales(1, begin, end, value_scales);
    }
    for (int i = count; i < TILE; ++i) value_scales[i] = 0.0f;
    for (int first = 0; first < count; first += LANES) fill_keys(head, begin, first, count);
    for (int first = 0; first < count; first += 2 * LANES) fill_values(head, begin, first, count);
  }

  // Lane by lane: what is held are numbers times a factor, `limit` at most, and a scale makes them what they were.
  TW_INLINE void set_scales(floats largest, float limit, float* scales, float* factors) {
    store(scales, largest * (1.0f / limit));
    store(factors, largest > 0.0f ? limit / largest : floats{});
  }

  void fill_keys(const Head& head, int begin, int first, int count) {
    const Number* rows[LANES];
    alignas(64) float factors[LANES];
    for (int i = 0; i < LANES; ++i) {
      rows[i] = head.row(0, begin + (first + i < count ? first + i : count - 1));
      factors[i] = 1.0f;
    }
    if (!Head::SCALED) {
      floats sums[LANES];
      unrolled<LANES>([&](auto i) TW_INLINE_LAMBDA { sums[decltype(i)::value] = squares(rows[decltype(i)::value]); });
      set_scales(square_root(sums_of(sums)), NORM, key_scales + first, factors);
    }
    unrolled<PAIRS>([&](auto v) TW_INLINE_LAMBDA {
      constexpr int P = decltype(v)::value;
      floats block[LANES];
      unrolled<LANES>([&](auto i) TW_INLINE_LAMBDA {
        constexpr int I = decltype(i)::value;
        block[I] = (floats)pair_of<P>(rows[I], factors[I]);
      });
      transpose(block);
      unrolled<LANES>([&](auto i) TW_INLINE_LAMBDA {
        constexpr int I = decltype(i)::value;
        store((float*)keys[P * LANES + I] + first, block[I]);
      });
    });
  }

  // Lane by lane: positions first + i and first + LANES + i make a pair.
  void fill_values(const Head& head, int begin, int first, int count) {
    alignas(64) float factors[2 * LANES];
    const Number* rows[2 * LANES];
    for (int i = 0; i < 2 * LANES; ++i) {
      rows[i] = head.row(1, begin + (first + i < count ? first + i : count - 1));
      factors[i] = 1.0f;
    }
    if (!Head::SCALED)
      for (int half = 0; half < 2 * LANES; half += LANES) {
        floats largest[LANES];
        unrolled<LANES>([&](auto i) TW_INLINE_LAMBDA {
          constexpr int I = decltype(i)::value;
          largest[I] = magnitudes(rows[half + I]);
        });
        set_scales(largest_of(largest), VALUE, value_scales + first + half, factors + half);
      }
    for (int i = 0; i < 2 * LANES; ++i)
      if (first + i >= count) value_scales[first + i] = factors[i] = 0.0f;
    for (int i = 0; i < LANES; ++i)
      unrolled<VECTORS>([&](auto v) TW_INLINE_LAMBDA {
        constexpr int V = decltype(v)::value;
        const ints low = round_to_ints(load_part<HEAD_SIZE, V>(rows[i]) * factors[i]);
        const ints high = round_to_ints(load_part<HEAD_SIZE, V>(rows[i + LANES]) * factors[i + LANES]);
        store(values[first / 2 + i] + V * LANES, pair(low, high));
      });
  }
};

}  // namespace tw

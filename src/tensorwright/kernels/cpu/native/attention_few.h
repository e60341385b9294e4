// Attention of few query rows (decode): keys and values go straight from the cache into registers, once for R rows.
//
// A vector of scores is LANES / R keys by R rows, key by key: as many dot products as there are lanes are summed
// together, the softmax needs no sum across lanes before its end, and a key's R weights lie side by side.
// The next tile is asked for while this one is worked on, its keys with the keys and its values with the values: a
// head's part of a block is too short a run for the hardware to see coming, and begins on a page of its own.
#pragma once
#include "functions.h"
#include "kv_cache.h"
#include "pairs.h"

namespace tw {

constexpr int TILE = 64;      // cached positions worked on together
constexpr int FEW_ROWS = 12;  // from here on turning the keys pays
constexpr float NO_SCORE = -1e30f;  // below every score, and yet a number: differences of it are no NaN

// One kv head of one sequence in the cache.
template <class Number, int KV_HEADS, int HEAD_SIZE, int BLOCK_SIZE>
struct cached_head {
  using layout = kv_layout<KV_HEADS, HEAD_SIZE, BLOCK_SIZE>;
  static constexpr bool SCALED = sizeof(Number) == 1;
  static constexpr int ROW_BYTES = HEAD_SIZE * (int)sizeof(Number);
  const Number* kv;
  const float* scales;
  const int32_t* table;
  int head;

  // Unsigned positions: their quotients are shifts.
  const Number* row(int which, uint32_t position) const {
    return kv + layout::row_at(table[position / BLOCK_SIZE], which, head, position % BLOCK_SIZE);
  }
  const float* scale(int which, uint32_t position) const {
    return scales + layout::scale_at(table[position / BLOCK_SIZE], which, head, position % BLOCK_SIZE);
  }
  // Positions from this one on that lie side by side.
  static int run(int position, int end) {
    const int rest = BLOCK_SIZE - (int)((uint32_t)position % BLOCK_SIZE);
    return end - position < rest ? end - position : rest;
  }
  // The scales of [begin, end) in a row.
  void copy_scales(int which, int begin, int end, float* to) const {
    for (int p = begin, n; p < end; p += n) {
      n = run(p, end);
      memcpy(to + (p - begin), scale(which, p), sizeof(float) * n);
    }
  }
};

// A tile that will be read soon.
template <class Head>
struct next_tile {
  Head head;
  int begin, end;

  // Asks for COUNT keys or values from number `offset` of the tile on, or a little more.
  // Always inlined: gcc drops calls of functions that do nothing but prefetch.
  template <int COUNT>
  inline __attribute__((always_inline)) void prefetch_rows(int which, int offset) const {
    if (begin + offset >= end) return;
    const char* from = (const char*)head.row(which, begin + offset);
    if (Head::SCALED) prefetch(head.scale(which, begin + offset));
    unrolled<(COUNT * Head::ROW_BYTES + 63) / 64>([&](auto line) TW_INLINE_LAMBDA {
      constexpr int LINE = decltype(line)::value;
      prefetch(from + LINE * 64);
    });
  }
};

typedef int16_t signed_shorts __attribute__((vector_size(2 * LANES)));

#if defined(TW_AVX512) || defined(__aarch64__)
constexpr int SUM_VECTORS = 16;  // of 32 registers
#else
constexpr int SUM_VECTORS = 8;
#endif

// A query as 16-bit fixed point, a vector of length 32000: products with int8 keys fit 32 bits. Returns its scale.
template <int HEAD_SIZE>
TW_INLINE float to_fixed(const float* from, int16_t* to) {
  float sum = 0.0f;
  for (int i = 0; i < HEAD_SIZE; i += LANES) sum += reduce_add(load(from + i) * load(from + i));
  const float norm = sqrtf(sum), factor = norm > 0.0f ? 32000.0f / norm : 0.0f;
  for (int i = 0; i < HEAD_SIZE; i += LANES) {
    const auto narrow = __builtin_convertvector(round_to_ints(load(from + i) * factor), signed_shorts);
    memcpy(to + i, &narrow, sizeof(narrow));
  }
  return norm / 32000.0f;
}

// R query rows against tiles of a head. q and sums: [R][SIZE].
template <int R, class Head, int HEAD_SIZE>
struct few_rows {
  static constexpr int VECTORS = (HEAD_SIZE + LANES - 1) / LANES, SIZE = VECTORS * LANES, KEYS = LANES / R;
  static constexpr int CHUNK = VECTORS < SUM_VECTORS / R ? VECTORS : SUM_VECTORS / R;
  static_assert(LANES % R == 0, "a vector holds whole keys");

  // Scores of up to KEYS keys that lie side by side; the last one stands in for those beyond it.
  template <class Number>
  TW_INLINE floats dots(const float* q, const Number* keys, int last) {
    floats sums[LANES] = {};
    const Number* rows[KEYS];
    unrolled<KEYS>([&](auto key) TW_INLINE_LAMBDA {
      constexpr int K = decltype(key)::value;
      rows[K] = keys + (K < last ? K : last) * HEAD_SIZE;
    });
    unrolled<VECTORS>([&](auto v) TW_INLINE_LAMBDA {
      constexpr int V = decltype(v)::value;
      floats query[R];
      unrolled<R>([&](auto r) TW_INLINE_LAMBDA {
        constexpr int I = decltype(r)::value;
        query[I] = load(q + I * SIZE + V * LANES);
      });
      unrolled<KEYS>([&](auto key) TW_INLINE_LAMBDA {
        constexpr int K = decltype(key)::value;
        const floats number = load_part<HEAD_SIZE, V>(rows[K]);
        unrolled<R>([&](auto r) TW_INLINE_LAMBDA {
          constexpr int I = decltype(r)::value;
          sums[K * R + I] = multiply_add(query[I], number, sums[K * R + I]);
        });
      });
    });
    return sums_of(sums);
  }

  // The same of int8 keys, in integers: q [R][HEAD_SIZE] is fixed point, and a lane takes two numbers.
  TW_INLINE floats dots(const int16_t* q, const int8_t* keys, int last) {
    ints sums[LANES] = {};
    unrolled<HEAD_SIZE / (2 * LANES)>([&](auto v) TW_INLINE_LAMBDA {
      constexpr int OFFSET = decltype(v)::value * 2 * LANES;
      unrolled<KEYS>([&](auto key) TW_INLINE_LAMBDA {
        constexpr int K = decltype(key)::value;
        const ints number = load_pairs(keys + (K < last ? K : last) * HEAD_SIZE + OFFSET);
        unrolled<R>([&](auto r) TW_INLINE_LAMBDA {
          constexpr int I = decltype(r)::value;
          const ints query = load_as<ints>(q + I * HEAD_SIZE + OFFSET);
          sums[K * R + I] = multiply_add(query, number, sums[K * R + I]);
        });
      });
    });
    return to_floats(sums_of(sums));
  }

  // scores [end - begin][R]; writes up to LANES more. Those of fixed point lack the scale of q.
  template <class Query>
  static void score(const Head& head, const Query* q, int begin, int end, const next_tile<Head>& next, float* scores) {
    for (int p = begin, n; p < end; p += n) {
      n = Head::run(p, end);
      const auto* keys = head.row(0, p);
      for (int k = 0; k < n; k += KEYS) {
        next.template prefetch_rows<KEYS>(0, p - begin + k);
        store(scores + (p - begin + k) * R, dots(q, keys + k * HEAD_SIZE, n - k - 1));
      }
    }
  }

  // Scores become weights, of 2^(score - largest so far). `factors`: what earlier weights are to be multiplied by.
  // `largest`, `totals`, `factors` [LANES]: lane i is of row i % R, and a total is the sum of its row's lanes.
  // Row r sees positions [first[r], last[r]) of the tile.
  // `scales` [LANES]: what scores lack, by row, without those of int8 keys.
  static void soften(float* scores, int count, const int* first, const int* last, const float* scales,
                     const float* key_scales, const float* value_scales, float* largest, float* totals,
                     float* factors) {
    ints from, to;
    for (int i = 0; i < LANES; ++i) from[i] = first[i % R], to[i] = last[i % R];
    const ints keys = lane_numbers() / R;
    floats top = load(largest);
    for (int k = 0; k < count; k += KEYS) {
      floats score = load(scores + k * R);
      if (Head::SCALED) score = score * load(scales) * load_repeated<R>(key_scales + k);
      const ints position = keys + k;
      score = (position >= from) & (position < to) ? score : broadcast(-INFINITY);
      store(scores + k * R, score);
      top = maximum(top, score);
    }
    top = fold<R>(top, [](floats a, floats b) TW_INLINE_LAMBDA { return maximum(a, b); });
    const floats factor = exponential2(load(largest) - top);
    floats total = load(totals) * factor;
    for (int k = 0; k < count; k += KEYS) {
      floats weight = exponential2(load(scores + k * R) - top);
      total += weight;
      if (Head::SCALED) weight = weight * load_repeated<R>(value_scales + k);
      store(scores + k * R, weight);
    }
    store(largest, top);
    store(totals, total);
    store(factors, factor);
  }

  // Lane i: the operation over all lanes that belong to the row i % R.
  template <int STEP, int I = LANES / 2, class Operation>
  TW_INLINE floats fold(floats v, Operation&& operation) {
    if constexpr (I >= STEP) return fold<STEP, I / 2>(operation(v, swap_lanes<I>(v)), operation);
    else return v;
  }

  // sums = sums * factors + weights · values.
  static void add_values(const Head& head, const float* weights, const float* factors, int begin, int end,
                         const next_tile<Head>& next, float* sums) {
    constexpr int CHUNKS = (VECTORS + CHUNK - 1) / CHUNK;
    unrolled<CHUNKS>([&](auto chunk) TW_INLINE_LAMBDA {
      constexpr int FIRST = decltype(chunk)::value * CHUNK;
      constexpr int COUNT = VECTORS - FIRST < CHUNK ? VECTORS - FIRST : CHUNK;
      floats now[R * COUNT];
      unrolled<R * COUNT>([&](auto i) TW_INLINE_LAMBDA {
        constexpr int I = decltype(i)::value, V = FIRST + I % COUNT;
        now[I] = load(sums + I / COUNT * SIZE + V * LANES) * broadcast(factors[I / COUNT]);
      });
      for (int p = begin, n; p < end; p += n) {
        n = Head::run(p, end);
        const auto* values = head.row(1, p);
        const float* own = weights + (p - begin) * R;
        for (int k = 0; k < n; ++k, values += HEAD_SIZE, own += R) {
          if (k % (4 * CHUNKS) == 4 * decltype(chunk)::value) next.template prefetch_rows<4>(1, p - begin + k);
          floats value[COUNT];
          unrolled<COUNT>([&](auto v) TW_INLINE_LAMBDA {
            constexpr int V = decltype(v)::value;
            value[V] = load_part<HEAD_SIZE, FIRST + V>(values);
          });
          unrolled<R * COUNT>([&](auto i) TW_INLINE_LAMBDA {
            constexpr int I = decltype(i)::value;
            now[I] = multiply_add(broadcast(own[I / COUNT]), value[I % COUNT], now[I]);
          });
        }
      }
      unrolled<R * COUNT>([&](auto i) TW_INLINE_LAMBDA {
        constexpr int I = decltype(i)::value, V = FIRST + I % COUNT;
        store(sums + I / COUNT * SIZE + V * LANES, now[I]);
      });
    });
  }
};

}  // namespace tw

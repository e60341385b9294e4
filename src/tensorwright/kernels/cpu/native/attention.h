// Causal attention over KV blocks, in one pass with an online softmax (Dao et al., 2022, FlashAttention).
//
// A unit of work is the query rows of one kv head (its GROUP query heads times up to QUERIES tokens) against a range of
// cached positions, taken in tiles of TILE. Few rows (decode) read the cache once, straight from memory, with dot
// products; many rows (prefill) first turn the tile's keys so that both products are small matrix products. A decode
// token with a long context is cut into up to MAX_SPLITS ranges (flash decoding) whose results are merged after a
// barrier. Cuts depend on the sequence, and on whether the step has more than SPLIT_SEQUENCES: the bits do not depend on
// the number of workers.
// Moves: every cached key and value of a sequence once per tile of query rows.
#pragma once
#include "functions.h"
#include "kv_cache.h"
#include "pool.h"

namespace tw {

constexpr int TILE = 64;           // cached positions
constexpr int TILE_ROWS = 64;      // query rows
constexpr int DOT_ROWS = 12;       // from here on the tile's keys are turned
constexpr int MAX_SPLITS = 8;
constexpr int SPLIT_TOKENS = 512;  // a range is not cut shorter
constexpr int SPLIT_SEQUENCES = 64;  // bigger batches have work enough without cutting

// c[R][C vectors] (+)= a[R][depth] · b[depth][C vectors]; strides in floats.
template <int R, int C>
TW_INLINE void multiply_tile(const float* a, int a_stride, const float* b, int b_stride, float* c, int c_stride,
                             int depth, bool accumulate) {
  floats sums[R * C];
  unrolled<R * C>([&](auto i) TW_INLINE_LAMBDA {
    constexpr int I = decltype(i)::value;
    sums[I] = accumulate ? load(c + I / C * c_stride + I % C * LANES) : floats{};
  });
  for (int k = 0; k < depth; ++k) {
    floats row[C];
    unrolled<C>([&](auto i) TW_INLINE_LAMBDA {
      constexpr int I = decltype(i)::value;
      row[I] = load(b + k * b_stride + I * LANES);
    });
    unrolled<R * C>([&](auto i) TW_INLINE_LAMBDA {
      constexpr int I = decltype(i)::value;
      sums[I] = multiply_add(broadcast(a[I / C * a_stride + k]), row[I % C], sums[I]);
    });
  }
  unrolled<R * C>([&](auto i) TW_INLINE_LAMBDA {
    constexpr int I = decltype(i)::value;
    store(c + I / C * c_stride + I % C * LANES, sums[I]);
  });
}

#if defined(TW_AVX512) || defined(__aarch64__)
constexpr int TILE_VECTORS = 4;  // 16 accumulators of 32 registers
#else
constexpr int TILE_VECTORS = 2;  // 8 of 16
#endif

// c[rows][columns] (+)= a[rows][depth] · b[depth][columns]; rows in fours, columns in whole vectors.
TW_INLINE void multiply_rows(const float* a, int a_stride, const float* b, int b_stride, float* c, int c_stride,
                             int rows, int columns, int depth, bool accumulate) {
  for (int r = 0; r < rows; r += 4) {
    const float* from = a + r * a_stride;
    float* to = c + r * c_stride;
    int column = 0;
    for (; column + TILE_VECTORS * LANES <= columns; column += TILE_VECTORS * LANES)
      multiply_tile<4, TILE_VECTORS>(from, a_stride, b + column, b_stride, to + column, c_stride, depth, accumulate);
    for (; column < columns; column += LANES)
      multiply_tile<4, 1>(from, a_stride, b + column, b_stride, to + column, c_stride, depth, accumulate);
  }
}

// One unit's query rows and running results. PADDED rows and head size, so that no loop has a rest.
template <class Number, int HEAD_SIZE, int ROWS>
struct attention_state {
  static constexpr int VECTORS = (HEAD_SIZE + LANES - 1) / LANES;
  static constexpr int SIZE = VECTORS * LANES;
  alignas(64) float q[ROWS][SIZE];  // already times the softmax scale
  alignas(64) float sums[ROWS][SIZE];
  alignas(64) float weights[ROWS][TILE];  // scores, then e^(score − largest)
  alignas(64) float keys[SIZE][TILE];     // turned
  alignas(64) float values[TILE][SIZE];
  alignas(64) float key_scales[TILE], value_scales[TILE];
  float largest[ROWS], totals[ROWS];
  const Number *key_rows[TILE], *value_rows[TILE];

  void begin(int rows) {
    for (int r = 0; r < rows; ++r) {
      memset(sums[r], 0, sizeof sums[r]);
      largest[r] = -INFINITY;
      totals[r] = 0.0f;
    }
  }

  // Scores of R rows for one position at a time: the key is read once for all of them.
  template <int R>
  TW_INLINE void dot_scores(attention_state& s, int row, int count) {
    for (int k = 0; k < count; ++k) {
      floats dots[R] = {};
      unrolled<VECTORS>([&](auto v) TW_INLINE_LAMBDA {
        constexpr int V = decltype(v)::value;
        const floats key = load_part<HEAD_SIZE, V>(s.key_rows[k]);
        unrolled<R>([&](auto r) TW_INLINE_LAMBDA {
          constexpr int I = decltype(r)::value;
          dots[I] = multiply_add(load(s.q[row + I] + V * LANES), key, dots[I]);
        });
      });
      unrolled<R>([&](auto r) TW_INLINE_LAMBDA {
        constexpr int I = decltype(r)::value;
        s.weights[row + I][k] = reduce_add(dots[I]);
      });
    }
  }

  // sums += weights · values for R rows, values straight from the cache.
  template <int R>
  TW_INLINE void dot_values(attention_state& s, int row, int count) {
    unrolled<VECTORS>([&](auto v) TW_INLINE_LAMBDA {
      constexpr int V = decltype(v)::value;
      floats totals[R];
      unrolled<R>([&](auto r) TW_INLINE_LAMBDA {
        constexpr int I = decltype(r)::value;
        totals[I] = load(s.sums[row + I] + V * LANES);
      });
      for (int k = 0; k < count; ++k) {
        const floats value = load_part<HEAD_SIZE, V>(s.value_rows[k]);
        unrolled<R>([&](auto r) TW_INLINE_LAMBDA {
          constexpr int I = decltype(r)::value;
          totals[I] = multiply_add(broadcast(s.weights[row + I][k]), value, totals[I]);
        });
      }
      unrolled<R>([&](auto r) TW_INLINE_LAMBDA {
        constexpr int I = decltype(r)::value;
        store(s.sums[row + I] + V * LANES, totals[I]);
      });
    });
  }

  // `values` takes the rows as float32.
  void widen(const Number* const* from, int count) {
    for (int k = 0; k < count; ++k)
      unrolled<VECTORS>([&](auto v) TW_INLINE_LAMBDA {
        constexpr int V = decltype(v)::value;
        store(values[k] + V * LANES, load_part<HEAD_SIZE, V>(from[k]));
      });
  }

  void score(int rows, int count) {
    if (rows < DOT_ROWS) {
      int row = 0;
      for (; row + 4 <= rows; row += 4) dot_scores<4>(*this, row, count);
      for (; row < rows; ++row) dot_scores<1>(*this, row, count);
      return;
    }
    widen(key_rows, count);
    for (int k = count; k < TILE; ++k) memset(values[k], 0, sizeof values[k]);
    for (int i = 0; i < HEAD_SIZE; ++i)
      for (int k = 0; k < TILE; ++k) keys[i][k] = values[k][i];
    multiply_rows(q[0], SIZE, keys[0], TILE, weights[0], TILE, padded(rows), TILE, HEAD_SIZE, false);
  }

  void add_values(int rows, int count) {
    if (rows < DOT_ROWS) {
      int row = 0;
      for (; row + 4 <= rows; row += 4) dot_values<4>(*this, row, count);
      for (; row < rows; ++row) dot_values<1>(*this, row, count);
      return;
    }
    widen(value_rows, count);
    multiply_rows(weights[0], TILE, values[0], SIZE, sums[0], SIZE, padded(rows), SIZE, count, true);
  }

  // Scores of one row become weights; positions outside [first, last) of the tile get weight 0.
  void soften(int row, int first, int last) {
    float* w = weights[row];
    constexpr bool SCALED = sizeof(Number) == 1;
    floats top = broadcast(-INFINITY);
    for (int k = 0; k < TILE; k += LANES) {
      const ints position = lane_numbers() + k;
      floats score = load(w + k);
      if (SCALED) score = score * load(key_scales + k);
      score = (position >= first) & (position < last) ? score : broadcast(-INFINITY);
      store(w + k, score);
      top = maximum(top, score);
    }
    const float old = largest[row], most = reduce_maximum(top), now = most > old ? most : old;
    floats total = {};
    for (int k = 0; k < TILE; k += LANES) {
      floats weight = exponential(load(w + k) - now);
      total += weight;
      if (SCALED) weight = weight * load(value_scales + k);
      store(w + k, weight);
    }
    rescale(row, old, now);
    totals[row] += reduce_add(total);
  }

  void rescale(int row, float old, float now) {
    largest[row] = now;
    if (old == now) return;
    const float factor = expf(old - now);  // 0 for the first tile
    totals[row] *= factor;
    for (int i = 0; i < SIZE; i += LANES) store(sums[row] + i, load(sums[row] + i) * factor);
  }

  static constexpr int padded(int rows) { return (rows + 3) / 4 * 4; }
  static ints lane_numbers() {
    ints lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = i;
    return lanes;
  }
};

// buffers q [T, HEADS * HEAD_SIZE], kv, kv_scales (int8 only), y as q. Scratch: SPLIT_SEQUENCES (or T if fewer) *
// HEADS * MAX_SPLITS * (SIZE + 16) floats. WINDOW 0: the whole context. SCALE is a float's bits.
template <class Number, int HEADS, int KV_HEADS, int HEAD_SIZE, int BLOCK_SIZE, int WINDOW, uint32_t SCALE>
struct attention {
  static constexpr int GROUP = HEADS / KV_HEADS;
  static constexpr int QUERIES = GROUP < TILE_ROWS ? TILE_ROWS / GROUP : 1;  // tokens of a unit
  static constexpr int ROWS = (QUERIES * GROUP + 3) / 4 * 4;
  using state = attention_state<Number, HEAD_SIZE, ROWS>;
  using layout = kv_layout<KV_HEADS, HEAD_SIZE, BLOCK_SIZE>;
  static constexpr int PARTIAL = (HEAD_SIZE + LANES - 1) / LANES * LANES + 16;  // sums, largest, total

  struct arrays {
    const float* q;
    const Number* kv;
    const float* scales;
    float* y;
  };

  // Row r of a unit is query token r / GROUP, query head r % GROUP of the kv head.
  static int64_t row_offset(int64_t token, int head, int row) {
    return ((token + row / GROUP) * HEADS + head * GROUP + row % GROUP) * HEAD_SIZE;
  }

  static int first_visible(int position) { return WINDOW > 0 && position >= WINDOW ? position - WINDOW + 1 : 0; }

  static int split_length(int position) {
    const int length = position + 1 - first_visible(position);
    const int wanted = (length + SPLIT_TOKENS - 1) / SPLIT_TOKENS, splits = wanted < MAX_SPLITS ? wanted : MAX_SPLITS;
    return ((length + splits - 1) / splits + TILE - 1) / TILE * TILE;
  }

  static int num_splits(const tw_run* run, int sequence) {
    const bool room = run->num_sequences <= SPLIT_SEQUENCES && run->num_sequences <= run->num_tokens;
    if (run->query_lengths[sequence] != 1 || !room) return 1;
    const int position = run->kv_lengths[sequence] - 1;
    const int length = position + 1 - first_visible(position), part = split_length(position);
    return (length + part - 1) / part;
  }

  static void load_tile(state& s, const arrays& a, const int32_t* table, int head, int begin, int count) {
    for (int k = 0; k < count; ++k) {
      const int64_t block = table[(begin + k) / BLOCK_SIZE];
      const int offset = (begin + k) % BLOCK_SIZE;
      s.key_rows[k] = a.kv + layout::row_at(block, 0, head, offset);
      s.value_rows[k] = a.kv + layout::row_at(block, 1, head, offset);
      if (sizeof(Number) == 1) {
        s.key_scales[k] = a.scales[layout::scale_at(block, 0, head, offset)];
        s.value_scales[k] = a.scales[layout::scale_at(block, 1, head, offset)];
      }
    }
  }

  // Rows of `tokens` queries from `token` on, the first at `position`, against cached positions [begin, end).
  static int attend(state& s, const arrays& a, const int32_t* table, int head, int64_t token, int tokens, int position,
                    int begin, int end) {
    const int rows = tokens * GROUP;
    memset(s.q, 0, sizeof(float) * state::SIZE * state::padded(rows));
    for (int r = 0; r < rows; ++r) {
      const float* from = a.q + row_offset(token, head, r);
      for (int i = 0; i < HEAD_SIZE; ++i) s.q[r][i] = from[i] * float_of_bits(SCALE);
    }
    s.begin(state::padded(rows));
    for (int tile = begin; tile < end; tile += TILE) {
      const int count = end - tile < TILE ? end - tile : TILE;
      load_tile(s, a, table, head, tile, count);
      s.score(rows, count);
      for (int r = 0; r < rows; ++r) {
        const int own = position + r / GROUP, first = first_visible(own) - tile;
        const int last = own + 1 - tile < count ? own + 1 - tile : count;
        s.soften(r, first, last);
      }
      for (int r = rows; r < state::padded(rows); ++r) memset(s.weights[r], 0, sizeof s.weights[r]);
      s.add_values(rows, count);
    }
    return rows;
  }

  static void whole(state& s, const arrays& a, const tw_run* run, int sequence, int head, int first) {
    const int length = run->query_lengths[sequence], tokens = length - first < QUERIES ? length - first : QUERIES;
    const int position = run->kv_lengths[sequence] - length + first;
    const int64_t token = run->query_starts[sequence] + first;
    const int rows = attend(s, a, run->block_tables + (int64_t)sequence * run->table_width, head, token, tokens,
                            position, first_visible(position), position + tokens);
    for (int r = 0; r < rows; ++r) {
      float* y = a.y + row_offset(token, head, r);
      const float inverse = 1.0f / s.totals[r];
      for (int i = 0; i < HEAD_SIZE; ++i) y[i] = s.sums[r][i] * inverse;
    }
  }

  static float* partial(const tw_run* run, int sequence, int head, int split) {
    return (float*)run->scratch + (((int64_t)sequence * HEADS + head) * MAX_SPLITS + split) * PARTIAL;
  }

  static void part(state& s, const arrays& a, const tw_run* run, int sequence, int head, int split) {
    const int position = run->kv_lengths[sequence] - 1, length = split_length(position);
    const int begin = first_visible(position) + split * length;
    const int end = begin + length < position + 1 ? begin + length : position + 1;
    attend(s, a, run->block_tables + (int64_t)sequence * run->table_width, head, run->query_starts[sequence], 1,
           position, begin, end);
    for (int r = 0; r < GROUP; ++r) {
      float* to = partial(run, sequence, head * GROUP + r, split);
      memcpy(to, s.sums[r], sizeof s.sums[r]);
      to[state::SIZE] = s.largest[r];
      to[state::SIZE + 1] = s.totals[r];
    }
  }

  static void merge(const arrays& a, const tw_run* run, int sequence, int head, int splits) {
    float largest = -INFINITY, total = 0.0f;
    float sums[state::SIZE] = {};
    for (int split = 0; split < splits; ++split) {
      const float most = partial(run, sequence, head, split)[state::SIZE];
      largest = most > largest ? most : largest;
    }
    for (int split = 0; split < splits; ++split) {
      const float* from = partial(run, sequence, head, split);
      const float factor = expf(from[state::SIZE] - largest);
      total += factor * from[state::SIZE + 1];
      for (int i = 0; i < state::SIZE; ++i) sums[i] += factor * from[i];
    }
    float* y = a.y + ((int64_t)run->query_starts[sequence] * HEADS + head) * HEAD_SIZE;
    for (int i = 0; i < HEAD_SIZE; ++i) y[i] = sums[i] / total;
  }

  static void run(const tw_step* step, const tw_run* run, const tw_worker* worker) {
    constexpr bool SCALED = sizeof(Number) == 1;
    const arrays a{(const float*)step->buffers[0], (const Number*)step->buffers[1],
                   SCALED ? (const float*)step->buffers[2] : nullptr, (float*)step->buffers[SCALED ? 3 : 2]};
    state s;
    memset(s.key_scales, 0, sizeof s.key_scales);
    memset(s.value_scales, 0, sizeof s.value_scales);
    bool split_any = false;
    int64_t item = tw_take(worker), first = 0;
    for (int sequence = 0; sequence < run->num_sequences; ++sequence) {
      const int splits = num_splits(run, sequence);
      const int tiles = splits > 1 ? splits : (run->query_lengths[sequence] + QUERIES - 1) / QUERIES;
      split_any |= splits > 1;
      for (; item < first + (int64_t)KV_HEADS * tiles; item = tw_take(worker)) {
        const int head = (int)((item - first) / tiles), tile = (int)((item - first) % tiles);
        if (splits > 1) part(s, a, run, sequence, head, tile);
        else whole(s, a, run, sequence, head, (tiles - 1 - tile) * QUERIES);  // the longest first
      }
      first += (int64_t)KV_HEADS * tiles;
    }
    if (!split_any) return;
    tw_barrier(worker);
    for (int sequence = 0; sequence < run->num_sequences; ++sequence) {
      const int splits = num_splits(run, sequence);
      for (int head = worker->rank; splits > 1 && head < HEADS; head += worker->size)
        merge(a, run, sequence, head, splits);
    }
  }
};

}  // namespace tw

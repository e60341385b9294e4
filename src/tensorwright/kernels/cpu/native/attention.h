// Causal attention over KV blocks, in one pass with an online softmax (Dao et al., 2022, FlashAttention).
//
// A unit of work is the query rows of one kv head (its GROUP query heads times up to QUERIES tokens) against a range of
// cached positions, taken in tiles of TILE. A decode token with a long context is cut into up to MAX_SPLITS ranges
// (flash decoding) whose results are merged after a barrier. Cuts depend on the sequence, and on whether the step has
// more than SPLIT_SEQUENCES: the bits do not depend on the number of workers.
//
// Limits, for a position of one kv head and 4 query heads of 64 numbers. Bytes: a key and a value, 256 in 16 bits, 136
// in int8 with its scales; a core with 22 GB/s takes 11.6 and 6.2 ns. Operations: 32 multiply-adds of 16 lanes, 4 ns;
// with the conversions, the sums of dot products and the softmax 7 ns. So decode is bound by memory, and by arithmetic
// as well for int8. Prefill reads a position once for UNIT_ROWS rows: only its arithmetic counts, of which the two
// products are 85 %.
#pragma once
#include "attention_pairs.h"
#include "pool.h"

namespace tw {

constexpr int UNIT_ROWS = 384;  // query rows
constexpr int MAX_SPLITS = 8;
constexpr int SPLIT_TOKENS = 512;  // a range is not cut shorter
constexpr int SPLIT_SEQUENCES = 64;  // bigger batches have work enough without cutting

// Rows beyond a unit's own are computed, and never written.
constexpr int padded(int rows) { return (rows + FEW_ROWS - 1) / FEW_ROWS * FEW_ROWS; }
static_assert(FEW_ROWS % TILE_STEP == 0 && FEW_ROWS % 4 == 0, "padding fills groups of either kind");

// buffers q [T, HEADS * HEAD_SIZE], kv, kv_scales (int8 only), y as q. Scratch: SPLIT_SEQUENCES (or T if fewer) *
// HEADS * MAX_SPLITS * (SIZE + 16) floats. WINDOW 0: the whole context. SCALE is a float's bits.
// BITS 16: products of many rows may take 16-bit operands (attention_pairs.h), unless the cache is float32.
template <class Number, int HEADS, int KV_HEADS, int HEAD_SIZE, int BLOCK_SIZE, int WINDOW, uint32_t SCALE, int BITS>
struct attention {
  static constexpr int GROUP = HEADS / KV_HEADS;
  static constexpr int QUERIES = GROUP < UNIT_ROWS ? UNIT_ROWS / GROUP : 1;  // tokens of a unit
  static constexpr int ROWS = padded(QUERIES * GROUP);
  static constexpr int SIZE = (HEAD_SIZE + LANES - 1) / LANES * LANES;
  static constexpr int PARTIAL = SIZE + 16;  // sums, largest, total
  static constexpr bool SCALED = sizeof(Number) == 1;
  static constexpr bool PAIRED = HAS_PAIRS && BITS == 16 && sizeof(Number) < sizeof(float);
  static constexpr bool PAIRED_FEW = PAIRED && SCALED && HEAD_SIZE % (2 * LANES) == 0;
  using cached = cached_head<Number, KV_HEADS, HEAD_SIZE, BLOCK_SIZE>;
  using tile_of_many = std::conditional_t<PAIRED, pair_tile<cached, Number, HEAD_SIZE, PAIRED ? ROWS : 0>,
                                          wide_tile<cached, Number, HEAD_SIZE>>;

  struct arrays {
    const float* q;
    const Number* kv;
    const float* scales;
    float* y;
  };

  // A unit's rows and running results. Row r is query token r / GROUP, query head r % GROUP of the kv head. Scores are
  // in powers of 2, so q is multiplied by the softmax scale and by log2 e.
  struct state {
    alignas(64) float q[ROWS][SIZE];
    alignas(64) float sums[ROWS][SIZE];
    alignas(64) float weights[FEW_ROWS * TILE + LANES];
    alignas(64) float totals[ROWS][LANES];
    alignas(64) float factors[TILE_STEP + LANES];
    alignas(64) float largest[ROWS + LANES];
    tile_of_many tile;
  };

  // The tokens of a unit, and the cached positions [begin, end) that it attends to.
  struct unit {
    int64_t token;
    int tokens, position, begin, end;  // `position`: of the first token
    int rows() const { return tokens * GROUP; }
    int first(int row) const { return first_visible(position + row / GROUP); }
    int last(int row) const { return position + row / GROUP + 1; }
  };

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

  // Afterwards totals[r][0] and largest[r] are row r's.
  template <int R>
  static void attend_few(state& s, const cached& head, const unit& u, const next_tile<cached>& next_unit) {
    using few = few_rows<R, cached, HEAD_SIZE>;
    alignas(64) int16_t fixed[PAIRED_FEW ? FEW_ROWS * HEAD_SIZE : 1];
    alignas(64) float scales[FEW_ROWS / R * LANES];
    for (int i = 0; i < padded(u.rows()) / R * LANES; ++i) {
      const int row = i / LANES * R + i % R;
      if (!PAIRED_FEW) scales[i] = 1.0f;
      else scales[i] = i % LANES < R ? to_fixed<HEAD_SIZE>(s.q[row], fixed + row * HEAD_SIZE) : scales[i - R];
    }
    alignas(64) float largest[FEW_ROWS / R * LANES], totals[FEW_ROWS / R * LANES] = {}, factors[LANES];
    for (float& each : largest) each = NO_SCORE;
    for (int begin = u.begin; begin < u.end; begin += TILE) {
      const int end = u.end - begin < TILE ? u.end : begin + TILE;
      if (SCALED) {
        head.copy_scales(0, begin, end, s.tile.key_scales);
        head.copy_scales(1, begin, end, s.tile.value_scales);
      }
      next_tile<cached> next = next_unit;
      if (end < u.end) next = {head, end, u.end - end < TILE ? u.end : end + TILE};
      for (int row = 0; row < u.rows(); row += R) {
        int first[R], last[R];
        for (int r = 0; r < R; ++r) {
          const int own = row + r < u.rows() ? row + r : u.rows() - 1;
          first[r] = u.first(own) - begin;
          last[r] = u.last(own) < end ? u.last(own) - begin : end - begin;
        }
        if constexpr (PAIRED_FEW) few::score(head, fixed + row * HEAD_SIZE, begin, end, next, s.weights);
        else few::score(head, s.q[row], begin, end, next, s.weights);
        few::soften(s.weights, end - begin, first, last, scales + row / R * LANES, s.tile.key_scales,
                    s.tile.value_scales, largest + row / R * LANES, totals + row / R * LANES, factors);
        few::add_values(head, s.weights, factors, begin, end, next, s.sums[row]);
        next.end = 0;  // once is enough
      }
    }
    for (int r = 0; r < u.rows(); ++r) {
      s.largest[r] = largest[r / R * LANES + r % R];
      s.totals[r][0] = 0.0f;
      for (int i = r % R; i < LANES; i += R) s.totals[r][0] += totals[r / R * LANES + i];
    }
  }

  static void attend_many(state& s, const cached& head, const unit& u) {
    const int rows = u.rows();
    for (int begin = u.begin; begin < u.end; begin += TILE) {
      const int count = u.end - begin < TILE ? u.end - begin : TILE;
      s.tile.fill(head, begin, begin + count);
      const int end = begin + count;
      const next_tile<cached> next{head, end, u.end - end < TILE ? u.end : end + TILE};
      for (int r = 0, ahead = 0; r < rows; r += TILE_STEP, ahead += 2) {
        if (ahead < TILE) {
          next.template prefetch_rows<2>(0, ahead);
          next.template prefetch_rows<2>(1, ahead);
        }
        const int bottom = r + TILE_STEP < rows ? r + TILE_STEP - 1 : rows - 1;
        const int last = u.last(bottom) - begin < count ? u.last(bottom) - begin : count;
        if (last <= 0 || u.first(r) - begin >= count) continue;
        const int columns = (last + LANES - 1) / LANES * LANES;
        s.tile.score(s.q[r], r, columns, s.weights);
        for (int i = 0; i < TILE_STEP; ++i) {
          const int own = r + i < rows ? r + i : rows - 1, from = u.first(own) - begin;
          const int to = u.last(own) - begin < count ? u.last(own) - begin : count;
          if (from > 0 || to < columns) hide(s.weights + i * TILE, columns, from, to);
        }
        s.tile.soften(r, s.weights, columns, s.largest + r, (floats*)s.totals[r], s.factors);
        s.tile.add_values(s.weights, columns, last, s.factors, s.sums[r]);
      }
    }
    for (int r = 0; r < rows; ++r) s.totals[r][0] = reduce_add(load(s.totals[r]));
  }

  static void attend(state& s, const arrays& a, const cached& head, const unit& u, const next_tile<cached>& next) {
    const int rows = u.rows(), all = padded(rows);
    memset(s.sums, 0, sizeof(float) * SIZE * all);
    if (SIZE > HEAD_SIZE || all > rows) memset(s.q, 0, sizeof(float) * SIZE * all);
    for (int r = 0; r < rows; ++r) {
      const float* from = a.q + row_offset(u.token, head.head, r);
      for (int i = 0; i < HEAD_SIZE; ++i) s.q[r][i] = from[i] * (float_of_bits(SCALE) * 1.44269504088896341f);
    }
    if (rows >= FEW_ROWS) {
      memset(s.totals, 0, sizeof(float) * LANES * all);
      for (int r = 0; r < all; ++r) s.largest[r] = NO_SCORE, s.tile.prepare(r, s.q[r]);
      attend_many(s, head, u);
    } else if (GROUP == 1 && rows == 1) {
      attend_few<1>(s, head, u, next);
    } else if (GROUP <= 2 && rows == 2) {
      attend_few<2>(s, head, u, next);
    } else if (LANES == 16 && rows == 8) {
      attend_few<LANES == 16 ? 8 : 4>(s, head, u, next);
    } else {
      attend_few<4>(s, head, u, next);
    }
  }

  // A unit's number in a step's list: its sequence, kv head, and range or tile of tokens.
  struct place {
    int sequence = 0, splits = 0, head = 0, tile = 0;
    int64_t first = 0;  // number of the sequence's first unit
  };

  static int num_tiles(const tw_run* run, int sequence, int splits) {
    return splits > 1 ? splits : (run->query_lengths[sequence] + QUERIES - 1) / QUERIES;
  }

  // Moves on to unit `number`, at or behind the place; false when there is none.
  static bool find(place& p, const tw_run* run, int64_t number) {
    for (; p.sequence < run->num_sequences; ++p.sequence) {
      p.splits = num_splits(run, p.sequence);
      const int tiles = num_tiles(run, p.sequence, p.splits);
      if (number < p.first + (int64_t)KV_HEADS * tiles) {
        p.head = (int)((number - p.first) / tiles);
        p.tile = (int)((number - p.first) % tiles);
        return true;
      }
      p.first += (int64_t)KV_HEADS * tiles;
    }
    return false;
  }

  static unit unit_at(const tw_run* run, const place& p) {
    const int length = run->query_lengths[p.sequence], kv_length = run->kv_lengths[p.sequence];
    const int64_t token = run->query_starts[p.sequence];
    if (p.splits > 1) {
      const int part = split_length(kv_length - 1), begin = first_visible(kv_length - 1) + p.tile * part;
      return {token, 1, kv_length - 1, begin, begin + part < kv_length ? begin + part : kv_length};
    }
    const int first = (num_tiles(run, p.sequence, 1) - 1 - p.tile) * QUERIES;  // the longest comes first
    const int tokens = length - first < QUERIES ? length - first : QUERIES, position = kv_length - length + first;
    return {token + first, tokens, position, first_visible(position), position + tokens};
  }

  static cached head_at(const arrays& a, const tw_run* run, const place& p) {
    return {a.kv, a.scales, run->block_tables + (int64_t)p.sequence * run->table_width, p.head};
  }

  static float* partial(const tw_run* run, int sequence, int head, int split) {
    return (float*)run->scratch + (((int64_t)sequence * HEADS + head) * MAX_SPLITS + split) * PARTIAL;
  }

  static void write_rows(const state& s, const arrays& a, const place& p, const unit& u) {
    for (int r = 0; r < u.rows(); ++r) {
      float* y = a.y + row_offset(u.token, p.head, r);
      const float inverse = 1.0f / s.totals[r][0];
      for (int i = 0; i < HEAD_SIZE; ++i) y[i] = s.sums[r][i] * inverse;
    }
  }

  static void write_partial(const state& s, const tw_run* run, const place& p) {
    for (int r = 0; r < GROUP; ++r) {
      float* to = partial(run, p.sequence, p.head * GROUP + r, p.tile);
      memcpy(to, s.sums[r], sizeof s.sums[r]);
      to[SIZE] = s.largest[r];
      to[SIZE + 1] = s.totals[r][0];
    }
  }

  static void merge(const arrays& a, const tw_run* run, int sequence, int head, int splits) {
    alignas(64) float factors[MAX_SPLITS + LANES], sums[SIZE] = {};
    float largest = NO_SCORE, total = 0.0f;
    for (int split = 0; split < splits; ++split) {
      const float most = partial(run, sequence, head, split)[SIZE];
      largest = most > largest ? most : largest;
    }
    for (int split = 0; split < splits; ++split) factors[split] = partial(run, sequence, head, split)[SIZE] - largest;
    for (int split = 0; split < splits; split += LANES) store(factors + split, exponential2(load(factors + split)));
    for (int split = 0; split < splits; ++split) {
      const float* from = partial(run, sequence, head, split);
      total += factors[split] * from[SIZE + 1];
      for (int i = 0; i < SIZE; i += LANES)
        store(sums + i, multiply_add(load(from + i), broadcast(factors[split]), load(sums + i)));
    }
    float* y = a.y + ((int64_t)run->query_starts[sequence] * HEADS + head) * HEAD_SIZE;
    const float inverse = 1.0f / total;
    for (int i = 0; i < HEAD_SIZE; ++i) y[i] = sums[i] * inverse;
  }

  static void run(const tw_step* step, const tw_run* run, const tw_worker* worker) {
    const arrays a{(const float*)step->buffers[0], (const Number*)step->buffers[1],
                   SCALED ? (const float*)step->buffers[2] : nullptr, (float*)step->buffers[SCALED ? 3 : 2]};
    state s;
    place now, next;
    bool more = find(now, run, tw_take(worker));
    while (more) {
      next = now;
      more = find(next, run, tw_take(worker));  // known early, so that its first tile is there in time
      const unit u = unit_at(run, now);
      next_tile<cached> ahead{head_at(a, run, more ? next : now), 0, 0};
      if (more) {
        const unit v = unit_at(run, next);
        ahead.begin = v.begin;
        ahead.end = v.end - v.begin < TILE ? v.end : v.begin + TILE;
      }
      attend(s, a, head_at(a, run, now), u, ahead);
      if (now.splits > 1) write_partial(s, run, now);
      else write_rows(s, a, now, u);
      now = next;
    }
    bool split_any = false;
    for (int sequence = 0; sequence < run->num_sequences; ++sequence) split_any |= num_splits(run, sequence) > 1;
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

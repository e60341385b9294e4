// Rotary embedding (Su et al., 2021), the norm of single heads, and both fused with splitting qkv and the cache write.
// Angles are products in double: float32 would lose a whole turn's third digit at position 100,000.
#pragma once
#include "kv_cache.h"
#include "norm.h"
#include "pool.h"

namespace tw {

// Sine and cosine to float32's precision. Cephes' polynomials on [-pi/4, pi/4] after taking off quarter turns.
TW_INLINE void sine_cosine(double angle, float* sine, float* cosine) {
  const double quarters = rint(angle * 0.63661977236758134308);
  const float x = (float)(angle - quarters * 1.57079632679489661923);
  const float z = x * x;
  const float s = x + x * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
  const float tail = 4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f);
  const float c = 1.0f - 0.5f * z + z * z * tail;
  const int32_t quadrant = (int32_t)quarters;
  const float first = quadrant & 1 ? c : s, second = quadrant & 1 ? s : c;
  *sine = quadrant & 2 ? -first : first;
  *cosine = (quadrant + 1) & 2 ? -second : second;
}

// The turns of one token: F pairs, multiplied by FACTOR (float bits).
template <int F, uint32_t FACTOR>
struct turns {
  float cosine[F], sine[F];
  void set(int32_t position, const float* inverse_frequencies) {
    const float factor = float_of_bits(FACTOR);
    for (int i = 0; i < F; ++i) {
      float s, c;
      sine_cosine((double)position * (double)inverse_frequencies[i], &s, &c);
      sine[i] = s * factor;
      cosine[i] = c * factor;
    }
  }
  // Pairs (i, i + F) of the first 2F numbers turn; the rest of the head is copied.
  template <int HEAD_SIZE>
  void apply(const float* __restrict x, float* __restrict y) const {
    for (int i = 0; i < F; ++i) {
      y[i] = x[i] * cosine[i] - x[i + F] * sine[i];
      y[i + F] = x[i + F] * cosine[i] + x[i] * sine[i];
    }
    for (int i = 2 * F; i < HEAD_SIZE; ++i) y[i] = x[i];
  }
};

// buffers x, y [T, HEADS * HEAD_SIZE]; weights inverse_frequencies [F].
template <int HEADS, int HEAD_SIZE, int F, uint32_t FACTOR>
struct rope {
  static void run(const tw_step* step, const tw_run* run, const tw_worker* worker) {
    const float* x = (const float*)step->buffers[0];
    float* y = (float*)step->buffers[1];
    turns<F, FACTOR> turn;
    int64_t begin, end;
    share((int64_t)run->num_tokens * HEADS, 1, worker, &begin, &end);
    for (int64_t unit = begin; unit < end; ++unit) {
      if (unit == begin || unit % HEADS == 0)
        turn.set(run->positions[unit / HEADS], (const float*)step->weights[0]);
      turn.template apply<HEAD_SIZE>(x + unit * HEAD_SIZE, y + unit * HEAD_SIZE);
    }
  }
};

// buffers k, v [T, KV_HEADS * HEAD_SIZE], kv, kv_scales (int8 only).
template <class Number, int KV_HEADS, int HEAD_SIZE, int BLOCK_SIZE>
struct cache_write {
  static void run(const tw_step* step, const tw_run* run, const tw_worker* worker) {
    Number* kv = (Number*)step->buffers[2];
    float* scales = sizeof(Number) == 1 ? (float*)step->buffers[3] : nullptr;
    int64_t begin, end;
    share((int64_t)run->num_tokens * KV_HEADS, 1, worker, &begin, &end);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int32_t slot = run->slots[unit / KV_HEADS];
      const int head = (int)(unit % KV_HEADS);
      for (int which = 0; which < 2 && slot >= 0; ++which)
        kv_layout<KV_HEADS, HEAD_SIZE, BLOCK_SIZE>::write(
            kv, scales, slot, which, head, (const float*)step->buffers[which] + unit * HEAD_SIZE);
    }
  }
};

// buffers qkv [T, (HEADS + 2 KV_HEADS) * HEAD_SIZE], kv, kv_scales (int8 only), q [T, HEADS * HEAD_SIZE];
// weights inverse_frequencies [F], q_norm and k_norm [HEAD_SIZE] or null. A unit is one kv head with its query heads.
template <class Number, int HEADS, int KV_HEADS, int HEAD_SIZE, int BLOCK_SIZE, int F, uint32_t FACTOR,
          uint32_t EPSILON>
struct rope_cache {
  static constexpr int GROUP = HEADS / KV_HEADS;

  static void turn_head(const turns<F, FACTOR>& turn, const float* norm, const float* x, float* y) {
    float normed[HEAD_SIZE];
    if (norm) norm_row<HEAD_SIZE, EPSILON>(x, norm, normed);
    turn.template apply<HEAD_SIZE>(norm ? normed : x, y);
  }

  static void run(const tw_step* step, const tw_run* run, const tw_worker* worker) {
    const float* qkv = (const float*)step->buffers[0];
    Number* kv = (Number*)step->buffers[1];
    float* scales = sizeof(Number) == 1 ? (float*)step->buffers[2] : nullptr;
    float* q = (float*)step->buffers[sizeof(Number) == 1 ? 3 : 2];
    const float* q_norm = (const float*)step->weights[1];
    const float* k_norm = (const float*)step->weights[2];
    turns<F, FACTOR> turn;
    int64_t begin, end;
    share((int64_t)run->num_tokens * KV_HEADS, 1, worker, &begin, &end);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t token = unit / KV_HEADS;
      const int head = (int)(unit % KV_HEADS);
      const float* row = qkv + token * (HEADS + 2 * KV_HEADS) * HEAD_SIZE;
      if (unit == begin || head == 0) turn.set(run->positions[token], (const float*)step->weights[0]);
      for (int i = head * GROUP; i < (head + 1) * GROUP; ++i)
        turn_head(turn, q_norm, row + i * HEAD_SIZE, q + (token * HEADS + i) * HEAD_SIZE);
      if (run->slots[token] < 0) continue;
      float key[HEAD_SIZE];
      turn_head(turn, k_norm, row + (HEADS + head) * HEAD_SIZE, key);
      using layout = kv_layout<KV_HEADS, HEAD_SIZE, BLOCK_SIZE>;
      layout::write(kv, scales, run->slots[token], 0, head, key);
      layout::write(kv, scales, run->slots[token], 1, head, row + (HEADS + KV_HEADS + head) * HEAD_SIZE);
    }
  }
};

}  // namespace tw

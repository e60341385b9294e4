// What becomes of a linear's sums: the epilogues. Knows neither weights nor how the sums were made.
//
// store(tile, g, token, lower, upper) takes the finished sums of rows g and g + 8 of a row tile, and gives the token's
// share of `squares` (the sum of squares that the next RMSNorm needs). Which weight rows are "g" and "g + 8" is the
// packer's choice: dimensions d and d + 64 of a head for rope, gate and up of one channel for a gated activation.
//
// Activations that a linear reads lie as it reads them, a chunk of 128 inputs of all tokens in one contiguous copy: in input
// order [K / 128][tokens / 8][4 quarters][8 tokens][32] for mma.sync, which is the plain order with one token, or in core
// order for wgmma.
#pragma once
#include "tensor_core.cuh"

namespace tw {

template <int TOKENS> __device__ inline int input_index(int token, int k) {
  constexpr int WIDTH = TOKENS < 8 ? TOKENS : 8;
  return (((k / 128 * (TOKENS / WIDTH) + token / WIDTH) * 4 + k / 32 % 4) * WIDTH + token % WIDTH) * 32 + k % 32;
}

template <int TOKENS> struct InputOrder {
  __device__ static int index(int token, int k) { return input_index<TOKENS>(token, k); }
};

// As wgmma reads it from shared memory: [K / 128][tokens / 8][8 k-steps][2][8 tokens][8]. Which input is where in a k-step
// follows the packed weights: lane t of a quarter has inputs 8 t .. 8 t + 7, in steps 0 1 | 4 5 and 2 3 | 6 7.
__device__ inline size_t core_index(int token, int k, int tokens) {
  const int step = k / 32 % 4 * 2 + k / 2 % 2, core = k / 4 % 2, at = k / 8 % 4 * 2 + k % 2;
  return (((size_t)(k / 128) * (tokens / 8) + token / 8) * 16 + step * 2 + core) * 64 + token % 8 * 8 + at;
}
template <int TOKENS> struct CoreOrder {
  __device__ static int index(int token, int k) { return (int)core_index(token, k, TOKENS); }
};

// q, k, v: rope on q and k in the rotate-half pairing, k and v into their slots. The next kernel is attention.
template <class Type, class Stored, int TOKENS, int HEADS, int KV_HEADS, int BLOCK_SIZE> struct RopeAndCache {
  static constexpr bool SQUARES = false;
  Type* q;                // [tokens, HEADS, 128]
  Stored* cache;          // [blocks, 2, KV_HEADS, BLOCK_SIZE, 128]
  const int* slots;       // [tokens]; negative: a row of padding
  const float2* rotation; // [tokens, 64]: cosine and sine

  __device__ float store(int tile, int g, int token, float lower, float upper) const {
    const int head = tile / 8, d = tile % 8 * 8 + g;
    if (head < HEADS + KV_HEADS) {
      const float2 turn = rotation[token * 64 + d];
      const float x = lower, y = upper;
      lower = x * turn.x - y * turn.y;
      upper = y * turn.x + x * turn.y;
    }
    if (head < HEADS) {
      Type* to = q + (token * HEADS + head) * 128;
      to[d] = from_float<Type>(lower), to[d + 64] = from_float<Type>(upper);
    } else if (const int slot = slots[token]; slot >= 0) {
      const int value = head >= HEADS + KV_HEADS, kv_head = (head - HEADS) % KV_HEADS;
      const size_t row = ((size_t)(slot / BLOCK_SIZE) * 2 + value) * KV_HEADS + kv_head;
      Stored* to = cache + (row * BLOCK_SIZE + slot % BLOCK_SIZE) * 128;
      to[d] = to_finite<Stored>(lower), to[d + 64] = to_finite<Stored>(upper);
    }
    return 0.f;
  }
};

// Adds to the residual stream (float32) and leaves the next linear's input: the sum times the next norm's weight. The
// norm's division by the root mean square is one number per token, and the next linear applies it to its sums.
template <class Type, int TOKENS, int ROWS> struct Residual {
  static constexpr bool SQUARES = true;
  float* stream;          // [tokens, ROWS]
  Type* x;                // input order
  const float* next_norm;  // [ROWS]
  float* square_sums;     // [partial sums, tokens]

  __device__ float store(int tile, int g, int token, float lower, float upper) const {
    const int row = tile * 16 + g;
    float* at = stream + (size_t)token * ROWS + row;
    lower += at[0], upper += at[8];
    at[0] = lower, at[8] = upper;
    x[input_index<TOKENS>(token, row)] = to_finite<Type>(lower * next_norm[row]);
    x[input_index<TOKENS>(token, row + 8)] = to_finite<Type>(upper * next_norm[row + 8]);
    return lower * lower + upper * upper;
  }
};

// silu(gate) * up.
template <class Type, int TOKENS> struct Gated {
  static constexpr bool SQUARES = false;
  Type* y;  // input order

  __device__ float store(int tile, int g, int token, float lower, float upper) const {
    y[input_index<TOKENS>(token, tile * 8 + g)] = to_finite<Type>(lower / (1.f + __expf(-lower)) * upper);
    return 0.f;
  }
};

// Logits, and the largest of each token with its row: float bits made to order like integers, then the row inverted, so
// that of equal logits the lowest row wins.
template <int ROWS> struct Logits {
  static constexpr bool SQUARES = false;
  float* logits;  // [tokens, ROWS]
  u64* best;      // [tokens], 0 at first

  __device__ static u64 key(float value, int row) {
    const u32 bits = __float_as_uint(value);
    const u32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)ordered << 32 | (u32)~row;
  }
  __device__ float store(int tile, int g, int token, float lower, float upper) const {
    const int row = tile * 16 + g;
    float* at = logits + (size_t)token * ROWS + row;
    at[0] = lower, at[8] = upper;
    const u64 candidate = upper > lower ? key(upper, row + 8) : key(lower, row);
    // Few get past the stale read: an atomic for every row would queue at one address.
    if (candidate > *reinterpret_cast<volatile u64*>(best + token)) atomicMax(best + token, candidate);
    return 0.f;
  }
};

}  // namespace tw

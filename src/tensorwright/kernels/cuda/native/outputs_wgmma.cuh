// What becomes of the sums of linear_wgmma.cuh. Knows neither weights nor how the sums were made.
//
// A warp has TILES row tiles and eight tokens at a time: values[r][0..3] are (row g, token 2t), (g, 2t + 1), (g + 8, 2t),
// (g + 8, 2t + 1) of row tile `tile + r`, as the tensor core leaves them. `load` reads what `store` needs from memory: it
// is called for several groups of tokens before the first `store`, because a load would wait for each store before it.
// Activations are left in core order.
#pragma once
#include "outputs.cuh"

namespace tw {

__device__ inline u32 transposed(u32 a) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}

// Stores BLOCKS blocks of 8 inputs from input k on of eight of TOKENS tokens; rows[i] has (input g, tokens 2t, 2t + 1) of
// block i. After transposing, a lane has inputs 2t, 2t + 1 of token g, and those of neighbouring blocks are neighbours.
template <class Type, int TOKENS, int BLOCKS>
__device__ inline void store_core_order(Type* x, int token, int k, const u32 (&rows)[BLOCKS]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  u32 pairs[BLOCKS];
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) pairs[i] = transposed(rows[i]);
  Type* to = x + core_index(token + g, k + 2 * t, TOKENS);
  if constexpr (BLOCKS == 4) *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  if constexpr (BLOCKS == 2) *reinterpret_cast<uint2*>(to) = make_uint2(pairs[0], pairs[1]);
  if constexpr (BLOCKS == 1) *reinterpret_cast<u32*>(to) = pairs[0];
}

struct Nothing {};

// An epilogue of outputs.cuh's kind, which leaves no activations for another linear.
template <class Output> struct EachToken {
  static constexpr bool SQUARES = false;
  using Loaded = Nothing;
  Output output;

  template <int TILES> __device__ void load(int, int, int, int, Nothing (&)[TILES]) const {}
  template <int TILES>
  __device__ void store(int tile, int g, int t, int token, const float (&values)[TILES][4], const Nothing (&)[TILES], float (&)[2]) const {
#pragma unroll
    for (int r = 0; r < TILES; r++)
#pragma unroll
      for (int i = 0; i < 2; i++) output.store(tile + r, g, token + 2 * t + i, values[r][i], values[r][2 + i]);
  }
};

template <class Type, class Stored, int HEADS, int KV_HEADS, int BLOCK_SIZE> struct RopeAndCacheBlock {
  static constexpr bool SQUARES = false;
  struct Loaded {
    float2 turn[2];
    int slot[2];
  };
  Type* q;                // [tokens, HEADS, 128]
  Stored* cache;          // [blocks, 2, KV_HEADS, BLOCK_SIZE, 128]
  const int* slots;       // [tokens]; negative: a row of padding
  const float2* rotation; // [tokens, 64]: cosine and sine

  template <int TILES> __device__ void load(int tile, int g, int t, int token, Loaded (&loaded)[TILES]) const {
#pragma unroll
    for (int r = 0; r < TILES; r++) {
      const int head = (tile + r) / 8, d = (tile + r) % 8 * 8 + g;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = token + 2 * t + i;
        loaded[r].turn[i] = head < HEADS + KV_HEADS ? __ldcg(&rotation[row * 64 + d]) : make_float2(1.f, 0.f);
        loaded[r].slot[i] = head >= HEADS ? __ldg(&slots[row]) : 0;
      }
    }
  }
  template <int TILES>
  __device__ void store(int tile, int g, int t, int token, const float (&values)[TILES][4], const Loaded (&loaded)[TILES], float (&)[2]) const {
#pragma unroll
    for (int r = 0; r < TILES; r++) {
      const int head = (tile + r) / 8, d = (tile + r) % 8 * 8 + g;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float2 turn = loaded[r].turn[i];
        const int slot = loaded[r].slot[i];
        const float lower = values[r][i] * turn.x - values[r][2 + i] * turn.y, upper = values[r][2 + i] * turn.x + values[r][i] * turn.y;
        if (head < HEADS) {
          Type* to = q + ((size_t)(token + 2 * t + i) * HEADS + head) * 128;
          to[d] = from_float<Type>(lower), to[d + 64] = from_float<Type>(upper);
        } else if (slot >= 0) {
          const size_t row = ((size_t)(slot / BLOCK_SIZE) * 2 + (head >= HEADS + KV_HEADS)) * KV_HEADS + (head - HEADS) % KV_HEADS;
          Stored* to = cache + (row * BLOCK_SIZE + slot % BLOCK_SIZE) * 128;
          to[d] = to_finite<Stored>(lower), to[d + 64] = to_finite<Stored>(upper);
        }
      }
    }
  }
};

// Adds to the residual stream and leaves the next linear's input; see Residual in outputs.cuh.
template <class Type, int TOKENS, int ROWS> struct ResidualBlock {
  static constexpr bool SQUARES = true;
  struct Loaded {
    float old[4], norm[2];
  };
  float* stream;           // [tokens, ROWS]
  Type* x;
  const float* next_norm;  // [ROWS]
  float* square_sums;      // [partial sums, tokens]

  template <int TILES> __device__ void load(int tile, int g, int t, int token, Loaded (&loaded)[TILES]) const {
#pragma unroll
    for (int r = 0; r < TILES; r++) {
      const int row = (tile + r) * 16 + g;
#pragma unroll
      for (int i = 0; i < 4; i++) loaded[r].old[i] = stream[(size_t)(token + 2 * t + i % 2) * ROWS + row + i / 2 * 8];
      loaded[r].norm[0] = next_norm[row], loaded[r].norm[1] = next_norm[row + 8];
    }
  }
  template <int TILES>
  __device__ void store(int tile, int g, int t, int token, const float (&values)[TILES][4], const Loaded (&loaded)[TILES], float (&squares)[2]) const {
    u32 rows[2 * TILES];
#pragma unroll
    for (int r = 0; r < TILES; r++) {
      float sums[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        sums[i] = loaded[r].old[i] + values[r][i];
        stream[(size_t)(token + 2 * t + i % 2) * ROWS + (tile + r) * 16 + g + i / 2 * 8] = sums[i];
        squares[i % 2] += sums[i] * sums[i];
        sums[i] = finite<Type>(sums[i] * loaded[r].norm[i / 2]);
      }
      rows[2 * r] = pack<Type>(sums[0], sums[1]);
      rows[2 * r + 1] = pack<Type>(sums[2], sums[3]);
    }
    store_core_order<Type, TOKENS>(x, token, tile * 16, rows);
  }
};

// silu(gate) * up.
template <class Type, int TOKENS> struct GatedBlock {
  static constexpr bool SQUARES = false;
  using Loaded = Nothing;
  Type* y;

  template <int TILES> __device__ void load(int, int, int, int, Nothing (&)[TILES]) const {}
  template <int TILES>
  __device__ void store(int tile, int g, int t, int token, const float (&values)[TILES][4], const Nothing (&)[TILES], float (&)[2]) const {
    u32 rows[TILES];
#pragma unroll
    for (int r = 0; r < TILES; r++) {
      float y[2];
#pragma unroll
      for (int i = 0; i < 2; i++) y[i] = finite<Type>(__fdividef(values[r][i], 1.f + __expf(-values[r][i])) * values[r][2 + i]);
      rows[r] = pack<Type>(y[0], y[1]);
    }
    store_core_order<Type, TOKENS>(y, token, tile * 8, rows);
  }
};

}  // namespace tw

// Causal attention over the paged cache, for any mix of prompt chunks and single tokens in a step.
//
// A block handles 64 rows of one sequence and one kv head: row r is token r / GROUP and query head r % GROUP, so that
// every key and value is read once for all query heads that share it. Each of four warps has 16 rows and goes through
// tiles of 32 keys with a running softmax (Dao et al., 2022). Products are of 16-bit numbers with float32 sums.
#pragma once
#include "numbers.cuh"
#include "weights.cuh"

namespace tw {

template <class Stored> struct AttentionStep {
  const float* q;           // [tokens, HEADS * D]
  const Stored* cache;      // [blocks, 2, KV_HEADS, BLOCK_SIZE, D]
  const float* scales;      // [blocks, 2, KV_HEADS, BLOCK_SIZE] where Stored is int8
  const int* query_starts;  // [sequences]
  const int* query_lengths;
  const int* kv_lengths;
  const int* block_tables;  // [sequences, table_width]
  float* y;                 // [tokens, HEADS * D]
  int table_width;
  float scale;              // of q . k
};

// Eight stored numbers as eight of Type.
template <class Type> __device__ inline uint4 eight(const Type* from, const float*) { return *reinterpret_cast<const uint4*>(from); }
template <class Type> __device__ inline uint4 eight(const signed char* from, const float* scale) {
  const uint2 bytes = *reinterpret_cast<const uint2*>(from);
  const signed char* codes = reinterpret_cast<const signed char*>(&bytes);
  const float s = *scale;
  return make_uint4(pack<Type>(codes[0] * s, codes[1] * s), pack<Type>(codes[2] * s, codes[3] * s),
                    pack<Type>(codes[4] * s, codes[5] * s), pack<Type>(codes[6] * s, codes[7] * s));
}

template <class Type> __device__ inline uint4 eight(const float8* from, const float*) {
  using Numbers = Fp8Numbers<Type>;
  const uint2 bytes = *reinterpret_cast<const uint2*>(from);
  return make_uint4(Numbers::template pair<true>(bytes.x, 0), Numbers::template pair<true>(bytes.x, 1),
                    Numbers::template pair<true>(bytes.y, 0), Numbers::template pair<true>(bytes.y, 1));
}

template <class Type, class Stored, int HEADS, int KV_HEADS, int D, int BLOCK_SIZE, int WINDOW>
__global__ void __launch_bounds__(128) attention(const AttentionStep<Stored> p) {
  constexpr int GROUP = HEADS / KV_HEADS, ROWS = 64, KEYS = 32, STRIDE = D + 8, STEPS = D / 16, PIECES = D / 8;
  constexpr float LEAST = -1e30f, LOG2E = 1.4426950408889634f;
  static_assert(D % 16 == 0, "a step of the tensor core has 16 inputs");
  __shared__ __align__(16) Type keys[KEYS][STRIDE], values[KEYS][STRIDE];
  begin_kernel();
  const int sequence = blockIdx.z, kv_head = blockIdx.y, first_row = blockIdx.x * ROWS;
  const int length = p.query_lengths[sequence];
  if (first_row >= length * GROUP) return;
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  const int start = p.query_starts[sequence], past = p.kv_lengths[sequence] - length;
  const int* table = p.block_tables + (size_t)sequence * p.table_width;
  auto token_of = [&](int upper) { return (first_row + warp * 16 + g + upper * 8) / GROUP; };
  auto column_of = [&](int upper) { return (kv_head * GROUP + (first_row + warp * 16 + g + upper * 8) % GROUP) * D; };

  u32 a[STEPS][4];
#pragma unroll
  for (int upper = 0; upper < 2; upper++) {
    const float* row = p.q + (size_t)(start + min(token_of(upper), length - 1)) * HEADS * D + column_of(upper);
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      a[i][upper] = pack<Type>(row[i * 16 + 2 * t], row[i * 16 + 2 * t + 1]);
      a[i][2 + upper] = pack<Type>(row[i * 16 + 8 + 2 * t], row[i * 16 + 9 + 2 * t]);
    }
  }
  const int position[2] = {past + min(token_of(0), length - 1), past + min(token_of(1), length - 1)};
  const int end = past + min(length - 1, (first_row + ROWS - 1) / GROUP) + 1;
  const int begin = WINDOW > 0 ? max(0, past + first_row / GROUP - WINDOW + 1) / KEYS * KEYS : 0;
  float o[PIECES][4] = {}, high[2] = {LEAST, LEAST}, total[2] = {};

  for (int base = begin; base < end; base += KEYS) {
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * KEYS * PIECES; i += 128) {
      const int value = i / (KEYS * PIECES), row = i / PIECES % KEYS, piece = i % PIECES, key = base + row;
      uint4 numbers = make_uint4(0, 0, 0, 0);
      if (key < end) {
        const size_t at = (((size_t)table[key / BLOCK_SIZE] * 2 + value) * KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE;
        numbers = eight<Type>(p.cache + at * D + piece * 8, p.scales + at);
      }
      *reinterpret_cast<uint4*>(value ? &values[row][piece * 8] : &keys[row][piece * 8]) = numbers;
    }
    __syncthreads();
    float s[KEYS / 8][4] = {};
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int i = 0; i < STEPS; i++)
        multiply<Type>(s[n], a[i], *reinterpret_cast<const u32*>(&keys[n * 8 + g][i * 16 + 2 * t]),
                       *reinterpret_cast<const u32*>(&keys[n * 8 + g][i * 16 + 8 + 2 * t]));
    float new_high[2] = {high[0], high[1]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int key = base + n * 8 + 2 * t + j % 2, at = position[j / 2];
        const bool visible = key <= at && (WINDOW == 0 || key > at - WINDOW);
        s[n][j] = visible ? s[n][j] * (p.scale * LOG2E) : LEAST;
        new_high[j / 2] = fmaxf(new_high[j / 2], s[n][j]);
      }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      new_high[r] = fmaxf(new_high[r], __shfl_xor_sync(~0u, new_high[r], 1));
      new_high[r] = fmaxf(new_high[r], __shfl_xor_sync(~0u, new_high[r], 2));
      const float shrink = exp2f(high[r] - new_high[r]);
      high[r] = new_high[r];
      total[r] *= shrink;
#pragma unroll
      for (int n = 0; n < PIECES; n++) o[n][2 * r] *= shrink, o[n][2 * r + 1] *= shrink;
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        s[n][j] = exp2f(s[n][j] - high[j / 2]);
        total[j / 2] += s[n][j];
      }
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
      const u32 weights[4] = {pack<Type>(s[2 * k][0], s[2 * k][1]), pack<Type>(s[2 * k][2], s[2 * k][3]),
                              pack<Type>(s[2 * k + 1][0], s[2 * k + 1][1]), pack<Type>(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < PIECES; n += 2) {
        u32 v[4];
        const u32 from = shared_address(&values[k * 16 + lane % 16][(n + lane / 16) * 8]);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(from) : "memory");
        multiply<Type>(o[n], weights, v[0], v[1]);
        multiply<Type>(o[n + 1], weights, v[2], v[3]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    total[r] += __shfl_xor_sync(~0u, total[r], 1);
    total[r] += __shfl_xor_sync(~0u, total[r], 2);
    if (token_of(r) >= length) continue;
    float* to = p.y + (size_t)(start + token_of(r)) * HEADS * D + column_of(r);
#pragma unroll
    for (int n = 0; n < PIECES; n++) {
      to[n * 8 + 2 * t] = o[n][2 * r] / total[r];
      to[n * 8 + 2 * t + 1] = o[n][2 * r + 1] / total[r];
    }
  }
}

}  // namespace tw

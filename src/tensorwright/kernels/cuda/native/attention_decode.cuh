// Attention of one new token per sequence over the paged cache (flash decoding). Knows no weights.
//
// A block handles a chunk of the keys of one sequence for one kv head, with all query heads of that kv head at once as rows of
// the tensor core's A (rows beyond are zero): every key and value is read once, straight into registers in the order that
// the tensor core wants. Chunks are merged by the block that comes last. Unused cache rows must hold finite numbers.
#pragma once
#include "outputs.cuh"
#include "pipeline.cuh"

namespace tw {

#define LOWEST (-__int_as_float(0x7f800000))

// A running softmax over tiles of 16 keys, for up to 8 query heads of one kv head, in one warp. Scores are [head][key], so that
// the lane that has a head's weights for keys 2t, 2t + 1, 2t + 8, 2t + 9 has them where the second product's B wants them;
// sums are [dimension][head], with the dimensions that a lane's 16-byte loads give it as rows.
template <class Type> struct AttentionTile {
  uint4 k[2][4], v[4][2];
  float o[8][4] = {}, high = LOWEST, total = 0.f;

  __device__ static int dimension(int j, int upper, int g) { return j / 4 * 64 + g * 8 + j % 4 * 2 + upper; }

  __device__ void load(const Type* keys, const Type* values, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) k[n][i] = __ldcg(reinterpret_cast<const uint4*>(keys + (n * 8 + g) * 128 + i * 32 + t * 8));
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        v[i][h] = __ldcg(reinterpret_cast<const uint4*>(values + (2 * t + i % 2 + i / 2 * 8) * 128 + h * 64 + g * 8));
  }

  // Key and value number `at` of the tile (any number: not in this tile) come from shared memory.
  __device__ void replace(int at, const Type* key, const Type* value, int lane) {
    const int g = lane / 4, t = lane % 4;
    if (at < 0 || at >= 16) return;
#pragma unroll
    for (int n = 0; n < 2; n++)
      if (n * 8 + g == at)
#pragma unroll
        for (int i = 0; i < 4; i++) k[n][i] = *reinterpret_cast<const uint4*>(key + i * 32 + t * 8);
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (2 * t + i % 2 + i / 2 * 8 == at)
#pragma unroll
        for (int h = 0; h < 2; h++) v[i][h] = *reinterpret_cast<const uint4*>(value + h * 64 + g * 8);
  }

  // q: [ROWS][128] in shared memory. Keys from number `valid` on do not count.
  template <int ROWS> __device__ void multiply(const Type* q, int valid, float scale, int lane) {
    const int g = lane / 4, t = lane % 4;
    float s[2][4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint4 row = make_uint4(0, 0, 0, 0);
      if (g < ROWS) row = *reinterpret_cast<const uint4*>(q + g * 128 + i * 32 + t * 8);
      const u32 first[4] = {row.x, 0, row.y, 0}, second[4] = {row.z, 0, row.w, 0};
#pragma unroll
      for (int n = 0; n < 2; n++) {
        tw::multiply<Type>(s[n], first, k[n][i].x, k[n][i].y);
        tw::multiply<Type>(s[n], second, k[n][i].z, k[n][i].w);
      }
    }
    float new_high = high;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        s[n][i] = n * 8 + 2 * t + i < valid ? s[n][i] * scale : LOWEST;
        new_high = fmaxf(new_high, s[n][i]);
      }
    new_high = fmaxf(new_high, __shfl_xor_sync(~0u, new_high, 1));
    new_high = fmaxf(new_high, __shfl_xor_sync(~0u, new_high, 2));
    const float shrink = exp2f(high - new_high);
    high = new_high;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) s[n][i] = exp2f(s[n][i] - high);
    total = total * shrink + s[0][0] + s[0][1] + s[1][0] + s[1][1];
    const u32 p0 = tw::pack<Type>(s[0][0], s[0][1]), p1 = tw::pack<Type>(s[1][0], s[1][1]);
    const float shrink0 = __shfl_sync(~0u, shrink, 8 * t), shrink1 = __shfl_sync(~0u, shrink, 8 * t + 4);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      o[j][0] *= shrink0, o[j][1] *= shrink1, o[j][2] *= shrink0, o[j][3] *= shrink1;
      const int h = j / 4, w = j % 4;
      const u32 a[4] = {__byte_perm(word(v[0][h], w), word(v[1][h], w), 0x5410), __byte_perm(word(v[0][h], w), word(v[1][h], w), 0x7632),
                        __byte_perm(word(v[2][h], w), word(v[3][h], w), 0x5410), __byte_perm(word(v[2][h], w), word(v[3][h], w), 0x7632)};
      tw::multiply<Type>(o[j], a, p0, p1);
    }
  }

  __device__ void finish(int lane) {
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
  }
};

template <class Type> struct AttentionInput {
  const Type* q;            // [tokens, HEADS, 128]
  const Type* cache;        // [blocks, 2, KV_HEADS, BLOCK_SIZE, 128]
  const int* block_tables;  // [sequences, table_width]
  const int* lengths;       // [sequences], the new token counted
  Type* y;                  // Order of the output projection
  float* parts;             // [sequences, KV_HEADS, chunks, heads per kv head, 128 + 2]
  int* arrivals;            // [sequences, KV_HEADS], 0 between launches
  int table_width;
  float scale;              // of the logits, times log2(e)
};

// Grid: (most chunks, KV_HEADS, sequences). A chunk has at least MIN_CHUNK keys.
template <class Type, class Order, int HEADS, int KV_HEADS, int BLOCK_SIZE, int WARPS, int MIN_CHUNK>
__global__ void __launch_bounds__(WARPS * LANES) decode_attention(const AttentionInput<Type> input) {
  constexpr int ROWS = HEADS / KV_HEADS, TILE = 16, D = 128;
  static_assert(ROWS <= 8 && BLOCK_SIZE % TILE == 0 && MIN_CHUNK % (TILE * WARPS) == 0, "shapes");
  __shared__ float outputs[WARPS][ROWS][D], highest[WARPS][ROWS], totals[WARPS][ROWS];
  __shared__ __align__(16) Type q[ROWS * D];
  __shared__ int is_last;
  const int split = blockIdx.x, kv_head = blockIdx.y, sequence = blockIdx.z;
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  launch_next_kernel();
  const int length = input.lengths[sequence];
  const int even = (length + gridDim.x - 1) / gridDim.x, rounded = (even + TILE * WARPS - 1) / (TILE * WARPS) * (TILE * WARPS);
  const int chunk = max(MIN_CHUNK, rounded), chunks = (length + chunk - 1) / chunk;
  const int begin = split * chunk, end = min(length, begin + chunk);
  if (begin >= length) {
    wait_for_previous_kernel();
    return;
  }
  const int* table = input.block_tables + (size_t)sequence * input.table_width;
  auto row = [&](int key, int is_value) {
    const size_t block = (size_t)table[key / BLOCK_SIZE] * 2 + is_value;
    return input.cache + ((block * KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE) * D;
  };
#if TW_BULK_COPY
  // All keys but the newest were written in earlier steps.
  for (int i = threadIdx.x; i < (end - begin) * 4; i += WARPS * LANES)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(row(begin + i / 4, i / 2 % 2) + i % 2 * 64));
#endif
  wait_for_previous_kernel();

  for (int i = threadIdx.x; i < ROWS * D / 8; i += WARPS * LANES)
    reinterpret_cast<uint4*>(q)[i] = __ldcg(reinterpret_cast<const uint4*>(input.q + ((size_t)sequence * HEADS + kv_head * ROWS) * D) + i);
  __syncthreads();
  AttentionTile<Type> tile;
  for (int key = begin + warp * TILE; key < end; key += WARPS * TILE) {
    tile.load(row(key, 0), row(key, 1), lane);
    tile.template multiply<ROWS>(q, end - key, input.scale, lane);
  }
  tile.finish(lane);
  if (t == 0 && g < ROWS) highest[warp][g] = tile.high, totals[warp][g] = tile.total;
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (2 * t + i % 2 < ROWS) outputs[warp][2 * t + i % 2][tile.dimension(j, i / 2, g)] = tile.o[j][i];
  __syncthreads();

  const int d = threadIdx.x;
  const bool has_d = d < D;
  float* parts = input.parts + (size_t)(sequence * KV_HEADS + kv_head) * gridDim.x * ROWS * (D + 2);
#pragma unroll
  for (int head = 0; head < ROWS && has_d; head++) {
    float top = LOWEST, sum = 0.f, value = 0.f;
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, highest[w][head]);
    for (int w = 0; w < WARPS; w++) {
      const float weight = exp2f(highest[w][head] - top);
      sum += totals[w][head] * weight;
      value += outputs[w][head][d] * weight;
    }
    if (chunks == 1) {
      input.y[Order::index(sequence, (kv_head * ROWS + head) * D + d)] = from_float<Type>(value / sum);
    } else {
      float* part = parts + (split * ROWS + head) * (D + 2);
      __stcg(part + d, value);
      if (d == 0) __stcg(part + D, top), __stcg(part + D + 1, sum);
    }
  }
  if (chunks == 1) return;
  __threadfence();
  __syncthreads();
  int* arrivals = input.arrivals + sequence * KV_HEADS + kv_head;
  if (threadIdx.x == 0) {
    is_last = atomicAdd(arrivals, 1) == chunks - 1;
    if (is_last) *arrivals = 0;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
#pragma unroll
  for (int head = 0; head < ROWS && has_d; head++) {
    float top = LOWEST, sum = 0.f, value = 0.f;
    for (int i = 0; i < chunks; i++) top = fmaxf(top, __ldcg(parts + (i * ROWS + head) * (D + 2) + D));
    for (int i = 0; i < chunks; i++) {
      const float* part = parts + (i * ROWS + head) * (D + 2);
      const float weight = exp2f(__ldcg(part + D) - top);
      sum += __ldcg(part + D + 1) * weight;
      value += __ldcg(part + d) * weight;
    }
    input.y[Order::index(sequence, (kv_head * ROWS + head) * D + d)] = from_float<Type>(value / sum);
  }
}

}  // namespace tw

// Attention of one new token per sequence over the paged cache (flash decoding). Knows no weights.
//
// A block handles a chunk of the keys of one sequence for one kv head, with all query heads of that kv head at once. Each
// warp has every WARPS-th 16 keys in a ring of its own, and asks for the first of them before the kernel before has ended:
// all keys but the newest are of earlier steps. Warps are merged at the end, chunks by the block that comes last.
#pragma once
#include "attention_softmax.cuh"
#include "attention_tiles.cuh"
#include "outputs.cuh"

namespace tw {

template <class Type, class Stored> struct AttentionInput {
  const Type* q;            // [tokens, HEADS, 128]
  const Stored* cache;      // [blocks, 2, KV_HEADS, BLOCK_SIZE, 128]
  const int* block_tables;  // [sequences, table_width]
  const int* lengths;       // [sequences], the new token counted; 0: of padding
  Type* y;                  // Order of the output projection
  float* parts;             // [sequences, KV_HEADS, chunks, heads per kv head] rows of 128, then of 2
  int* arrivals;            // [sequences, KV_HEADS], 0 between launches
  int table_width, window;  // window 0: none
  float scale;              // of the logits, times log2(e)
};

// Eight numbers of the cache, past the first-level cache.
template <class Type> __device__ inline uint4 fresh_eight(const Type* from) { return __ldcg(reinterpret_cast<const uint4*>(from)); }
template <class Type> __device__ inline uint4 fresh_eight(const float8* from) {
  return eight<Type>(__ldcg(reinterpret_cast<const uint2*>(from)), 1.f, float8());
}

// Grid: (KV_HEADS, sequences, most chunks). A chunk has at least MIN_CHUNK keys. Shared memory: WARPS rings of SLOTS tiles.
// Stored: Type, or float8.
template <class Type, class Stored, class Order, int HEADS, int KV_HEADS, int BLOCK_SIZE, int WARPS, int SLOTS, int MIN_CHUNK>
__global__ void __launch_bounds__(WARPS * LANES) decode_attention(const __grid_constant__ AttentionInput<Type, Stored> input) {
  constexpr int ROWS = HEADS / KV_HEADS, TILE = 16, D = 128;
  using Ring = TileRing<Type, Stored, KV_HEADS, D, BLOCK_SIZE, TILE, SLOTS, LANES>;
  static_assert(ROWS <= 8 && BLOCK_SIZE % TILE == 0 && MIN_CHUNK % TILE == 0 && ROWS * D * 4 <= Ring::BYTES, "shapes");
  extern __shared__ __align__(128) char memory[];
  __shared__ __align__(16) Type queries[WARPS][ROWS][Ring::STRIDE];
  __shared__ float2 stats[WARPS][ROWS];
  __shared__ int is_last;
  const int kv_head = blockIdx.x, sequence = blockIdx.y, split = blockIdx.z, pair = sequence * KV_HEADS + kv_head;
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  launch_next_kernel();
  const int length = input.lengths[sequence], seen = input.window > 0 ? input.window : ENDLESS;
  const int first = max(0, length - seen) / TILE * TILE, keys = length - first;
  const int even = (keys + gridDim.z - 1) / gridDim.z, chunk = max(MIN_CHUNK, (even + TILE - 1) / TILE * TILE);
  const int chunks = (keys + chunk - 1) / chunk, begin = first + split * chunk, end = min(length, begin + chunk);
  if (begin >= length) {
    wait_for_previous_kernel();
    return;
  }
  const Stored* cache = input.cache + (size_t)kv_head * BLOCK_SIZE * D;
  const int* table = input.block_tables + (size_t)sequence * input.table_width;
  char* mine = memory + warp * Ring::BYTES;
  Ring ring(mine, {cache, nullptr, table, begin + warp * TILE, end, WARPS * TILE});
  wait_for_previous_kernel();

  // The newest key and value may have come too late for the ring: eight numbers a lane, keys in the lower half of the warp.
  const int newest = length - 1, newest_in = end == length ? (newest - begin) / TILE : -1;
  uint4 fresh;
  if (newest_in >= 0 && newest_in % WARPS == warp)
    fresh = fresh_eight<Type>(cache + (((size_t)table[newest / BLOCK_SIZE] * 2 + lane / 16) * KV_HEADS * BLOCK_SIZE + newest % BLOCK_SIZE) * D + lane % 16 * 8);
  const uint4* from = reinterpret_cast<const uint4*>(input.q + ((size_t)sequence * HEADS + kv_head * ROWS) * D);
  for (int i = lane; i < ROWS * D / 8; i += LANES)
    *reinterpret_cast<uint4*>(&queries[warp][i / (D / 8)][i % (D / 8) * 8]) = __ldcg(from + i);
  __syncwarp();
  u32 a[D / 16][4];  // rows beyond the last repeat the others
#pragma unroll
  for (int i = 0; i < D / 16; i++) load_matrices(a[i], &queries[warp][lane % 16 % ROWS][i * 16 + lane / 16 * 8]);

  RunningSoftmax<Type, D, 1, 2> sums;
  for (int tile = warp; begin + tile * TILE < end; tile += WARPS) {
    const int base = begin + tile * TILE, at = newest - base;
    Type* k = ring.take();
    if (tile == newest_in) {
      if (lane < 16) *reinterpret_cast<uint4*>(k + at * Ring::STRIDE + lane * 8) = fresh;
      __syncwarp();
    }
    sums.score(k, lane, [&](int, int i, u32(&fragment)[4]) {
#pragma unroll
      for (int j = 0; j < 4; j++) fragment[j] = a[i][j];
    });
    if (at < TILE - 1 || newest - base >= seen) sums.mask(base, seen, lane, [&](int, int) { return newest; });
    sums.weigh(input.scale);
    Type* v = ring.take();
    if (tile == newest_in) {
      if (lane >= 16) *reinterpret_cast<uint4*>(v + at * Ring::STRIDE + lane % 16 * 8) = fresh;
      __syncwarp();
    }
    sums.add(v, lane);
  }
  sums.finish();
  __syncwarp();
  float* outputs = reinterpret_cast<float*>(mine);  // [ROWS][D]
  if (g < ROWS) {
    if (t == 0) stats[warp][g] = make_float2(sums.high[0][0], sums.total[0][0]);
#pragma unroll
    for (int n = 0; n < D / 8; n++) write_two(outputs + g * D + n * 8 + 2 * t, sums.o[0][n][0], sums.o[0][n][1]);
  }
  __syncthreads();

  const size_t part = (size_t)pair * gridDim.z * ROWS, all_parts = (size_t)gridDim.y * KV_HEADS * gridDim.z * ROWS;
  float2* part_stats = reinterpret_cast<float2*>(input.parts + all_parts * D);
  // Four numbers of a row, of `count` warps or chunks.
  auto merge = [&](int row, int d, int count, auto its_stats, auto its_numbers, bool is_final) {
    float top = LEAST, total = 0.f;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
    for (int i = 0; i < count; i++) top = fmaxf(top, its_stats(i).x);
#pragma unroll 4
    for (int i = 0; i < count; i++) {
      const float2 two = its_stats(i);
      const float weight = exp2_fast((two.x - top) * input.scale);
      const float4 v = its_numbers(i);
      total += two.y * weight;
      sum.x += v.x * weight, sum.y += v.y * weight, sum.z += v.z * weight, sum.w += v.w * weight;
    }
    if (is_final) {
      const int k = (kv_head * ROWS + row) * D + d;
      write_two(input.y + Order::index(sequence, k), sum.x / total, sum.y / total);
      write_two(input.y + Order::index(sequence, k + 2), sum.z / total, sum.w / total);
    } else {
      __stcg(reinterpret_cast<float4*>(input.parts + (part + split * ROWS + row) * D + d), sum);
      if (d == 0) __stcg(part_stats + part + split * ROWS + row, make_float2(top, total));
    }
  };
  for (int i = threadIdx.x; i < ROWS * D / 4; i += WARPS * LANES) {
    const int row = i / (D / 4), d = i % (D / 4) * 4;
    merge(row, d, WARPS, [&](int w) { return stats[w][row]; }, [&](int w) { return read_four(reinterpret_cast<const float*>(memory + w * Ring::BYTES) + row * D + d); }, chunks == 1);
  }
  if (chunks == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(input.arrivals + pair, 1) == chunks - 1;
    if (is_last) input.arrivals[pair] = 0;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  for (int i = threadIdx.x; i < ROWS * D / 4; i += WARPS * LANES) {
    const int row = i / (D / 4), d = i % (D / 4) * 4;
    merge(row, d, chunks, [&](int c) { return __ldcg(part_stats + part + c * ROWS + row); },
          [&](int c) { return __ldcg(reinterpret_cast<const float4*>(input.parts + (part + c * ROWS + row) * D + d)); }, true);
  }
}

}  // namespace tw

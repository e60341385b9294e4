// Causal attention over the paged cache, for any mix of prompt chunks and single tokens in a step.
//
//   attention<Type, Stored, Input, Output, HEADS, KV_HEADS, D, BLOCK_SIZE, WINDOW, SLOTS>
//     Type: of the products, half or bfloat16 (half where Stored has 8 bits). Stored: of the cache: Type, signed char with
//     scales, or float8. Input and Output: of q and y, float, half or bfloat16. D: a multiple of 16 up to 256.
//   Threads: 128. Grid: any number of blocks, which share out the items. Shared memory: AttentionShape::SHARED_BYTES.
//
// Every key and value is read once for all query heads that share it: rows are pairs of a token and a query head.
// Wide tiles (128 rows, 64 where D > 128): each of four warps has a quarter of the rows and goes through all keys.
// Narrow tiles (16 rows): each warp has all rows and every fourth 16 keys; warps are merged at the end.
// Where a tile's keys are shared out, the block that comes last merges what the others left.
#pragma once
#include "attention_items.cuh"
#include "attention_softmax.cuh"
#include "attention_tiles.cuh"

namespace tw {

template <class Stored, class Input, class Output> struct AttentionStep {
  const Input* q;        // [tokens, HEADS * D]
  const Stored* cache;   // [blocks, 2, KV_HEADS, BLOCK_SIZE, D]
  const float* scales;   // [blocks, 2, KV_HEADS, BLOCK_SIZE] where Stored is int8
  const int* query_starts;  // [sequences]
  const int* query_lengths;
  const int* kv_lengths;
  const int* block_tables;  // [sequences, table_width]
  Output* y;             // [tokens, HEADS * D]
  float* parts;          // [PART_ROWS, D], then [PART_ROWS, 2]: sums, and each row's highest score and sum of weights
  int* arrivals;         // [GROUPS], 0 between launches
  int tokens, sequences, table_width;
  float scale;           // of q . k, times log2(e)
};

template <class Type_, class Stored_, class Input_, class Output_, int HEADS, int KV_HEADS_, int D_, int BLOCK_SIZE_, int WINDOW_, int SLOTS>
struct AttentionShape {
  using Type = Type_;
  using Stored = Stored_;
  using Input = Input_;
  using Output = Output_;
  static constexpr int KV_HEADS = KV_HEADS_, D = D_, BLOCK_SIZE = BLOCK_SIZE_, WINDOW = WINDOW_, THREADS = 128, WARPS = 4, GROUP = HEADS / KV_HEADS, WIDTH = HEADS * D;
  static constexpr int ROW_TILES = D <= 128 ? 2 : 1, ROWS = WARPS * 16 * ROW_TILES, KEYS = D <= 128 ? 64 : 32, STRIDE = D + 8;
  static constexpr int NARROW_ROWS = 16, SEEN = WINDOW > 0 ? WINDOW : ENDLESS;
  using Items = AttentionItems<GROUP, KV_HEADS, WINDOW, ROWS>;
  using Ring = TileRing<Type, Stored, KV_HEADS, D, BLOCK_SIZE, KEYS, SLOTS, THREADS>;
  static constexpr bool IS_COPIED = is_same<Type, Input>;  // q needs no conversion
  static constexpr int QUERY_BYTES = ROWS * STRIDE * 2, SHARED_BYTES = QUERY_BYTES + Ring::BYTES;
  using OneSlot = TileRing<Type, Stored, KV_HEADS, D, BLOCK_SIZE, 16, 2, LANES>;
  static constexpr int NARROW_BYTES = SHARED_BYTES / WARPS / 16 * 16, FITTING = 2 + (NARROW_BYTES - OneSlot::BYTES) / OneSlot::SLOT_BYTES;
  using NarrowRing = TileRing<Type, Stored, KV_HEADS, D, BLOCK_SIZE, 16, (FITTING < 8 ? FITTING : 8), LANES>;
  static_assert(D % 16 == 0 && FITTING >= 2 && WARPS * NARROW_ROWS * D * 4 <= SHARED_BYTES, "shapes");
};

template <class S> struct AttentionBlock {
  using Step = AttentionStep<typename S::Stored, typename S::Input, typename S::Output>;
  using Type = typename S::Type;
  const Step& p;
  const AttentionItem& item;
  char* memory;
  int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;

  __device__ int rows() const { return item.is_narrow ? S::NARROW_ROWS : S::ROWS; }
  __device__ int used_rows() const { return min(rows(), item.length * S::GROUP - item.tile * rows()); }
  __device__ int token(int row) const { return (item.tile * rows() + row) / S::GROUP; }
  __device__ int position(int row) const { return item.past + min(token(row), item.length - 1); }
  __device__ size_t column(int row) const {  // of q and y
    return (size_t)(item.start + token(row)) * S::WIDTH + (item.kv_head * S::GROUP + (item.tile * rows() + row) % S::GROUP) * S::D;
  }
  __device__ size_t part(int share) const {  // row of parts
    const int wide_row = S::Items::MOST_NARROW * S::NARROW_ROWS;
    return (item.is_narrow ? 0 : wide_row) + (size_t)(item.slot + share) * rows();
  }
  __device__ float* part_sums(size_t row) const { return p.parts + row * S::D; }
  __device__ float2* part_stats(size_t row) const { return reinterpret_cast<float2*>(p.parts + (size_t)S::Items::PART_ROWS * S::D) + row; }
  __device__ CachedKeys<typename S::Stored> keys(int first, int step) const {
    const size_t head = (size_t)item.kv_head * S::BLOCK_SIZE;
    return {p.cache + head * S::D, p.scales + head, p.block_tables + (size_t)item.sequence * p.table_width, first, item.end, step};
  }

  // A wide tile's rows of q as Type into shared memory; those beyond the last repeat it.
  __device__ void load_queries(Type* to) const {
    const int last = used_rows() - 1;
    if constexpr (S::IS_COPIED) {
#pragma unroll 2  // more would take registers
      for (int i = threadIdx.x; i < S::ROWS * S::D / 8; i += S::THREADS) {
        const int row = i / (S::D / 8), d = i % (S::D / 8) * 8;
        copy_16_bytes(to + row * S::STRIDE + d, p.q + column(min(row, last)) + d);
      }
      end_copies();
    } else {
#pragma unroll 8
      for (int i = threadIdx.x; i < S::ROWS * S::D / 4; i += S::THREADS) {
        const int row = i / (S::D / 4), d = i % (S::D / 4) * 4;
        write_four(to + row * S::STRIDE + d, read_four(p.q + column(min(row, last)) + d));
      }
    }
  }
  __device__ bool needs_mask(int base, int keys, int first, int last) const {
    return base + keys - 1 > first || (S::WINDOW > 0 && base <= last - S::WINDOW);
  }

  __device__ void run_wide() {
    Type* queries = reinterpret_cast<Type*>(memory);
    if (S::IS_COPIED) load_queries(queries);  // they are on their way, and come before the first tile
    typename S::Ring ring(memory + S::QUERY_BYTES, keys(item.begin, S::KEYS));
    if (!S::IS_COPIED) load_queries(queries);
    RunningSoftmax<Type, S::D, S::ROW_TILES, S::KEYS / 8> sums;
    const int first_row = warp * 16 * S::ROW_TILES, g = lane / 4, t = lane % 4;
    const int first = position(first_row), last = position(first_row + 16 * S::ROW_TILES - 1);
    const Type* my_queries = queries + (first_row + lane % 16) * S::STRIDE + lane / 16 * 8;
    for (int base = item.begin; base < item.end; base += S::KEYS) {
      sums.score(ring.take(), lane, [&](int m, int i, u32(&a)[4]) { load_matrices(a, my_queries + m * 16 * S::STRIDE + i * 16); });
      if (needs_mask(base, S::KEYS, first, last))
        sums.mask(base, S::SEEN, lane, [&](int m, int upper) { return position(first_row + m * 16 + upper * 8 + g); });
      sums.weigh(p.scale);
      sums.add(ring.take(), lane);
    }
    sums.finish();
    const int used = used_rows();
#pragma unroll
    for (int m = 0; m < S::ROW_TILES; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int row = first_row + m * 16 + r * 8 + g;
        if (row >= used) continue;
        if (item.shares == 1) {
          typename S::Output* to = p.y + column(row) + 2 * t;
          const float inverse = 1.f / sums.total[m][r];
#pragma unroll
          for (int n = 0; n < S::D / 8; n++) write_two(to + n * 8, sums.o[m][n][2 * r] * inverse, sums.o[m][n][2 * r + 1] * inverse);
        } else {
          const size_t at = part(item.share) + row;
#pragma unroll
          for (int n = 0; n < S::D / 8; n++)
            __stcg(reinterpret_cast<float2*>(part_sums(at) + n * 8 + 2 * t), make_float2(sums.o[m][n][2 * r], sums.o[m][n][2 * r + 1]));
          if (t == 0) __stcg(part_stats(at), make_float2(sums.high[m][r], sums.total[m][r]));
        }
      }
  }

  __device__ void run_narrow(float2 (*stats)[S::NARROW_ROWS]) {
    typename S::NarrowRing ring(memory + warp * S::NARROW_BYTES, keys(item.begin + warp * 16, 16 * S::WARPS));
    RunningSoftmax<Type, S::D, 1, 2> sums;
    const int g = lane / 4, t = lane % 4, used = used_rows();
    u32 queries[S::D / 16][4];
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      const typename S::Input* from = p.q + column(min(g + upper * 8, used - 1)) + 2 * t;
#pragma unroll
      for (int i = 0; i < S::D / 16; i++) {
        const float2 first = read_two(from + i * 16), second = read_two(from + i * 16 + 8);
        queries[i][upper] = pack<Type>(first.x, first.y), queries[i][2 + upper] = pack<Type>(second.x, second.y);
      }
    }
    for (int base = item.begin + warp * 16; base < item.end; base += 16 * S::WARPS) {
      sums.score(ring.take(), lane, [&](int, int i, u32(&a)[4]) {
#pragma unroll
        for (int j = 0; j < 4; j++) a[j] = queries[i][j];
      });
      if (needs_mask(base, 16, position(0), position(used - 1)))
        sums.mask(base, S::SEEN, lane, [&](int, int upper) { return position(g + upper * 8); });
      sums.weigh(p.scale);
      sums.add(ring.take(), lane);
    }
    sums.finish();
    __syncthreads();
    float* outputs = reinterpret_cast<float*>(memory);  // [WARPS][NARROW_ROWS][D]
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = g + r * 8;
      if (t == 0) stats[warp][row] = make_float2(sums.high[0][r], sums.total[0][r]);
      if (row < used)
#pragma unroll
        for (int n = 0; n < S::D / 8; n++) write_two(outputs + (warp * S::NARROW_ROWS + row) * S::D + n * 8 + 2 * t, sums.o[0][n][2 * r], sums.o[0][n][2 * r + 1]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < used * S::D / 4; i += S::THREADS) {
      const int row = i / (S::D / 4), d = i % (S::D / 4) * 4;
      merge(row, d, S::WARPS, [&](int w) { return stats[w][row]; }, [&](int w) { return read_four(outputs + (w * S::NARROW_ROWS + row) * S::D + d); },
            item.shares == 1);
    }
  }

  // Sums of four numbers of a row by `count` warps or shares: into y, or into this share's partial results.
  template <class Stats, class Four> __device__ void merge(int row, int d, int count, Stats stats, Four four, bool is_final) {
    float top = LEAST, total = 0.f;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
    for (int i = 0; i < count; i++) top = fmaxf(top, stats(i).x);
#pragma unroll 4
    for (int i = 0; i < count; i++) {
      const float2 its = stats(i);
      const float weight = exp2_fast((its.x - top) * p.scale);
      const float4 v = four(i);
      total += its.y * weight;
      sum.x += v.x * weight, sum.y += v.y * weight, sum.z += v.z * weight, sum.w += v.w * weight;
    }
    if (is_final) {
      const float inverse = 1.f / total;
      write_four(p.y + column(row) + d, make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse));
    } else {
      const size_t at = part(item.share) + row;
      __stcg(reinterpret_cast<float4*>(part_sums(at) + d), sum);
      if (d == 0) __stcg(part_stats(at), make_float2(top, total));
    }
  }

  // After all shares of the tile have left their results: the last block merges them.
  __device__ void merge_shares(int* is_last) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      int* arrivals = p.arrivals + (item.is_narrow ? 0 : S::Items::MOST_NARROW / 2) + item.group;
      *is_last = atomicAdd(arrivals, 1) == item.shares - 1;
      if (*is_last) *arrivals = 0;
      __threadfence();
    }
    __syncthreads();
    if (!*is_last) return;
    for (int i = threadIdx.x; i < used_rows() * S::D / 4; i += S::THREADS) {
      const int row = i / (S::D / 4), d = i % (S::D / 4) * 4;
      merge(row, d, item.shares, [&](int share) { return __ldcg(part_stats(part(share) + row)); },
            [&](int share) { return __ldcg(reinterpret_cast<const float4*>(part_sums(part(share) + row) + d)); }, true);
    }
  }
};

template <class Type, class Stored, class Input, class Output, int HEADS, int KV_HEADS, int D, int BLOCK_SIZE, int WINDOW, int SLOTS>
__global__ void __launch_bounds__(128) attention(const __grid_constant__ AttentionStep<Stored, Input, Output> p) {
  using S = AttentionShape<Type, Stored, Input, Output, HEADS, KV_HEADS, D, BLOCK_SIZE, WINDOW, SLOTS>;
  extern __shared__ __align__(128) char memory[];
  __shared__ float2 stats[S::WARPS][S::NARROW_ROWS];
  __shared__ AttentionItem item;  // not in registers, of which there are just enough
  __shared__ int is_last;
  begin_kernel();
  const AttentionLengths lengths{p.query_starts, p.query_lengths, p.kv_lengths, p.sequences, p.tokens};
  const typename S::Items items(lengths);
  for (int number = blockIdx.x;; number += gridDim.x) {
    AttentionItem found;
    if (!items.find(lengths, number, found)) return;
    if (found.begin >= found.end) continue;
    if (threadIdx.x == 0) item = found;
    __syncthreads();
    AttentionBlock<S> block{p, item, memory};
    if (item.is_narrow) block.run_narrow(stats);
    else block.run_wide();
    if (item.shares > 1) block.merge_shares(&is_last);
    __syncthreads();
  }
}

}  // namespace tw

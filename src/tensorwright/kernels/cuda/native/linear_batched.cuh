// A linear for 8 to 64 tokens. Knows no epilogue; one thread block per multiprocessor.
//
// A block step multiplies 128 * ROW_TILES rows (eight warps) by 128 inputs of all tokens. The steps of all row blocks, inputs
// innermost, are one line that is cut into equal lengths, one for each thread block (stream-K), so that every
// multiprocessor reads the same number of bytes. A row block whose inputs were cut is summed by the thread block that comes
// last, in the order of the inputs: the result does not depend on who is last.
// Each warp reads its own weights into its own ring; a ninth warp copies the chunks of x, which the others share.
#pragma once
#include "linear_small.cuh"

namespace tw {

struct SplitSums {
  float4* parts;   // [2 * blocks][8 warps][ROW_TILES][TOKENS / 8][32 lanes]
  int* arrivals;   // [row blocks], 0 between launches
};

template <class Weights, int TOKENS, int ROW_TILES, int STAGES, int X_STAGES> struct BatchedShape {
  static constexpr int WARPS = 8;
  static constexpr int THREADS = (WARPS + 1) * LANES;
  static constexpr int STAGE_BYTES = ROW_TILES * Weights::BYTES;
  static constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
  static constexpr int CHUNK_BYTES = UNIT_INPUTS * TOKENS * 2;
  static constexpr int SHARED_BYTES = RING_BYTES + X_STAGES * CHUNK_BYTES;
};

__device__ inline void sync_multiplying_warps() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

template <class Weights, int ROWS, int K, int TOKENS, int ROW_TILES, int STAGES, int X_STAGES, int PARTIALS, int BLOCKS, class Output>
__global__ void __launch_bounds__(288, BLOCKS)
batched_linear(const LinearInput<typename Weights::Number> input, const Output output, const SplitSums split) {
  using Shape = BatchedShape<Weights, TOKENS, ROW_TILES, STAGES, X_STAGES>;
  constexpr int WARPS = Shape::WARPS, GROUPS = K / UNIT_INPUTS, TOKEN_TILES = TOKENS / 8;
  constexpr int STEPS = ROWS / (WARPS * ROW_TILES * UNIT_ROWS) * GROUPS;
  static_assert(ROWS % (WARPS * ROW_TILES * UNIT_ROWS) == 0 && K % UNIT_INPUTS == 0 && TOKENS % 8 == 0, "shapes");
  extern __shared__ __align__(128) char memory[];
  __shared__ u64 filled[WARPS][STAGES], x_filled[X_STAGES], x_emptied[X_STAGES], norm_ready;
  __shared__ float inverse_rms[TOKENS], warp_squares[WARPS][TOKENS];
  __shared__ int is_last;
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  char* chunks = memory + Shape::RING_BYTES;
  const int blocks = gridDim.x;
  const int begin = (int)((long long)STEPS * blockIdx.x / blocks), end = (int)((long long)STEPS * (blockIdx.x + 1) / blocks);

  if (threadIdx.x == 0) {
    for (int w = 0; w < WARPS; w++)
      for (int s = 0; s < STAGES; s++) barrier_init(&filled[w][s], ROW_TILES * (TW_BULK_COPY ? 1 : LANES));
    for (int s = 0; s < X_STAGES; s++) {
      barrier_init_for_copy(&x_filled[s]);
      barrier_init(&x_emptied[s], WARPS);
    }
    barrier_init(&norm_ready, LANES);
    barriers_ready();
  }
  __syncthreads();
  launch_next_kernel();

  if (warp == WARPS) {
    wait_for_previous_kernel();
    const char* x = reinterpret_cast<const char*>(input.x);
    RingPosition<X_STAGES> at;
    for (int step = begin; step < end; step++) {
      if (step - begin >= X_STAGES) barrier_wait(&x_emptied[at.stage], at.parity ^ 1);
      copy_async<false>(chunks + at.stage * Shape::CHUNK_BYTES, x + step % GROUPS * Shape::CHUNK_BYTES, Shape::CHUNK_BYTES,
                        &x_filled[at.stage], lane, 0);
      at.advance();
      if (PARTIALS && step - begin == min(X_STAGES, end - begin) - 1) {
        for (int token = lane; token < TOKENS; token += LANES) {
          float total = 0.f;
#pragma unroll 8
          for (int i = 0; i < PARTIALS; i++) total += __ldcg(&input.square_sums[i * TOKENS + token]);
          inverse_rms[token] = rsqrtf(total / K + input.epsilon);
        }
        barrier_arrive(&norm_ready);
      }
    }
    return;
  }

  char* ring = memory + warp * STAGES * Shape::STAGE_BYTES;
  const u64 policy = evict_first_policy();
  int next_group = begin % GROUPS, to_copy = end - begin;
  const char* next = input.weights + ((size_t)(begin / GROUPS * WARPS + warp) * ROW_TILES * GROUPS + next_group) * Weights::BYTES;
  auto fill = [&](int stage) {
    if (to_copy == 0) return;
    to_copy--;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
      copy_async<true>(ring + stage * Shape::STAGE_BYTES + r * Weights::BYTES, next + (size_t)r * GROUPS * Weights::BYTES,
                       Weights::BYTES, &filled[warp][stage], lane, policy);
    next += Weights::BYTES;
    if (++next_group == GROUPS) {
      next_group = 0;
      next += (size_t)(WARPS * ROW_TILES - 1) * GROUPS * Weights::BYTES;
    }
  };
  for (int stage = 0; stage < STAGES; stage++) fill(stage);
  wait_for_previous_kernel();

  // Rows of this warp in a row block for the eight tokens of tile n: their sums, finished.
  auto finish = [&](int row_block, int n, const float (&sums)[ROW_TILES][4]) {
    if (PARTIALS) barrier_wait(&norm_ready, 0);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int token = n * 8 + 2 * t + i;
      const float scale = PARTIALS ? inverse_rms[token] : 1.f;
      float squares = 0.f;
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++) {
        const int tile = (row_block * WARPS + warp) * ROW_TILES + r;
        float lower = sums[r][i] * scale, upper = sums[r][2 + i] * scale;
        if (Weights::ROW_SCALES) {
          lower *= to_float(input.row_scales[tile * UNIT_ROWS + g]);
          upper *= to_float(input.row_scales[tile * UNIT_ROWS + g + 8]);
        }
        squares += output.store(tile, g, token, lower, upper);
      }
      if constexpr (Output::SQUARES) {
        for (int o = 4; o < LANES; o *= 2) squares += __shfl_xor_sync(~0u, squares, o);
        if (g == 0) warp_squares[warp][token] = squares;
      }
    }
  };
  auto write_squares = [&](int row_block) {
    if constexpr (Output::SQUARES) {
      sync_multiplying_warps();
      for (int token = threadIdx.x; token < TOKENS; token += WARPS * LANES) {
        float total = 0.f;
        for (int w = 0; w < WARPS; w++) total += warp_squares[w][token];
        output.square_sums[row_block * TOKENS + token] = total;
      }
      sync_multiplying_warps();
    }
  };
  constexpr int PART = WARPS * ROW_TILES * TOKEN_TILES * LANES;
  float4* my_parts = split.parts + (warp * ROW_TILES * TOKEN_TILES) * LANES + lane;
  auto owner = [&](int step) { return (int)(((long long)(step + 1) * blocks - 1) / STEPS); };  // the block that has a step

  RingPosition<STAGES> at;
  RingPosition<X_STAGES> x_at;
  for (int step = begin; step < end;) {
    const int row_block = step / GROUPS, block_end = min(end, (row_block + 1) * GROUPS);
    const bool is_whole = step == row_block * GROUPS && block_end == (row_block + 1) * GROUPS;
    float sums[ROW_TILES][TOKEN_TILES][4] = {};
    for (; step < block_end; step++) {
      barrier_wait(&filled[warp][at.stage], at.parity);
      barrier_wait(&x_filled[x_at.stage], x_at.parity);
      multiply_unit<Weights, ROW_TILES, TOKEN_TILES, 512, 2048>(ring + at.stage * Shape::STAGE_BYTES, Weights::BYTES,
                                                               chunks + x_at.stage * Shape::CHUNK_BYTES + lane * 16, lane, sums);
      __syncwarp();
      if (lane == 0) barrier_arrive(&x_emptied[x_at.stage]);
      fill(at.stage);
      at.advance();
      x_at.advance();
    }
    if (!is_whole) {
      const int row_begin = row_block * GROUPS, first = owner(row_begin), last = owner(row_begin + GROUPS - 1);
      float4* part = my_parts + (size_t)(2 * blockIdx.x + (begin < row_begin)) * PART;
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++)
          __stcg(part + (r * TOKEN_TILES + n) * LANES, make_float4(sums[r][n][0], sums[r][n][1], sums[r][n][2], sums[r][n][3]));
      __threadfence();
      sync_multiplying_warps();
      if (threadIdx.x == 0) {
        is_last = atomicAdd(split.arrivals + row_block, 1) == last - first;
        if (is_last) split.arrivals[row_block] = 0;
        __threadfence();
      }
      sync_multiplying_warps();
      if (!is_last) continue;
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) sums[r][n][i] = 0.f;
      for (int b = first; b <= last; b++) {
        const bool starts_before = (int)((long long)STEPS * b / blocks) < row_begin;
        const float4* from = my_parts + (size_t)(2 * b + starts_before) * PART;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
          for (int n = 0; n < TOKEN_TILES; n++) {
            const float4 v = __ldcg(from + (r * TOKEN_TILES + n) * LANES);
            sums[r][n][0] += v.x, sums[r][n][1] += v.y, sums[r][n][2] += v.z, sums[r][n][3] += v.w;
          }
      }
    }
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
      float tile[ROW_TILES][4];
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) tile[r][i] = sums[r][n][i];
      finish(row_block, n, tile);
    }
    write_squares(row_block);
  }
}

}  // namespace tw

// A linear for 8 to 64 tokens on sm_90a. Knows no epilogue; one thread block per multiprocessor.
//
// A thread block has WARPGROUPS multiplying warpgroups (wgmma_tile.cuh) and one that copies. A step is UNITS * 128 inputs of
// WARPGROUPS * TILES * 64 rows (a row block) and all tokens: one stage of the ring. The steps of all row blocks, inputs
// innermost, are one line that is cut into equal lengths, one for each thread block (stream-K); a row block whose inputs were
// cut is summed by the thread block that comes last, in the order of the inputs.
#pragma once
#include "linear_batched.cuh"
#include "outputs_wgmma.cuh"
#include "wgmma_tile.cuh"

namespace tw {

template <int REGISTERS> __device__ inline void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS> __device__ inline void leave_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }

__device__ inline void expect_bytes(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ inline void copy_bulk(void* to, const void* from, u32 bytes, u64* barrier, u64 policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy) : "memory");
}
__device__ inline void copy_bulk(void* to, const void* from, u32 bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
// What the block wrote before its barrier is visible to whoever sees this sum, and the reverse.
__device__ inline int add_acquire_release(int* at, int value) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(at), "r"(value) : "memory");
  return old;
}

// One kernel's shared memory and threads.
template <class Weights, int N, int WARPGROUPS, int TILES, int UNITS, int STAGES> struct WgmmaShape {
  static constexpr int WARPS = 4 * WARPGROUPS;  // that multiply
  static constexpr int ROW_TILES = WARPS * TILES;
  static constexpr int THREADS = (WARPGROUPS + 1) * 128;
  static constexpr int PIECE_BYTES = UNITS * Weights::BYTES;  // of a row tile
  static constexpr int CHUNK_BYTES = N * UNIT_INPUTS * 2;     // of tokens
  static constexpr int WEIGHT_BYTES = ROW_TILES * PIECE_BYTES;
  static constexpr int STAGE_BYTES = WEIGHT_BYTES + UNITS * CHUNK_BYTES;
  // Registers of a thread at launch, and what the multiplying warps may take when the copying ones leave theirs.
  static constexpr int AT_LAUNCH = 65536 / THREADS / 8 * 8;
  static constexpr int COPYING = 56, MOST = (AT_LAUNCH * (WARPGROUPS + 1) - COPYING) / WARPGROUPS / 8 * 8;
  static constexpr int MULTIPLYING = MOST < 240 ? MOST : 240;
};

template <class Weights, int ROWS, int K, int N, int WARPGROUPS, int TILES, int UNITS, int STAGES, int PARTIALS, class Output>
__global__ void __launch_bounds__((WARPGROUPS + 1) * 128, 1)
wgmma_linear(const LinearInput<typename Weights::Number> input, const Output output, const SplitSums split) {
  using Shape = WgmmaShape<Weights, N, WARPGROUPS, TILES, UNITS, STAGES>;
  constexpr int WARPS = Shape::WARPS, STEPS = K / UNIT_INPUTS / UNITS, ROW_BLOCKS = ROWS / UNIT_ROWS / Shape::ROW_TILES;
  static_assert(ROW_BLOCKS * Shape::ROW_TILES * UNIT_ROWS == ROWS && STEPS * UNITS * UNIT_INPUTS == K, "shapes");
  extern __shared__ __align__(1024) char memory[];
  __shared__ u64 filled[STAGES], emptied[STAGES], norm_ready;
  __shared__ float inverse_rms[N], warp_squares[Output::SQUARES ? WARPS : 1][N];
  __shared__ int is_last;
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  const int block = blockIdx.x, blocks = gridDim.x;
  constexpr int TOTAL = ROW_BLOCKS * STEPS;
  const int begin = (int)((long long)TOTAL * block / blocks), end = (int)((long long)TOTAL * (block + 1) / blocks);

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(&filled[s], 1);
      barrier_init(&emptied[s], WARPS);
    }
    barrier_init(&norm_ready, 1);
    barriers_ready();
  }
  __syncthreads();
  launch_next_kernel();

  if (warp >= WARPS) {
    leave_registers<Shape::COPYING>();
    // Issuing a copy takes some 60 cycles of a warp, so each of the four copies a quarter of the row tiles.
    const int copier = warp - WARPS;
    const u64 policy = evict_first_policy();
    auto copy_weights = [&](int step, int stage) {
      if (copier == 0 && lane == 0) expect_bytes(&filled[stage], Shape::STAGE_BYTES);
      if (lane >= Shape::ROW_TILES / 4) return;
      const int i = copier * (Shape::ROW_TILES / 4) + lane;
      const size_t tile = (size_t)(step / STEPS) * Shape::ROW_TILES + i;
      copy_bulk(memory + stage * Shape::STAGE_BYTES + i * Shape::PIECE_BYTES,
                input.weights + (tile * (K / UNIT_INPUTS) + step % STEPS * UNITS) * Weights::BYTES, Shape::PIECE_BYTES, &filled[stage], policy);
    };
    // Weights do not depend on the previous kernel: the ring is filled with them before the wait.
    for (int i = 0; i < min(STAGES, end - begin); i++) copy_weights(begin + i, i);
    wait_for_previous_kernel();
    if (PARTIALS && copier == 3) {
      for (int token = lane; token < N; token += LANES) {
        float sum = 0.f;
#pragma unroll 10
        for (int i = 0; i < PARTIALS; i++) sum += __ldcg(&input.square_sums[i * N + token]);
        inverse_rms[token] = rsqrtf(sum / K + input.epsilon);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(&norm_ready);
    }
    RingPosition<STAGES> at;
    for (int step = begin; step < end; step++) {
      if (step - begin >= STAGES) {
        barrier_wait(&emptied[at.stage], at.parity ^ 1);
        copy_weights(step, at.stage);
      }
      if (copier == 0 && lane == 0)
        copy_bulk(memory + at.stage * Shape::STAGE_BYTES + Shape::WEIGHT_BYTES,
                  reinterpret_cast<const char*>(input.x) + (size_t)(step % STEPS) * UNITS * Shape::CHUNK_BYTES, UNITS * Shape::CHUNK_BYTES,
                  &filled[at.stage]);
      at.advance();
    }
    return;
  }

  take_registers<Shape::MULTIPLYING>();
  auto sync_multiplying = [] { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * LANES) : "memory"); };
  auto release = [&](int stage) {
    __syncwarp();
    if (lane == 0) barrier_arrive(&emptied[stage]);
  };
  constexpr int FRAGMENTS = TILES * N / 8, PART = WARPS * FRAGMENTS * LANES;
  float4* my_parts = split.parts + warp * FRAGMENTS * LANES + lane;
  auto owner = [&](int step) { return (int)(((long long)(step + 1) * blocks - 1) / TOTAL); };  // the block that has a step
  wait_for_previous_kernel();
  RingPosition<STAGES> at;
  WgmmaTile<Weights, N, TILES> tile;
  for (int step = begin; step < end;) {
    const int row_block = step / STEPS, row_begin = row_block * STEPS, piece_end = min(end, row_begin + STEPS);
    const bool is_whole = step == row_begin && piece_end == row_begin + STEPS;
    tile.begin();
    int to_release = -1;
    for (; step < piece_end; step++) {
      barrier_wait(&filled[at.stage], at.parity);
      const char* stage = memory + at.stage * Shape::STAGE_BYTES;
      tile.template multiply<UNITS>(stage + warp * TILES * Shape::PIECE_BYTES, stage + Shape::WEIGHT_BYTES, lane,
                                    [&] { if (to_release >= 0) release(to_release); });
      to_release = at.stage;
      at.advance();
    }
    tile.finish();
    release(to_release);

    const int row_tile = row_block * Shape::ROW_TILES + warp * TILES;
    // Eight tokens of the warp's rows at a time, in batches whose loads are all under way before the first store; where
    // one batch is all, it is loaded while the other blocks' sums come.
    constexpr int BATCH = N / 8 < 4 ? N / 8 : 4;
    typename Output::Loaded loaded[BATCH][TILES];
    auto load_batch = [&](int n0) {
#pragma unroll
      for (int n = 0; n < BATCH; n++) output.template load<TILES>(row_tile, g, t, (n0 + n) * 8, loaded[n]);
    };
    if (BATCH == N / 8) load_batch(0);
    if (!is_whole) {
      const int first = owner(row_begin), last = owner(row_begin + STEPS - 1);
      float4* part = my_parts + (size_t)(2 * block + (begin < row_begin)) * PART;  // a block has at most one end and one beginning
#pragma unroll
      for (int r = 0; r < TILES; r++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
          __stcg(part + (r * (N / 8) + n) * LANES, make_float4(tile.sums[r][4 * n], tile.sums[r][4 * n + 1], tile.sums[r][4 * n + 2], tile.sums[r][4 * n + 3]));
      sync_multiplying();
      if (threadIdx.x == 0) {
        int* arrivals = split.arrivals + row_block;
        is_last = add_acquire_release(arrivals, 1) == last - first;
        if (is_last) *arrivals = 0;
      }
      sync_multiplying();
      if (!is_last) continue;
      tile.begin();
      for (int b = first; b <= last; b++) {
        const bool starts_before = (int)((long long)TOTAL * b / blocks) < row_begin;
        const float4* from = my_parts + (size_t)(2 * b + starts_before) * PART;
#pragma unroll
        for (int r = 0; r < TILES; r++)
#pragma unroll
          for (int n = 0; n < N / 8; n++) {
            const float4 v = __ldcg(from + (r * (N / 8) + n) * LANES);
            tile.sums[r][4 * n] += v.x, tile.sums[r][4 * n + 1] += v.y, tile.sums[r][4 * n + 2] += v.z, tile.sums[r][4 * n + 3] += v.w;
          }
      }
    }

    if (PARTIALS) barrier_wait(&norm_ready, 0);
#pragma unroll
    for (int n0 = 0; n0 < N / 8; n0 += BATCH) {
      if (BATCH < N / 8) load_batch(n0);
#pragma unroll
      for (int n = 0; n < BATCH; n++) {
        const int token = (n0 + n) * 8 + 2 * t;
        const float scale[2] = {PARTIALS ? inverse_rms[token] : 1.f, PARTIALS ? inverse_rms[token + 1] : 1.f};
        float values[TILES][4], squares[2] = {};
#pragma unroll
        for (int r = 0; r < TILES; r++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            values[r][i] = tile.sums[r][4 * (n0 + n) + i] * scale[i % 2];
            if (Weights::ROW_SCALES) values[r][i] *= to_float(input.row_scales[(row_tile + r) * UNIT_ROWS + g + i / 2 * 8]);
          }
        output.template store<TILES>(row_tile, g, t, (n0 + n) * 8, values, loaded[n], squares);
        if constexpr (Output::SQUARES) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            for (int o = 4; o < LANES; o *= 2) squares[i] += __shfl_xor_sync(~0u, squares[i], o);
            if (g == 0) warp_squares[warp][token + i] = squares[i];
          }
        }
      }
    }
    if constexpr (Output::SQUARES) {
      sync_multiplying();
      for (int token = threadIdx.x; token < N; token += WARPS * LANES) {
        float sum = 0.f;
        for (int w = 0; w < WARPS; w++) sum += warp_squares[w][token];
        output.square_sums[row_block * N + token] = sum;
      }
      sync_multiplying();  // warp_squares is free again
    }
  }
}

}  // namespace tw

// A linear for 1 to 8 tokens: bound by reading weights. Knows no epilogue; one thread block per multiprocessor.
//
// A block owns neighbouring row tiles. Its warps share the inputs: warp w multiplies its eighth of K for every tile, from a
// ring of stages of its own, so that no warp waits for another before the sums are added up in shared memory. The ring is
// filled before the previous kernel ends: weights do not depend on it.
#pragma once
#include "outputs.cuh"
#include "weights.cuh"

namespace tw {

template <class Type> struct LinearInput {
  const char* weights;       // units [ROWS / 16][K / 128]
  const Type* x;             // input order, [K / 128][..]
  const float* square_sums;  // [PARTIALS, tokens] of the RMSNorm's input
  const Type* row_scales;    // [ROWS] or null
  float epsilon;
};

template <class Weights, int ROWS, int K, int TOKENS, int WARPS, int STAGES, int STAGE_UNITS> struct SmallShape {
  static constexpr int GROUPS = Weights::HAS_SCALES ? QUARTERS / Weights::GROUP_QUARTERS : 1;  // scales of a row in a unit
  static constexpr int MAX_UNITS = (K / UNIT_INPUTS + WARPS - 1) / WARPS;
  static constexpr int PASS_TILES = ROWS / UNIT_ROWS <= 512 ? 4 : 16;  // row tiles between two sums over the warps
  static constexpr int STAGE_BYTES = STAGE_UNITS * Weights::BYTES;
  static constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
  static constexpr int X_BYTES = K * TOKENS * 2;
  static constexpr int SUM_BYTES = PASS_TILES * WARPS * TOKENS * UNIT_ROWS * 4;
  static constexpr int BIAS_BYTES = Weights::RAW_BIAS != 0.f ? WARPS * MAX_UNITS * QUARTERS * 8 * 4 : 0;
  static constexpr int SHARED_BYTES = RING_BYTES + X_BYTES + SUM_BYTES + BIAS_BYTES;
};

// PARTIALS > 0: the input is normed, with that many partial sums of squares.
template <class Weights, int ROWS, int K, int TOKENS, int WARPS, int STAGES, int STAGE_UNITS, int PARTIALS, class Output>
__global__ void __launch_bounds__(WARPS * LANES, 1) small_linear(const LinearInput<typename Weights::Number> input, const Output output) {
  using Shape = SmallShape<Weights, ROWS, K, TOKENS, WARPS, STAGES, STAGE_UNITS>;
  constexpr int GROUPS = K / UNIT_INPUTS, TILES = ROWS / UNIT_ROWS;
  static_assert(GROUPS % (WARPS * STAGE_UNITS) == 0 || STAGE_UNITS == 1, "a stage may not cross a warp's inputs");
  extern __shared__ __align__(128) char memory[];
  __shared__ u64 filled[WARPS][STAGES];
  __shared__ float inverse_rms[TOKENS];
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  char* ring = memory + warp * STAGES * Shape::STAGE_BYTES;
  char* x = memory + Shape::RING_BYTES;
  float* sums = reinterpret_cast<float*>(x + Shape::X_BYTES);  // [tile][warp][token][16]

  const int first = (int)((long long)TILES * blockIdx.x / gridDim.x), last = (int)((long long)TILES * (blockIdx.x + 1) / gridDim.x);
  const int begin = GROUPS * warp / WARPS, units = GROUPS * (warp + 1) / WARPS - begin;
  const int stages_per_tile = units / STAGE_UNITS;
  const char* next = input.weights + ((size_t)first * GROUPS + begin) * Weights::BYTES;
  int to_copy = (last - first) * stages_per_tile, to_copy_of_tile = stages_per_tile;
  const u64 policy = evict_first_policy();
  auto fill = [&](int stage) {
    if (to_copy == 0) return;
    copy_async<true>(ring + stage * Shape::STAGE_BYTES, next, Shape::STAGE_BYTES, &filled[warp][stage], lane, policy);
    next += Shape::STAGE_BYTES;
    to_copy--;
    if (--to_copy_of_tile == 0) {
      next += (size_t)(GROUPS - units) * Weights::BYTES;
      to_copy_of_tile = stages_per_tile;
    }
  };

  if (lane < STAGES) barrier_init_for_copy(&filled[warp][lane]);
  barriers_ready();
  __syncwarp();
  launch_next_kernel();
  for (int stage = 0; stage < STAGES; stage++) fill(stage);

  wait_for_previous_kernel();
  // This warp's x: 16-byte pieces [unit][quarter][token][t], and their sums for what RAW_BIAS adds to every code.
  constexpr int GROUP_BYTES = UNIT_INPUTS * TOKENS * 2, PIECES = 16 * TOKENS, LOADS = (Shape::MAX_UNITS * PIECES + LANES - 1) / LANES;
  float* bias = sums + Shape::SUM_BYTES / 4 + warp * Shape::MAX_UNITS * QUARTERS * 8;  // [unit][group][8 tokens]
  const uint4* from = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(input.x) + begin * GROUP_BYTES);
  uint4* to = reinterpret_cast<uint4*>(x + begin * GROUP_BYTES);
#pragma unroll
  for (int first_load = 0; first_load < LOADS; first_load += 8) {
    uint4 pieces[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (first_load + i < LOADS) {
        const int piece = (first_load + i) * LANES + lane;
        pieces[i] = piece < units * PIECES ? __ldcg(from + piece) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (first_load + i < LOADS) {
        const int piece = (first_load + i) * LANES + lane;
        if (piece < units * PIECES) to[piece] = paired(pieces[i]);
        if (Weights::RAW_BIAS != 0.f) {
          float total = 0.f;
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const u32 two = word(pieces[i], j);
            const float2 numbers = to_float(reinterpret_cast<const typename Pair<typename Weights::Number>::type&>(two));
            total += numbers.x + numbers.y;
          }
          total += __shfl_xor_sync(~0u, total, 1);
          total += __shfl_xor_sync(~0u, total, 2);
          const int row = piece / 4;  // [unit][quarter][token]
          if (t == 0 && piece < units * PIECES) bias[row / TOKENS * 8 + row % TOKENS] = -Weights::RAW_BIAS * total;
        }
      }
  }
  __syncwarp();
  if (Weights::RAW_BIAS != 0.f && Weights::GROUP_QUARTERS > 1) {
    // Quarters to groups, in place: group i of the warp comes from quarters i * GROUP_QUARTERS and on.
    constexpr int WIDTH = Weights::GROUP_QUARTERS;
    float grouped[(Shape::MAX_UNITS * QUARTERS / WIDTH * 8 + LANES - 1) / LANES];
#pragma unroll
    for (int i = 0; i < (int)(sizeof(grouped) / 4); i++) {
      const int at = i * LANES + lane;
      grouped[i] = 0.f;
      if (at < units * QUARTERS / WIDTH * 8)
        for (int j = 0; j < WIDTH; j++) grouped[i] += bias[(at / 8 * WIDTH + j) * 8 + min(at % 8, TOKENS - 1)];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < (int)(sizeof(grouped) / 4); i++)
      if (i * LANES + lane < units * QUARTERS / WIDTH * 8) bias[i * LANES + lane] = grouped[i];
    __syncwarp();
  }
  if (PARTIALS && warp < TOKENS) {
    float total = 0.f;
    for (int i = lane; i < PARTIALS; i += LANES) total += __ldcg(&input.square_sums[i * TOKENS + warp]);
    for (int o = LANES / 2; o; o /= 2) total += __shfl_xor_sync(~0u, total, o);
    if (lane == 0) inverse_rms[warp] = rsqrtf(total / K + input.epsilon);
  }

  const u32 my_x = shared_address(x) + begin * GROUP_BYTES + g * 64 + t * 16;
  const float* my_bias = bias + 2 * t;
  RingPosition<STAGES> at;
  uint4 b[QUARTERS] = {};
  const Flags has_x(g < TOKENS);
  for (int pass = first; pass < last; pass += Shape::PASS_TILES) {
    const int tiles = min(Shape::PASS_TILES, last - pass);
    for (int tile = 0; tile < tiles; tile++) {
      float sum[4] = {};
      for (int i = 0; i < stages_per_tile; i++) {
        barrier_wait(&filled[warp][at.stage], at.parity);
#pragma unroll
        for (int u = 0; u < STAGE_UNITS; u++)
          multiply_unit_raw<Weights, TOKENS * 64>(ring + at.stage * Shape::STAGE_BYTES + u * Weights::BYTES,
                                                  my_x + (i * STAGE_UNITS + u) * GROUP_BYTES,
                                                  my_bias + (i * STAGE_UNITS + u) * Shape::GROUPS * 8, has_x, lane, b, sum);
        __syncwarp();
        fill(at.stage);
        at.advance();
      }
      float* mine = sums + (tile * WARPS + warp) * TOKENS * UNIT_ROWS + g;
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (2 * t + i < TOKENS) {
          mine[(2 * t + i) * UNIT_ROWS] = sum[i];
          mine[(2 * t + i) * UNIT_ROWS + 8] = sum[2 + i];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tiles * TOKENS * 8; i += WARPS * LANES) {
      const int row = i % 8, token = i / 8 % TOKENS, tile = i / 8 / TOKENS;
      const float* from = sums + (tile * WARPS * TOKENS + token) * UNIT_ROWS + row;
      float lower = 0.f, upper = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        lower += from[w * TOKENS * UNIT_ROWS];
        upper += from[w * TOKENS * UNIT_ROWS + 8];
      }
      if (PARTIALS) lower *= inverse_rms[token], upper *= inverse_rms[token];
      const int output_tile = pass + tile;
      if (Weights::ROW_SCALES) {
        lower *= to_float(input.row_scales[output_tile * UNIT_ROWS + row]);
        upper *= to_float(input.row_scales[output_tile * UNIT_ROWS + row + 8]);
      }
      float squares = output.store(output_tile, row, token, lower, upper);
      if constexpr (Output::SQUARES) {
        const u32 eight = 0xffu << (lane & 24);
        for (int o = 4; o; o /= 2) squares += __shfl_xor_sync(eight, squares, o);
        if (row == 0) output.square_sums[output_tile * TOKENS + token] = squares;
      }
    }
    if (pass + Shape::PASS_TILES < last) __syncthreads();
  }
}

}  // namespace tw

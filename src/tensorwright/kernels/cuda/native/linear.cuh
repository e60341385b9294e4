// What stands around a linear's products: its input in 16 bits, its weights as rows, and its results in their places.
//
// Few tokens: linear_input in input order, then small_linear with Rows. Many: linear_input in rows, unpack_units, a
// library's matrix product of 16-bit rows with float32 sums, then linear_output.
#pragma once
#include "linear_small.cuh"
#include "numbers.cuh"

namespace tw {

// Natural row of a packed row. Packed rows g and g + 8 of a tile of 16 lie in one lane: whatever an epilogue combines.
struct InOrder {
  __device__ static int row(int packed) { return packed; }
};
// Numbers d and d + 64 of a head of 128, which rope turns together.
struct RopePairs {
  __device__ static int row(int p) { return p / 128 * 128 + p % 16 / 8 * 64 + p / 16 % 8 * 8 + p % 8; }
};
// Row i of the first half (gate) and of the second (up).
template <int HALF> struct GatePairs {
  __device__ static int row(int p) { return p % 16 / 8 * HALF + p / 16 * 8 + p % 8; }
};

// x, normed or gated, as 16-bit numbers; inputs from K to PADDED are zeros. TOKENS > 0: in input order, for a grid of
// TOKENS, of which `rows` exist; 0: row after row.
template <class Type, int K, int PADDED, bool NORM, Function GATE, int TOKENS>
__global__ void __launch_bounds__(256) linear_input(const float* x, const float* norm, Type* y, float epsilon, int rows) {
  begin_kernel();
  constexpr int WIDTH = GATE == Function::none ? K : 2 * K;
  const int row = blockIdx.x;
  const float* from = x + (size_t)row * WIDTH;
  float factor = 1.f;
  if (NORM) {
    float sum = 0.f;
    for (int k = threadIdx.x; k < K && row < rows; k += 256) sum += from[k] * from[k];
    factor = rsqrtf(block_sum<256>(sum) / K + epsilon);
  }
  for (int k = threadIdx.x; k < PADDED; k += 256) {
    float value = 0.f;
    if (row < rows && k < K) {
      value = activate<GATE>(from[k]);
      if (NORM) value *= factor * norm[k];
      if (GATE != Function::none) value *= from[K + k];
    }
    const size_t at = TOKENS ? input_index<TOKENS ? TOKENS : 1>(row, k) : (size_t)row * PADDED + k;
    y[at] = to_finite<Type>(value);
  }
}

// small_linear's results, with bias and residual (null: none), as rows of ROWS float32. y may be the residual.
template <class Order, int ROWS> struct Rows {
  static constexpr bool SQUARES = false;
  float* y;
  const float* bias;
  const float* residual;
  int rows;

  __device__ void put(int row, int token, float value) const {
    if (row >= ROWS) return;
    const size_t at = (size_t)token * ROWS + row;
    if (bias) value += bias[row];
    if (residual) value += residual[at];
    y[at] = value;
  }
  __device__ float store(int tile, int g, int token, float lower, float upper) const {
    if (token < rows) {
      put(Order::row(tile * UNIT_ROWS + g), token, lower);
      put(Order::row(tile * UNIT_ROWS + g + 8), token, upper);
    }
    return 0.f;
  }
};

// Row tiles from `first_tile` on as 16-bit rows [Order's row][UNITS * 128]: code * scale, rounded. Grid: (blocks of
// UNPACK_WARPS units, row tiles); a warp handles a unit. Any order but InOrder takes all tiles. row_scales: by packed row, or null.
constexpr int UNPACK_WARPS = 8;
template <class Weights, int UNITS, class Order>
__global__ void __launch_bounds__(UNPACK_WARPS * LANES)
unpack_units(const char* weights, const typename Weights::Number* row_scales, typename Weights::Number* panel, int first_tile) {
  begin_kernel();
  using Type = typename Weights::Number;
  const int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  const int place = blockIdx.x * UNPACK_WARPS + threadIdx.x / LANES, tile = first_tile + blockIdx.y;
  if (place >= UNITS) return;
  const char* unit = weights + ((size_t)tile * UNITS + place) * Weights::BYTES;
  uint4 codes[Weights::LOADS];
#pragma unroll
  for (int i = 0; i < Weights::LOADS; i++) codes[i] = reinterpret_cast<const uint4*>(unit)[i * LANES + lane];
  float2 scale = make_float2(1.f, 1.f);
  if (row_scales) scale = make_float2(to_float(row_scales[tile * UNIT_ROWS + g]), to_float(row_scales[tile * UNIT_ROWS + g + 8]));
#pragma unroll
  for (int q = 0; q < QUARTERS; q++) {
    u32 a[2][4];
    Weights::template fragments<true>(codes, q, a);
    if (Weights::HAS_SCALES) scale = Weights::scales(unit, q, lane);
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      u32 words[4] = {a[0][upper], a[1][upper], a[0][2 + upper], a[1][2 + upper]};
      if (Weights::HAS_SCALES || Weights::ROW_SCALES)
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = scaled<Type>(words[i], upper ? scale.y : scale.x);
      const size_t row = Order::row(blockIdx.y * UNIT_ROWS + upper * 8 + g);
      Type* to = panel + (row * UNITS + place) * UNIT_INPUTS + q * 32 + t * 8;
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// All row tiles of float8 weights as rows of bytes, and the scales of rows as float32, both in the natural order.
template <class Weights, int UNITS, class Order>
__global__ void __launch_bounds__(UNPACK_WARPS * LANES)
unpack_bytes(const char* weights, const typename Weights::Number* row_scales, char* panel, float* scales) {
  begin_kernel();
  const int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  const int place = blockIdx.x * UNPACK_WARPS + threadIdx.x / LANES, tile = blockIdx.y;
  if (place >= UNITS) return;
  const uint4* unit = reinterpret_cast<const uint4*>(weights + ((size_t)tile * UNITS + place) * Weights::BYTES);
  const int rows[2] = {Order::row(tile * UNIT_ROWS + g), Order::row(tile * UNIT_ROWS + 8 + g)};
  uint4 codes[QUARTERS];
#pragma unroll
  for (int q = 0; q < QUARTERS; q++) codes[q] = unit[q * LANES + lane];
#pragma unroll
  for (int q = 0; q < QUARTERS; q++)
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
      char* to = panel + ((size_t)rows[upper] * UNITS + place) * UNIT_INPUTS + q * 32 + t * 8;
      *reinterpret_cast<uint2*>(to) = upper ? make_uint2(codes[q].z, codes[q].w) : make_uint2(codes[q].x, codes[q].y);
    }
  if (place == 0 && t < 2) scales[rows[t]] = to_float(row_scales[tile * UNIT_ROWS + t * 8 + g]);
}

// A tile of weights with scales of groups as float8: rows of bytes in the natural order, and a power of two for each row,
// by which nothing is rounded but to float8's four significant bits. LARGEST: of all codes. Grid: row tiles.
template <class Weights, int UNITS, class Order, int LARGEST>
__global__ void __launch_bounds__(UNPACK_WARPS * LANES)
round_units(const char* weights, char* panel, float* scales) {
  __shared__ float largest[UNPACK_WARPS][UNIT_ROWS];
  begin_kernel();
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  const char* tile = weights + (size_t)blockIdx.x * UNITS * Weights::BYTES;
  float most[2] = {};
  for (int place = warp; place < UNITS; place += UNPACK_WARPS) {
    const float2 scale = Weights::scales(tile + place * Weights::BYTES, t, lane);
    most[0] = fmaxf(most[0], fabsf(scale.x)), most[1] = fmaxf(most[1], fabsf(scale.y));
  }
#pragma unroll
  for (int upper = 0; upper < 2; upper++) {
    most[upper] = fmaxf(most[upper], __shfl_xor_sync(~0u, most[upper], 1));
    most[upper] = fmaxf(most[upper], __shfl_xor_sync(~0u, most[upper], 2));
    if (t == 0) largest[warp][upper * 8 + g] = most[upper];
  }
  __syncthreads();
  float inverse[2];
#pragma unroll
  for (int upper = 0; upper < 2; upper++) {
    float scale = 0.f;
#pragma unroll
    for (int i = 0; i < UNPACK_WARPS; i++) scale = fmaxf(scale, largest[i][upper * 8 + g]);
    const int power = scale > 0.f ? ilogbf(scale * (LARGEST / 448.f)) + 1 : 0;
    inverse[upper] = ldexpf(1.f, -power);
    if (warp == 0 && t == 0) scales[Order::row(blockIdx.x * UNIT_ROWS + upper * 8 + g)] = ldexpf(1.f, power);
  }
  for (int place = warp; place < UNITS; place += UNPACK_WARPS) {
    const char* unit = tile + place * Weights::BYTES;
    uint4 codes[Weights::LOADS];
#pragma unroll
    for (int i = 0; i < Weights::LOADS; i++) codes[i] = reinterpret_cast<const uint4*>(unit)[i * LANES + lane];
#pragma unroll
    for (int q = 0; q < QUARTERS; q++) {
      u32 a[2][4];
      Weights::template fragments<true>(codes, q, a);
      const float2 scale = Weights::scales(unit, q, lane);
#pragma unroll
      for (int upper = 0; upper < 2; upper++) {
        const float factor = (upper ? scale.y : scale.x) * inverse[upper];
        const u32 pairs[4] = {a[0][upper], a[1][upper], a[0][2 + upper], a[1][2 + upper]};
        u32 eights[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float2 two = to_float(reinterpret_cast<const typename Pair<typename Weights::Number>::type&>(pairs[i]));
          eights[i] = to_float8(two.x * factor, two.y * factor);
        }
        const size_t row = Order::row(blockIdx.x * UNIT_ROWS + upper * 8 + g);
        *reinterpret_cast<uint2*>(panel + (row * UNITS + place) * UNIT_INPUTS + q * 32 + t * 8) =
            make_uint2(eights[0] | eights[1] << 16, eights[2] | eights[3] << 16);
      }
    }
  }
}

// Products [rows][WIDTH] of packed rows from `first` on to their places in y. Grid: (rows, blocks of 256 columns).
template <class Order, int ROWS, int WIDTH>
__global__ void __launch_bounds__(256) linear_output(const float* product, const Rows<Order, ROWS> output, int first) {
  begin_kernel();
  const int column = blockIdx.y * 256 + threadIdx.x;
  if (column >= WIDTH) return;
  output.put(Order::row(first + column), blockIdx.x, product[(size_t)blockIdx.x * WIDTH + column]);
}

}  // namespace tw

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

// Row tiles from `first_tile` on as 16-bit rows [Order's row][UNITS * 128]: code * scale of the group, or the code alone
// where scales belong to whole rows. Grid: (UNITS, row tiles); a warp handles a unit. Any order but InOrder takes all tiles.
template <class Weights, int UNITS, class Order>
__global__ void __launch_bounds__(LANES) unpack_units(const char* weights, typename Weights::Number* panel, int first_tile) {
  begin_kernel();
  using Type = typename Weights::Number;
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const char* unit = weights + ((size_t)(first_tile + blockIdx.y) * UNITS + blockIdx.x) * Weights::BYTES;
  uint4 codes[Weights::LOADS];
#pragma unroll
  for (int i = 0; i < Weights::LOADS; i++) codes[i] = reinterpret_cast<const uint4*>(unit)[i * LANES + lane];
#pragma unroll
  for (int q = 0; q < QUARTERS; q++) {
    u32 a[2][4];
    Weights::template fragments<true>(codes, q, a);
    float2 scale = make_float2(1.f, 1.f);
    if (Weights::HAS_SCALES) scale = Weights::scales(unit, q, lane);
#pragma unroll
    for (int half_rows = 0; half_rows < 2; half_rows++) {
      u32 words[4] = {a[0][half_rows], a[1][half_rows], a[0][2 + half_rows], a[1][2 + half_rows]};
      if (Weights::HAS_SCALES)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float2 pair = to_float(reinterpret_cast<const typename Pair<Type>::type&>(words[i]));
          const float factor = half_rows ? scale.y : scale.x;
          words[i] = pack<Type>(pair.x * factor, pair.y * factor);
        }
      const size_t row = Order::row(blockIdx.y * UNIT_ROWS + half_rows * 8 + g);
      Type* to = panel + (row * UNITS + blockIdx.x) * UNIT_INPUTS + q * 32 + t * 8;
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// Products [rows][WIDTH] of packed rows from `first` on to their places in y. Grid: (rows, blocks of 256 columns).
template <class Type, class Order, int ROWS, int WIDTH, bool ROW_SCALES>
__global__ void __launch_bounds__(256)
linear_output(const float* product, const Type* row_scales, const Rows<Order, ROWS> output, int first) {
  begin_kernel();
  const int column = blockIdx.y * 256 + threadIdx.x, packed = first + column;
  if (column >= WIDTH) return;
  float value = product[(size_t)blockIdx.x * WIDTH + column];
  if (ROW_SCALES) value *= to_float(row_scales[packed]);
  output.put(Order::row(packed), blockIdx.x, value);
}

}  // namespace tw

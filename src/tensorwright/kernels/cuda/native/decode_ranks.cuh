// The kernels of a decode step on several ranks: what adds sums over ranks to the residual stream.
#pragma once
#include "collectives.cuh"
#include "decode_chain.cuh"

namespace tw {

// Residual, of which every rank has a part, as an epilogue: each warp sends its part as it finishes it and takes the others'
// as they come, while other blocks of the same launch still multiply. Only for a linear whose blocks wait for no other
// block of the launch, such as small_linear.
template <class Type, int TOKENS, int ROWS> struct SummedResidual : Residual<Type, TOKENS, ROWS> {
  const Ranks* ranks;
  int number;  // of the collective in its step

  __device__ float store(int tile, int g, int token, float lower, float upper) const {
    const Collective collective(ranks, number);
    const size_t index = ((size_t)token * (ROWS / 16) + tile) * 8 + g;
    const float2 mine = make_float2(lower, upper);
    collective.send(index, mine);
    const float2 total = collective.sum(index, mine);
    return Residual<Type, TOKENS, ROWS>::store(tile, g, token, total.x, total.y);
  }
};

// The same of a linear's finished rows [TOKENS, H], in an order of activations. Leaves one sum of squares, and zeros for all
// others that a linear may want. Grid: tokens.
template <class Type, class Order, int TOKENS, int H>
__global__ void __launch_bounds__(512)
sum_residual(const Ranks* ranks, int number, const float* part, const Residual<Type, TOKENS, H> output) {
  static_assert(H % 2 == 0, "two numbers a thread");
  constexpr int THREADS = 512;
  begin_kernel();
  const Collective collective(ranks, number);
  const int token = blockIdx.x;
  const size_t start = (size_t)token * (H / 2);
  const float2* mine = reinterpret_cast<const float2*>(part) + start;
  float2* stream = reinterpret_cast<float2*>(output.stream) + start;
  for (int pair = threadIdx.x; pair < H / 2; pair += THREADS) collective.send(start + pair, mine[pair]);
  float squares = 0.f;
  for (int pair = threadIdx.x; pair < H / 2; pair += THREADS) {
    const float2 before = stream[pair], weights = reinterpret_cast<const float2*>(output.next_norm)[pair];
    const float2 total = collective.sum(start + pair, mine[pair]);
    const float2 after = make_float2(before.x + total.x, before.y + total.y);
    stream[pair] = after;
    output.x[Order::index(token, 2 * pair)] = to_finite<Type>(after.x * weights.x);
    output.x[Order::index(token, 2 * pair + 1)] = to_finite<Type>(after.y * weights.y);
    squares += after.x * after.x + after.y * after.y;
  }
  squares = block_sum<THREADS>(squares);
  for (int i = threadIdx.x; i < H / UNIT_ROWS; i += THREADS) output.square_sums[i * TOKENS + token] = i ? 0.f : squares;
}

}  // namespace tw

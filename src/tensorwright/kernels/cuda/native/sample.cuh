// The greedy choice from each row of logits, and what else every step wants to know of them.
#pragma once
#include "numbers.cuh"

namespace tw {

struct Chosen {
  int token;       // of the largest logit; of equal ones the lowest
  float log_prob;  // its log probability
  float sum;       // of all logits: not finite if one of them is not
  float unused;
};

// Grid: rows. Once over the row for the largest, once more, from the L2, for the sum of exponentials.
template <int COLUMNS> __global__ void __launch_bounds__(1024) greedy(const float* logits, Chosen* chosen) {
  constexpr int WARPS = 32;
  __shared__ float largest[WARPS];
  __shared__ int tokens[WARPS];
  begin_kernel();
  const float* row = logits + (size_t)blockIdx.x * COLUMNS;
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  float best = -__int_as_float(0x7f800000), sum = 0.f;
  int token = COLUMNS;
  auto take = [&](float value, int index) {
    if (value > best || (value == best && index < token)) best = value, token = index;
  };
  for (int i = threadIdx.x; i < COLUMNS; i += 1024) {
    const float value = row[i];
    take(value, i);
    sum += value;
  }
#pragma unroll
  for (int o = LANES / 2; o; o /= 2) {
    const float value = __shfl_xor_sync(~0u, best, o);
    const int index = __shfl_xor_sync(~0u, token, o);
    take(value, index);
  }
  if (lane == 0) largest[warp] = best, tokens[warp] = token;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; i++) take(largest[i], tokens[i]);
  sum = block_sum<1024>(sum);
  float exponentials = 0.f;
  for (int i = threadIdx.x; i < COLUMNS; i += 1024) exponentials += __expf(row[i] - best);
  exponentials = block_sum<1024>(exponentials);
  if (threadIdx.x == 0) chosen[blockIdx.x] = {min(token, COLUMNS - 1), -logf(exponentials), sum, 0.f};
}

}  // namespace tw

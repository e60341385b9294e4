// The greedy choice from each row of logits, what else every step wants to know of them, and its way into the next step.
#pragma once
#include "numbers.cuh"

namespace tw {

struct Chosen {
  int token;       // of the largest logit; of equal ones the lowest
  float log_prob;  // its log probability
  float sum;       // of all logits: not finite if one of them is not
  float unused;
};

struct Largest {
  float value;
  int token;
  __device__ void take(float other, int index) {
    if (other > value || (other == value && index < token)) value = other, token = index;
  }
};

// Over a row, in all 1024 threads of the block; the lowest of equal ones. `seen` sees every number once.
template <int COLUMNS, class Seen> __device__ Largest block_largest(const float* row, Seen seen) {
  constexpr int WARPS = 32;
  __shared__ Largest all[WARPS];
  Largest mine = {-__int_as_float(0x7f800000), COLUMNS};
  for (int i = threadIdx.x; i < COLUMNS; i += 1024) {
    const float value = row[i];
    mine.take(value, i);
    seen(value);
  }
#pragma unroll
  for (int o = LANES / 2; o; o /= 2) {
    const float value = __shfl_xor_sync(~0u, mine.value, o);
    const int index = __shfl_xor_sync(~0u, mine.token, o);
    mine.take(value, index);
  }
  if (threadIdx.x % LANES == 0) all[threadIdx.x / LANES] = mine;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; i++) mine.take(all[i].value, all[i].token);
  mine.token = min(mine.token, COLUMNS - 1);  // of a row without numbers
  return mine;
}

// Grid: rows. Once over the row for the largest, once more, from the L2, for the sum of exponentials. What is chosen
// counts as drawn until something else is.
template <int COLUMNS> __global__ void __launch_bounds__(1024) greedy(const float* logits, Chosen* chosen, Chosen* drawn) {
  begin_kernel();
  const float* row = logits + (size_t)blockIdx.x * COLUMNS;
  float sum = 0.f;
  const Largest largest = block_largest<COLUMNS>(row, [&](float value) { sum += value; });
  sum = block_sum<1024>(sum);
  float exponentials = 0.f;
  for (int i = threadIdx.x; i < COLUMNS; i += 1024) exponentials += __expf(row[i] - largest.value);
  exponentials = block_sum<1024>(exponentials);
  if (threadIdx.x == 0) chosen[blockIdx.x] = drawn[blockIdx.x] = {largest.token, -logf(exponentials), sum, 0.f};
}

// Token ids that were not known when the step was prepared: -1 - i is the token drawn as number i.
__global__ void __launch_bounds__(256) take_tokens(int* token_ids, const Chosen* drawn, int count) {
  begin_kernel();
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i < count && token_ids[i] < 0) token_ids[i] = drawn[-1 - token_ids[i]].token;
}

}  // namespace tw

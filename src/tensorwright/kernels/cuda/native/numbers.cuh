// Sums over a block, activation functions, and reading stored numbers. Knows no op.
#pragma once
#include "pipeline.cuh"

namespace tw {

enum class Function { none, silu, gelu, gelu_tanh };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(signed char x) { return x; }

template <Function FUNCTION> __device__ inline float activate(float x) {
  if (FUNCTION == Function::silu) return x / (1.f + __expf(-x));
  if (FUNCTION == Function::gelu) return x * 0.5f * (1.f + erff(x * 0.70710678118654752f));
  if (FUNCTION == Function::gelu_tanh) return 0.5f * x * (1.f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  return x;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int o = LANES / 2; o; o /= 2) x += __shfl_xor_sync(~0u, x, o);
  return x;
}

// Over all THREADS of the block, in the same order whatever the grid.
template <int THREADS> __device__ inline float block_sum(float x) {
  __shared__ float sums[THREADS / LANES];
  x = warp_sum(x);
  if (threadIdx.x % LANES == 0) sums[threadIdx.x / LANES] = x;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < THREADS / LANES; i++) total += sums[i];
  __syncthreads();
  return total;
}

// Every kernel of an engine begins with this: the next one may be launched, and all earlier ones have finished.
__device__ inline void begin_kernel() {
  launch_next_kernel();
  wait_for_previous_kernel();
}

}  // namespace tw

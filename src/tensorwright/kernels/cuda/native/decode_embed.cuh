// The first kernel of a decode step: from token ids to the residual stream, the first input, and the step's angles.
#pragma once
#include "outputs.cuh"
#include "pipeline.cuh"

namespace tw {

template <class Type> struct EmbeddingInput {
  const int* token_ids;              // [tokens]
  const int* positions;              // [tokens]
  const Type* table;                 // [vocabulary, H]
  const float* inverse_frequencies;  // [64]
  float2* rotation;                  // [tokens, 64]
};

// Grid: tokens. Writes, in that order, what Residual::store writes, and the step's cosines and sines.
template <class Type, class Order, int TOKENS, int H, int PARTIALS>
__global__ void __launch_bounds__(256) embed(const EmbeddingInput<Type> input, const Residual<Type, TOKENS, H> output) {
  __shared__ float squares[8];
  const int token = blockIdx.x;
  launch_next_kernel();
  wait_for_previous_kernel();
  const Type* from = input.table + (size_t)input.token_ids[token] * H;
  float sum = 0.f;
  for (int k = threadIdx.x; k < H; k += 256) {
    const float value = to_float(from[k]);
    output.stream[(size_t)token * H + k] = value;
    output.x[Order::index(token, k)] = to_finite<Type>(value * output.next_norm[k]);
    sum += value * value;
  }
  for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
  __syncthreads();
  for (int i = threadIdx.x; i < PARTIALS; i += 256) output.square_sums[i * TOKENS + token] = i < 8 ? squares[i] : 0.f;
  if (threadIdx.x < 64) {
    const double turns = (double)input.positions[token] * (double)input.inverse_frequencies[threadIdx.x] * 0.15915494309189535;
    float sine, cosine;
    sincospif(2.f * (float)(turns - rint(turns)), &sine, &cosine);
    input.rotation[token * 64 + threadIdx.x] = make_float2(cosine, sine);
  }
}

}  // namespace tw

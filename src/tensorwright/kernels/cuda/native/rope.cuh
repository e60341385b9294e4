// Between the qkv linear and attention: head norms, rotary embedding, and keys and values into the paged cache.
//
//   rope_cache<Input, Output, Stored, HEADS, KV_HEADS, D, BLOCK_SIZE, PAIRS>
//     Input and Output: of qkv and q, float, half or bfloat16. Stored: of the cache, half, bfloat16, signed char or float8.
//   Threads: 256. Grid: tokens.
#pragma once
#include "numbers.cuh"

namespace tw {

// One head's numbers into its place in the cache: 16-bit, float8, or int8 with a scale of max|x| / 127.
template <class Stored> struct CacheRow {
  __device__ static float limited(float x) {
    if constexpr (sizeof(Stored) == 1) return x;  // which the conversion does
    else return finite<Stored>(x);
  }
  template <int D> __device__ static void store(const float* x, Stored* to, float*, int lane) {
    if constexpr (D % 4 == 0)
      for (int d = lane * 4; d < D; d += LANES * 4)
        write_four(to + d, make_float4(limited(x[d]), limited(x[d + 1]), limited(x[d + 2]), limited(x[d + 3])));
    else
      for (int d = lane; d < D; d += LANES) to[d] = to_finite<Stored>(x[d]);
  }
};
template <> struct CacheRow<signed char> {
  template <int D> __device__ static void store(const float* x, signed char* to, float* scale, int lane) {
    float largest = 0.f;
    for (int d = lane; d < D; d += LANES) largest = fmaxf(largest, fabsf(x[d]));
    for (int o = LANES / 2; o; o /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, o));
    const float inverse = largest > 0.f ? 127.f / largest : 0.f;
    if (lane == 0) *scale = largest / 127.f;
    for (int d = lane; d < D; d += LANES) to[d] = (signed char)__float2int_rn(x[d] * inverse);
  }
};

template <class Input, class Output, class Stored> struct RopeCache {
  const Input* qkv;        // [tokens, (HEADS + 2 KV_HEADS) * D]
  const int* positions;    // [tokens]
  const int* slots;        // [tokens]; negative: not stored
  Output* q;               // [tokens, HEADS * D]
  Stored* cache;           // [blocks, 2, KV_HEADS, BLOCK_SIZE, D]
  float* scales;           // [blocks, 2, KV_HEADS, BLOCK_SIZE] where Stored is int8
  const float* frequencies;
  const float* q_norm;     // [D] or null
  const float* k_norm;
  const float* bias;       // of qkv's columns, or null
  float factor, epsilon;
};

// A warp handles a head.
template <class Input, class Output, class Stored, int HEADS, int KV_HEADS, int D, int BLOCK_SIZE, int PAIRS>
__global__ void __launch_bounds__(256) rope_cache(const RopeCache<Input, Output, Stored> p) {
  constexpr int WARPS = 8, ALL = HEADS + 2 * KV_HEADS;
  __shared__ float cosines[PAIRS], sines[PAIRS];
  __shared__ __align__(16) float rows[WARPS][D];
  begin_kernel();
  const int token = blockIdx.x, warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  for (int i = threadIdx.x; i < PAIRS; i += 256) {
    const double turns = (double)p.positions[token] * (double)p.frequencies[i] * 0.15915494309189535;
    sincospif(2.f * (float)(turns - rint(turns)), &sines[i], &cosines[i]);
    sines[i] *= p.factor, cosines[i] *= p.factor;
  }
  __syncthreads();
  const int slot = p.slots[token];
  float* x = rows[warp];
  for (int head = warp; head < ALL; head += WARPS) {
    const Input* from = p.qkv + ((size_t)token * ALL + head) * D;
    // What a product's rounding to 16 bits made infinite is the largest number.
    auto biased = [&](float x, int d) { return finite<Input>(x) + (p.bias ? p.bias[head * D + d] : 0.f); };
    const float* norm = head < HEADS ? p.q_norm : head < HEADS + KV_HEADS ? p.k_norm : nullptr;
    if constexpr (D % 4 == 0)
      for (int d = lane * 4; d < D; d += LANES * 4) {
        const float4 v = read_four(from + d);
        write_four(x + d, make_float4(biased(v.x, d), biased(v.y, d + 1), biased(v.z, d + 2), biased(v.w, d + 3)));
      }
    else
      for (int d = lane; d < D; d += LANES) x[d] = biased(to_float(from[d]), d);
    __syncwarp();
    if (norm) {
      float sum = 0.f;
      for (int d = lane; d < D; d += LANES) sum += x[d] * x[d];
      const float scale = rsqrtf(warp_sum(sum) / D + p.epsilon);
      for (int d = lane; d < D; d += LANES) x[d] *= scale * norm[d];
      __syncwarp();
    }
    if (head < HEADS + KV_HEADS)
      for (int i = lane; i < PAIRS; i += LANES) {
        const float first = x[i], second = x[i + PAIRS];
        x[i] = first * cosines[i] - second * sines[i];
        x[i + PAIRS] = second * cosines[i] + first * sines[i];
      }
    __syncwarp();
    if (head < HEADS) {
      Output* to = p.q + ((size_t)token * HEADS + head) * D;
      if constexpr (D % 4 == 0)
        for (int d = lane * 4; d < D; d += LANES * 4) {
          const float4 v = read_four(x + d);
          write_four(to + d, make_float4(finite<Output>(v.x), finite<Output>(v.y), finite<Output>(v.z), finite<Output>(v.w)));
        }
      else
        for (int d = lane; d < D; d += LANES) to[d] = to_finite<Output>(x[d]);
    } else if (slot >= 0) {
      const size_t value = head >= HEADS + KV_HEADS, kv_head = (head - HEADS) % KV_HEADS;
      const size_t at = ((slot / BLOCK_SIZE * 2 + value) * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE;
      CacheRow<Stored>::template store<D>(x, p.cache + at * D, p.scales + at, lane);
    }
    __syncwarp();
  }
}

}  // namespace tw

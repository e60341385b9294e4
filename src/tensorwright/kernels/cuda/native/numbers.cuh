// Sums over a block, activation functions, and reading stored numbers. Knows no op.
#pragma once
#include "pipeline.cuh"

namespace tw {

struct float8 { u8 bits; };  // e4m3: up to 448, no infinities

// The nearest float8, ties to even; what is larger becomes +-448. Two at once: the lower one in the lower byte.
__device__ inline u32 to_float8(float lower, float upper) {
#if __CUDA_ARCH__ >= 890
  u16 both;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(upper), "f"(lower));
  return both;
#else
  u32 both = 0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float x = i ? upper : lower, magnitude = fminf(fabsf(x), 448.f);
    const u32 bits = __float_as_uint(magnitude);
    // Below 2^-6 numbers are multiples of 2^-9, the last place of 2^14; above, three bits of the mantissa are kept.
    const u32 code = magnitude < 0.015625f ? __float_as_uint(magnitude + 16384.f) - 0x46800000u
                                           : (bits + 0x7ffffu + (bits >> 20 & 1) - 0x3c000000u) >> 20;
    both |= (code | (__float_as_uint(x) >> 24 & 0x80)) << (8 * i);
  }
  return both;
#endif
}
template <> __device__ inline float8 to_finite<float8>(float x) { return float8{(u8)to_float8(x, 0.f)}; }

template <class Type> constexpr bool is_int8 = false;
template <> constexpr bool is_int8<signed char> = true;
template <class A, class B> constexpr bool is_same = false;
template <class A> constexpr bool is_same<A, A> = true;

enum class Function { none, silu, gelu, gelu_tanh };

__device__ inline float to_float(float x) { return x; }
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline float finite<float>(float x) { return x; }
__device__ inline float to_float(signed char x) { return x; }

// Neighbouring numbers of any type as float32, and the way back.
__device__ inline float2 read_two(const float* from) { return *reinterpret_cast<const float2*>(from); }
template <class Type> __device__ inline float2 read_two(const Type* from) {
  return to_float(*reinterpret_cast<const typename Pair<Type>::type*>(from));
}
__device__ inline float4 read_four(const float* from) { return *reinterpret_cast<const float4*>(from); }
template <class Type> __device__ inline float4 read_four(const Type* from) {
  const uint2 four = *reinterpret_cast<const uint2*>(from);
  const float2 a = to_float(reinterpret_cast<const typename Pair<Type>::type&>(four.x)), b = to_float(reinterpret_cast<const typename Pair<Type>::type&>(four.y));
  return make_float4(a.x, a.y, b.x, b.y);
}
__device__ inline void write_four(float* to, float4 v) { *reinterpret_cast<float4*>(to) = v; }
template <class Type> __device__ inline void write_four(Type* to, float4 v) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack<Type>(v.x, v.y), pack<Type>(v.z, v.w));
}
__device__ inline void write_two(float* to, float a, float b) { *reinterpret_cast<float2*>(to) = make_float2(a, b); }
template <class Type> __device__ inline void write_two(Type* to, float a, float b) { *reinterpret_cast<u32*>(to) = pack<Type>(a, b); }
__device__ inline void write_four(float8* to, float4 v) { *reinterpret_cast<u32*>(to) = to_float8(v.x, v.y) | to_float8(v.z, v.w) << 16; }

template <Function FUNCTION> __device__ inline float activate(float x) {
  if (FUNCTION == Function::silu) return x / (1.f + __expf(-x));
  if (FUNCTION == Function::gelu) return x * 0.5f * (1.f + erff(x * 0.70710678118654752f));
  if (FUNCTION == Function::gelu_tanh) return 0.5f * x * (1.f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  return x;
}

struct Sum { __device__ static float of(float a, float b) { return a + b; } };
struct Max { __device__ static float of(float a, float b) { return fmaxf(a, b); } };

template <class Way> __device__ inline float warp_reduce(float x) {
#pragma unroll
  for (int o = LANES / 2; o; o /= 2) x = Way::of(x, __shfl_xor_sync(~0u, x, o));
  return x;
}
__device__ inline float warp_sum(float x) { return warp_reduce<Sum>(x); }

// Over all THREADS of the block, in the same order whatever the grid.
template <int THREADS, class Way> __device__ inline float block_reduce(float x) {
  __shared__ float of_warps[THREADS / LANES];
  x = warp_reduce<Way>(x);
  if (threadIdx.x % LANES == 0) of_warps[threadIdx.x / LANES] = x;
  __syncthreads();
  float whole = of_warps[0];
#pragma unroll
  for (int i = 1; i < THREADS / LANES; i++) whole = Way::of(whole, of_warps[i]);
  __syncthreads();
  return whole;
}
template <int THREADS> __device__ inline float block_sum(float x) { return block_reduce<THREADS, Sum>(x); }
template <int THREADS> __device__ inline float block_max(float x) { return block_reduce<THREADS, Max>(x); }

// Every kernel of an engine begins with this: the next one may be launched, and all earlier ones have finished.
__device__ inline void begin_kernel() {
  launch_next_kernel();
  wait_for_previous_kernel();
}

}  // namespace tw

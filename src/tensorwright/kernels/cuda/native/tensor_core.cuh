// Tensor-core products and 16-bit types. Knows no weight format and no memory.
//
// Every product here is mma.sync m16n8k16: A is 16 weights rows x 16 inputs, B is 16 inputs x 8 tokens, C is float32.
// Lane = 4 * g + t ("row" g = 0..7, "quad" t = 0..3) holds of C: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace tw {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
template <int VALUE> struct Constant { static constexpr int value = VALUE; };
using half = __half;
using bfloat16 = __nv_bfloat16;

template <class Type> struct Pair;
template <> struct Pair<half> { using type = __half2; };
template <> struct Pair<bfloat16> { using type = __nv_bfloat162; };

__device__ inline float to_float(half x) { return __half2float(x); }
__device__ inline float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ inline float2 to_float(__half2 x) { return __half22float2(x); }
__device__ inline float2 to_float(__nv_bfloat162 x) { return __bfloat1622float2(x); }
template <class Type> __device__ Type from_float(float x);
template <> __device__ inline half from_float<half>(float x) { return __float2half_rn(x); }
template <> __device__ inline bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Large values stay finite in a 16-bit type: an infinity would make the whole row one.
template <class Type> __device__ float finite(float x);
template <> __device__ inline float finite<half>(float x) { return fminf(fmaxf(x, -65504.f), 65504.f); }
template <> __device__ inline float finite<bfloat16>(float x) { return x; }
template <class Type> __device__ inline Type to_finite(float x) { return from_float<Type>(finite<Type>(x)); }

// Two numbers as one register; `lower` is the lower half.
template <class Type> __device__ u32 pack(float lower, float upper);
template <> __device__ inline u32 pack<half>(float lower, float upper) {
  __half2 v = __floats2half2_rn(lower, upper);
  return reinterpret_cast<u32&>(v);
}
template <> __device__ inline u32 pack<bfloat16>(float lower, float upper) {
  __nv_bfloat162 v = __floats2bfloat162_rn(lower, upper);
  return reinterpret_cast<u32&>(v);
}

template <class Type> __device__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <> __device__ inline void multiply<half>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ inline void multiply<bfloat16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// (a & mask) | bits, in one instruction.
__device__ inline u32 and_or(u32 a, u32 mask, u32 bits) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits));
  return r;
}

__device__ inline u32 subtract(u32 a, __half2 b) {
  __half2 r = __hsub2(reinterpret_cast<__half2&>(a), b);
  return reinterpret_cast<u32&>(r);
}
__device__ inline u32 subtract(u32 a, __nv_bfloat162 b) {
  __nv_bfloat162 r = __hsub2(reinterpret_cast<__nv_bfloat162&>(a), b);
  return reinterpret_cast<u32&>(r);
}

// Both numbers times `by`.
template <class Type> __device__ u32 scaled(u32 a, float by);
template <> __device__ inline u32 scaled<half>(u32 a, float by) {
  __half2 r = __hmul2(reinterpret_cast<__half2&>(a), __float2half2_rn(by));
  return reinterpret_cast<u32&>(r);
}
template <> __device__ inline u32 scaled<bfloat16>(u32 a, float by) {
  __nv_bfloat162 r = __hmul2(reinterpret_cast<__nv_bfloat162&>(a), __float2bfloat162_rn(by));
  return reinterpret_cast<u32&>(r);
}

__device__ inline u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

}  // namespace tw

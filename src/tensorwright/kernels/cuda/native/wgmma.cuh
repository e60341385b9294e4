// Asynchronous tensor-core products of a warpgroup (four warps), sm_90a. Knows no weight format.
//
// m64nNk16: A is 64 weight rows x 16 inputs in registers; each warp holds 16 rows, as the A fragment of mma m16n8k16. B is
// 16 inputs x N tokens in shared memory. C is float32; each warp's 16 rows lie as N / 8 C fragments of mma m16n8k16.
#pragma once
#include "pipeline.cuh"

namespace tw {

// Registers that a product reads or adds to were written by ordinary instructions before this.
__device__ inline void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of products.
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING groups are unfinished.
template <int PENDING> __device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// B without swizzling: 8 tokens x 16 bytes are 128 contiguous bytes; the other eight inputs of a k-step follow, and the
// next eight tokens come 2,048 bytes later. Advances by 16 (256 bytes) per k-step.
__device__ inline u64 tokens_descriptor(const void* tokens) {
  return (u64)((shared_address(tokens) & 0x3ffff) >> 4) | (u64)(128 >> 4) << 16 | (u64)(2048 >> 4) << 32;
}

// c += a * tokens.
template <class Type, int TOKENS> __device__ void multiply_async(float (&c)[TOKENS / 2], const u32 (&a)[4], u64 tokens);

#define TW_FOUR(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define TW_EIGHT(c, i) TW_FOUR(c, i), TW_FOUR(c, i + 4)
#define TW_SIXTEEN(c, i) TW_EIGHT(c, i), TW_EIGHT(c, i + 8)
#define TW_THIRTY_TWO(c, i) TW_SIXTEEN(c, i), TW_SIXTEEN(c, i + 16)
#define TW_NAMES_4 "%0, %1, %2, %3"
#define TW_NAMES_8 TW_NAMES_4 ", %4, %5, %6, %7"
#define TW_NAMES_16 TW_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TW_NAMES_32 TW_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TW_PRODUCT(TYPE, NAME, TOKENS, SUMS, SUM_NAMES, A, B)                                                            \
  template <> __device__ inline void multiply_async<TYPE, TOKENS>(float (&c)[TOKENS / 2], const u32 (&a)[4], u64 tokens) { \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; "                                                                  \
                 "wgmma.mma_async.sync.aligned.m64n" #TOKENS "k16.f32." NAME "." NAME " {" SUM_NAMES "}, {" A "}, " B      \
                 ", p, 1, 1, 0; }"                                                                                        \
                 : SUMS(c, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens));                                 \
  }
#define TW_PRODUCTS(TYPE, NAME)                                                             \
  TW_PRODUCT(TYPE, NAME, 8, TW_FOUR, TW_NAMES_4, "%4, %5, %6, %7", "%8")                    \
  TW_PRODUCT(TYPE, NAME, 16, TW_EIGHT, TW_NAMES_8, "%8, %9, %10, %11", "%12")               \
  TW_PRODUCT(TYPE, NAME, 32, TW_SIXTEEN, TW_NAMES_16, "%16, %17, %18, %19", "%20")          \
  TW_PRODUCT(TYPE, NAME, 64, TW_THIRTY_TWO, TW_NAMES_32, "%32, %33, %34, %35", "%36")
TW_PRODUCTS(half, "f16")
TW_PRODUCTS(bfloat16, "bf16")

}  // namespace tw

// How a warpgroup multiplies a stage of packed weights by N tokens. Knows no ring, no split and no epilogue.
//
// Each warp takes codes of its TILES row tiles from shared memory, makes 16-bit weights of them in registers, and the tensor
// core multiplies those (64 rows a warpgroup and instruction) by tokens that it reads from shared memory itself; while it
// does, the warp prepares the next weights. The scale of a group goes onto the weight, which is thereby rounded to its type
// (relative error 2^-12 on average in float16), so that sums never leave the tensor core's accumulators.
#pragma once
#include "weights.cuh"
#include "wgmma.cuh"

namespace tw {

// Weights are made before this, not between the products: then the assembler would run the products one by one.
template <int TILES> __device__ inline void pin(u32 (&a)[2][TILES][2][4]) {
#pragma unroll
  for (int i = 0; i < 16 * TILES; i += 4) {
    u32* four = &a[i / 8 / TILES][i / 8 % TILES][i / 4 % 2][0];
    asm volatile("" : "+r"(four[0]), "+r"(four[1]), "+r"(four[2]), "+r"(four[3])::"memory");
  }
}

// Of TILES row tiles and N tokens: sums[r][4 n ..] are the C fragment of tokens 8 n .. 8 n + 7.
template <class Weights, int N, int TILES> struct WgmmaTile {
  using Type = typename Weights::Number;
  float sums[TILES][N / 2];

  __device__ void begin() {
#pragma unroll
    for (int r = 0; r < TILES; r++)
#pragma unroll
      for (int i = 0; i < N / 2; i++) sums[r][i] = 0.f;
  }

  // `units`: this warp's, UNITS of each row tile one after the other. `before()` is called once all products of earlier
  // stages have been made.
  template <int UNITS, class Before>
  __device__ void multiply(const char* units, const char* tokens, int lane, const Before& before) {
    const u64 descriptor = tokens_descriptor(tokens);
    // Two quarters of a unit are one group of products. While one group runs, the other's weights are made.
    u32 a[2][2][TILES][2][4];
#pragma unroll 1
    for (int u = 0; u < UNITS; u++)
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
#pragma unroll
        for (int r = 0; r < TILES; r++) prepare(units + (r * UNITS + u) * Weights::BYTES, pair, lane, r, a[pair]);
        pin(a[pair]);
        products_fence();
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int r = 0; r < TILES; r++)
            multiply_async<Type, N>(sums[r], a[pair][i / 2][r][i % 2], descriptor + u * (UNIT_INPUTS * N / 8) + (pair * 4 + i) * 16);
        products_commit();
        products_wait<1>();
        if (u == 0 && pair == 0) before();
      }
  }

  __device__ void finish() {
    products_wait<0>();
#pragma unroll
    for (int i = 0; i < TILES * N / 2; i++) asm volatile("" : "+f"(sums[i / (N / 2)][i % (N / 2)])::"memory");  // there from here on
  }

 private:
  __device__ void prepare(const char* unit, int pair, int lane, int r, u32 (&a)[2][TILES][2][4]) {
    constexpr int LOADS = Weights::LOADS / 2;
    uint4 codes[Weights::LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++) codes[pair * LOADS + i] = reinterpret_cast<const uint4*>(unit)[(pair * LOADS + i) * LANES + lane];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      Weights::template fragments<true>(codes, pair * 2 + j, a[j][r]);
      if constexpr (Weights::HAS_SCALES) {
        using Two = typename Pair<Type>::type;
        const Two scale = reinterpret_cast<const Two*>(unit + Weights::CODE_BYTES)[(pair * 2 + j) / Weights::GROUP_QUARTERS * 8 + lane / 4];
        const Two lower = both_lower(scale), upper = both_upper(scale);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          Two v = __hmul2(reinterpret_cast<Two&>(a[j][r][i / 4][i % 4]), i % 2 ? upper : lower);
          a[j][r][i / 4][i % 4] = reinterpret_cast<u32&>(v);
        }
      }
    }
  }

  __device__ static __half2 both_lower(__half2 a) { return __low2half2(a); }
  __device__ static __half2 both_upper(__half2 a) { return __high2half2(a); }
  __device__ static __nv_bfloat162 both_lower(__nv_bfloat162 a) { return __low2bfloat162(a); }
  __device__ static __nv_bfloat162 both_upper(__nv_bfloat162 a) { return __high2bfloat162(a); }
};

}  // namespace tw

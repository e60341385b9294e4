// A running softmax over tiles of keys (Dao et al., 2022), in one warp. Knows shared memory and positions, no cache.
//
// A warp has TILES row tiles of 16 rows; lane 4 g + t has rows g and g + 8 of each. Its keys are 8 x KEY_TILES of a tile.
#pragma once
#include "numbers.cuh"

namespace tw {

constexpr int ENDLESS = 0x7fffffff;  // a window that sees everything
constexpr float LEAST = -1e30f;  // a score that no key has: finite, so that LEAST - LEAST is 0

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline void load_matrices(u32 (&to)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(from)) : "memory");
}
__device__ inline void load_matrices_transposed(u32 (&to)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(from)) : "memory");
}

template <class Type, int D, int TILES, int KEY_TILES> struct RunningSoftmax {
  static constexpr int STRIDE = D + 8, PIECES = D / 8;
  float o[TILES][PIECES][4] = {}, high[TILES][2], total[TILES][2] = {}, s[TILES][KEY_TILES][4];

  __device__ RunningSoftmax() {
#pragma unroll
    for (int m = 0; m < TILES; m++) high[m][0] = high[m][1] = LEAST;
  }

  // s = q . k; fragment(m, i, a) gives row tile m's numbers 16 i .. 16 i + 15 as the tensor core's A.
  template <class Fragment> __device__ void score(const Type* keys, int lane, Fragment fragment) {
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int n = 0; n < KEY_TILES; n++) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.f;
    const Type* from = keys + (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      u32 a[TILES][4];
#pragma unroll
      for (int m = 0; m < TILES; m++) fragment(m, i, a[m]);
#pragma unroll
      for (int n = 0; n < KEY_TILES; n += 2) {
        u32 k[4];
        load_matrices(k, from + n * 8 * STRIDE + i * 16);
#pragma unroll
        for (int m = 0; m < TILES; m++) multiply<Type>(s[m][n], a[m], k[0], k[1]), multiply<Type>(s[m][n + 1], a[m], k[2], k[3]);
      }
    }
  }

  // Key number `base` is the first of these; position(m, upper) is the row's own. A row sees its own position and the
  // window - 1 before it.
  template <class Position> __device__ void mask(int base, int window, int lane, Position position) {
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int key = base + n * 8 + lane % 4 * 2 + j % 2;
          if ((u32)(position(m, j / 2) - key) >= (u32)window) s[m][n][j] = LEAST;
        }
  }

  // Scores become weights exp2(scale (s - the highest so far)); what is summed shrinks with a new highest score.
  __device__ void weigh(float scale) {
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float top = high[m][r];
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++) top = fmaxf(top, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        // Where no key is visible yet, weights are 0.
        const float shrink = exp2_fast((high[m][r] - top) * scale), offset = top == LEAST ? 0.f : -top * scale;
        high[m][r] = top;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
          for (int j = 0; j < 2; j++) {
            s[m][n][2 * r + j] = exp2_fast(fmaf(s[m][n][2 * r + j], scale, offset));
            sum += s[m][n][2 * r + j];
          }
        total[m][r] = total[m][r] * shrink + sum;
        if (__any_sync(~0u, shrink != 1.f)) {
#pragma unroll
          for (int n = 0; n < PIECES; n++) o[m][n][2 * r] *= shrink, o[m][n][2 * r + 1] *= shrink;
        }
      }
  }

  // o += weights . v
  __device__ void add(const Type* values, int lane) {
    const Type* from = values + lane % 16 * STRIDE + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < KEY_TILES / 2; k++) {
      u32 weights[TILES][4];
#pragma unroll
      for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int j = 0; j < 4; j++) weights[m][j] = pack<Type>(s[m][2 * k + j / 2][j % 2 * 2], s[m][2 * k + j / 2][j % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < PIECES; n += 2) {
        u32 v[4];
        load_matrices_transposed(v, from + k * 16 * STRIDE + n * 8);
#pragma unroll
        for (int m = 0; m < TILES; m++) multiply<Type>(o[m][n], weights[m], v[0], v[1]), multiply<Type>(o[m][n + 1], weights[m], v[2], v[3]);
      }
    }
  }

  // Sums over the lanes of a row.
  __device__ void finish() {
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        total[m][r] += __shfl_xor_sync(~0u, total[m][r], 1);
        total[m][r] += __shfl_xor_sync(~0u, total[m][r], 2);
      }
  }
};

}  // namespace tw

// A running softmax over keys and values that come straight into registers, in the order that the tensor core wants, for
// the query heads of one kv head as rows of its A (rows beyond are zero). Unused cache rows must hold finite numbers.
#pragma once
#include "outputs.cuh"
#include "pipeline.cuh"

namespace tw {

#define LOWEST (-__int_as_float(0x7f800000))

// A running softmax over tiles of 16 keys, for up to 8 query heads of one kv head, in one warp. Scores are [head][key], so that
// the lane that has a head's weights for keys 2t, 2t + 1, 2t + 8, 2t + 9 has them where the second product's B wants them;
// sums are [dimension][head], with the dimensions that a lane's 16-byte loads give it as rows.
template <class Type> struct AttentionTile {
  uint4 k[2][4], v[4][2];
  float o[8][4] = {}, high = LOWEST, total = 0.f;

  __device__ static int dimension(int j, int upper, int g) { return j / 4 * 64 + g * 8 + j % 4 * 2 + upper; }

  __device__ void load(const Type* keys, const Type* values, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) k[n][i] = __ldcg(reinterpret_cast<const uint4*>(keys + (n * 8 + g) * 128 + i * 32 + t * 8));
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        v[i][h] = __ldcg(reinterpret_cast<const uint4*>(values + (2 * t + i % 2 + i / 2 * 8) * 128 + h * 64 + g * 8));
  }

  // Key and value number `at` of the tile (any number: not in this tile) come from shared memory.
  __device__ void replace(int at, const Type* key, const Type* value, int lane) {
    const int g = lane / 4, t = lane % 4;
    if (at < 0 || at >= 16) return;
#pragma unroll
    for (int n = 0; n < 2; n++)
      if (n * 8 + g == at)
#pragma unroll
        for (int i = 0; i < 4; i++) k[n][i] = *reinterpret_cast<const uint4*>(key + i * 32 + t * 8);
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (2 * t + i % 2 + i / 2 * 8 == at)
#pragma unroll
        for (int h = 0; h < 2; h++) v[i][h] = *reinterpret_cast<const uint4*>(value + h * 64 + g * 8);
  }

  // q: [ROWS][128] in shared memory. Keys before number `first` and from number `valid` on do not count; some key must.
  template <int ROWS> __device__ void multiply(const Type* q, int first, int valid, float scale, int lane) {
    const int g = lane / 4, t = lane % 4;
    float s[2][4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint4 row = make_uint4(0, 0, 0, 0);
      if (g < ROWS) row = *reinterpret_cast<const uint4*>(q + g * 128 + i * 32 + t * 8);
      const u32 lower[4] = {row.x, 0, row.y, 0}, upper[4] = {row.z, 0, row.w, 0};
#pragma unroll
      for (int n = 0; n < 2; n++) {
        tw::multiply<Type>(s[n], lower, k[n][i].x, k[n][i].y);
        tw::multiply<Type>(s[n], upper, k[n][i].z, k[n][i].w);
      }
    }
    float new_high = high;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int key = n * 8 + 2 * t + i;
        s[n][i] = key >= first && key < valid ? s[n][i] * scale : LOWEST;
        new_high = fmaxf(new_high, s[n][i]);
      }
    new_high = fmaxf(new_high, __shfl_xor_sync(~0u, new_high, 1));
    new_high = fmaxf(new_high, __shfl_xor_sync(~0u, new_high, 2));
    const float shrink = exp2f(high - new_high);
    high = new_high;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) s[n][i] = exp2f(s[n][i] - high);
    total = total * shrink + s[0][0] + s[0][1] + s[1][0] + s[1][1];
    const u32 p0 = tw::pack<Type>(s[0][0], s[0][1]), p1 = tw::pack<Type>(s[1][0], s[1][1]);
    const float shrink0 = __shfl_sync(~0u, shrink, 8 * t), shrink1 = __shfl_sync(~0u, shrink, 8 * t + 4);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      o[j][0] *= shrink0, o[j][1] *= shrink1, o[j][2] *= shrink0, o[j][3] *= shrink1;
      const int h = j / 4, w = j % 4;
      const u32 a[4] = {__byte_perm(word(v[0][h], w), word(v[1][h], w), 0x5410), __byte_perm(word(v[0][h], w), word(v[1][h], w), 0x7632),
                        __byte_perm(word(v[2][h], w), word(v[3][h], w), 0x5410), __byte_perm(word(v[2][h], w), word(v[3][h], w), 0x7632)};
      tw::multiply<Type>(o[j], a, p0, p1);
    }
  }

  __device__ void finish(int lane) {
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
  }
};

}  // namespace tw

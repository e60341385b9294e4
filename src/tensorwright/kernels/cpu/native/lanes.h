// Movement between the lanes of vectors: sums of many vectors at once, transposition, repetition.
//
// The wide targets work on LANES vectors in log2(LANES) rounds, as a butterfly: vectors whose numbers differ in the bit
// STEP trade the lanes whose numbers differ in it.
#pragma once
#include "vector.h"

namespace tw {

#if defined(TW_AVX512) || defined(TW_AVX2)
// Lane i of the result is lane i ^ STEP.
template <int STEP>
TW_INLINE floats swap_lanes(floats v) {
#if defined(TW_AVX512)
  if constexpr (STEP == 8) return (floats)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4e);
  if constexpr (STEP == 4) return (floats)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xb1);
  return (floats)_mm512_permute_ps((__m512)v, STEP == 2 ? 0x4e : 0xb1);
#else
  if constexpr (STEP == 4) return (floats)_mm256_permute2f128_ps((__m256)v, (__m256)v, 1);
  return (floats)_mm256_permute_ps((__m256)v, STEP == 2 ? 0x4e : 0xb1);
#endif
}
// Lanes of `b` where the lane's number has the bit STEP, else of `a`.
template <int STEP>
TW_INLINE floats mix_lanes(floats a, floats b) {
  constexpr int MASK = STEP == 8 ? 0xff00 : STEP == 4 ? 0xf0f0 : STEP == 2 ? 0xcccc : 0xaaaa;
#if defined(TW_AVX512)
  return (floats)_mm512_mask_blend_ps(MASK, (__m512)a, (__m512)b);
#else
  return (floats)_mm256_blend_ps((__m256)a, (__m256)b, MASK & 0xff);
#endif
}
// Lane i is lane i ^ STEP of `b` where i has the bit STEP, else of `a`.
template <int STEP>
TW_INLINE floats cross_lanes(floats a, floats b) {
#if defined(TW_AVX512)
  if constexpr (STEP == 8) return (floats)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x4e);
  if constexpr (STEP == 2) return (floats)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x4e);
#else
  if constexpr (STEP == 4) return (floats)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x21);
  if constexpr (STEP == 2) return (floats)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x4e);
#endif
  return swap_lanes<STEP>(mix_lanes<STEP>(b, a));
}
// Lane i of v[0] becomes the operation over all lanes of v[i].
template <int STEP, class Operation>
TW_INLINE void fold_lanes(floats* v, Operation&& operation) {
  unrolled<STEP>([&](auto i) TW_INLINE_LAMBDA {
    constexpr int I = decltype(i)::value;
    v[I] = operation(mix_lanes<STEP>(v[I], v[I + STEP]), cross_lanes<STEP>(v[I], v[I + STEP]));
  });
  if constexpr (STEP > 1) fold_lanes<STEP / 2>(v, operation);
}
template <int STEP>
TW_INLINE void exchange_lanes(floats* v) {
  unrolled<LANES>([&](auto i) TW_INLINE_LAMBDA {
    constexpr int I = decltype(i)::value;
    if constexpr ((I & STEP) == 0) {
      const floats other = cross_lanes<STEP>(v[I], v[I + STEP]);
      v[I] = mix_lanes<STEP>(v[I], other);
      v[I + STEP] = mix_lanes<STEP>(other, v[I + STEP]);
    }
  });
  if constexpr (STEP > 1) exchange_lanes<STEP / 2>(v);
}
#else
template <int STEP>
TW_INLINE floats swap_lanes(floats v) {
  floats swapped;
  for (int i = 0; i < LANES; ++i) swapped[i] = v[i ^ STEP];
  return swapped;
}
#endif

// Lane i of the result is the sum of v[i]'s lanes. `v` is destroyed.
TW_INLINE floats sums_of(floats* v) {
#if defined(TW_AVX512) || defined(TW_AVX2)
  fold_lanes<LANES / 2>(v, [](floats a, floats b) TW_INLINE_LAMBDA { return a + b; });
  return v[0];
#elif defined(__SSE3__)
  const __m128 low = _mm_hadd_ps((__m128)v[0], (__m128)v[1]), high = _mm_hadd_ps((__m128)v[2], (__m128)v[3]);
  return (floats)_mm_hadd_ps(low, high);
#elif defined(__aarch64__)
  const float32x4_t low = vpaddq_f32((float32x4_t)v[0], (float32x4_t)v[1]);
  return (floats)vpaddq_f32(low, vpaddq_f32((float32x4_t)v[2], (float32x4_t)v[3]));
#else
  floats sums;
  for (int i = 0; i < LANES; ++i) sums[i] = reduce_add(v[i]);
  return sums;
#endif
}

TW_INLINE ints sums_of(ints* v) {
#if defined(TW_AVX512) || defined(TW_AVX2)
  fold_lanes<LANES / 2>((floats*)v, [](floats a, floats b) TW_INLINE_LAMBDA { return (floats)((ints)a + (ints)b); });
  return v[0];
#else
  ints sums;
  for (int i = 0; i < LANES; ++i) sums[i] = reduce_add(v[i]);
  return sums;
#endif
}

// Lane i of the result is the largest of v[i]'s lanes. `v` is destroyed.
TW_INLINE floats largest_of(floats* v) {
#if defined(TW_AVX512) || defined(TW_AVX2)
  fold_lanes<LANES / 2>(v, [](floats a, floats b) TW_INLINE_LAMBDA { return maximum(a, b); });
  return v[0];
#else
  floats largest;
  for (int i = 0; i < LANES; ++i) largest[i] = reduce_maximum(v[i]);
  return largest;
#endif
}

// Lane i of v[j] and lane j of v[i] change places.
TW_INLINE void transpose(floats* v) {
#if defined(TW_AVX512) || defined(TW_AVX2)
  exchange_lanes<LANES / 2>(v);
#else
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < i; ++j) {
      const float kept = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = kept;
    }
#endif
}

// Whether any lane of a comparison holds.
TW_INLINE bool any(ints mask) {
#if defined(TW_AVX512)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(TW_AVX2)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t lanes = 0;
  for (int i = 0; i < LANES; ++i) lanes |= mask[i];
  return lanes != 0;
#endif
}

// Lane i is from[i / TIMES]. Reads up to LANES numbers.
template <int TIMES>
TW_INLINE floats load_repeated(const float* from) {
  if constexpr (TIMES == 1) return load(from);
  if constexpr (TIMES == LANES) return broadcast(*from);
#if defined(TW_AVX512)
  return (floats)_mm512_permutexvar_ps((__m512i)(lane_numbers() / TIMES), (__m512)load(from));
#elif defined(TW_AVX2)
  return (floats)_mm256_permutevar8x32_ps((__m256)load(from), (__m256i)(lane_numbers() / TIMES));
#else
  floats repeated;
  for (int i = 0; i < LANES; ++i) repeated[i] = from[i / TIMES];
  return repeated;
#endif
}

}  // namespace tw

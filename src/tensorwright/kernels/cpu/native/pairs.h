// Products of 16-bit integers: a lane of 32 bits holds two, and one instruction multiplies and adds both, in all lanes.
// Twice the float32 rate on CPUs with VNNI. Sums are exact as long as they fit 32 bits: callers see to that.
#pragma once
#include "lanes.h"

namespace tw {

#if defined(TW_AVX512) && defined(__AVX512VNNI__)
constexpr bool HAS_PAIRS = true;
TW_INLINE ints load_pairs(const int8_t* from) { return (ints)_mm512_cvtepi8_epi16(load_as<__m256i>(from)); }
TW_INLINE ints multiply_add(ints a, ints b, ints c) {
  return (ints)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
}
#elif defined(TW_AVX2) && defined(__AVXVNNI__)
constexpr bool HAS_PAIRS = true;
TW_INLINE ints load_pairs(const int8_t* from) { return (ints)_mm256_cvtepi8_epi16(load_as<__m128i>(from)); }
TW_INLINE ints multiply_add(ints a, ints b, ints c) {
  return (ints)_mm256_dpwssd_avx_epi32((__m256i)c, (__m256i)a, (__m256i)b);
}
#else
constexpr bool HAS_PAIRS = false;
ints load_pairs(const int8_t* from);  // never called, nor the next
ints multiply_add(ints a, ints b, ints c);
#endif

TW_INLINE ints load(const int32_t* from) { return load_as<ints>(from); }
TW_INLINE void store(int32_t* to, ints vector) { memcpy(to, &vector, sizeof(vector)); }

TW_INLINE floats square_root(floats v) {
#if defined(TW_AVX512)
  return (floats)_mm512_sqrt_ps((__m512)v);
#else
  for (int i = 0; i < LANES; ++i) v[i] = sqrtf(v[i]);
  return v;
#endif
}

// Integers within 16 bits, two to a lane.
TW_INLINE ints pair(ints low, ints high) { return (low & 0xffff) | (high << 16); }

}  // namespace tw

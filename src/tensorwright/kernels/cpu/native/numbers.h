// float16 and bfloat16 in memory, float32 in registers. Knows the bit patterns; conversions to the small types round
// to the nearest, ties to even, as NumPy and ml_dtypes do.
#pragma once
#include "vector.h"

namespace tw {

struct half {  // IEEE binary16: 1 sign, 5 exponent, 10 fraction bits
  uint16_t bits;
};
struct bfloat16 {  // the upper half of a float32
  uint16_t bits;
};

TW_INLINE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
TW_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

TW_INLINE float to_float(float value) { return value; }
TW_INLINE float to_float(bfloat16 value) { return float_of_bits((uint32_t)value.bits << 16); }
TW_INLINE float to_float(half value) {
  uint32_t magnitude = value.bits & 0x7fffu, sign = (uint32_t)(value.bits & 0x8000u) << 16;
  // Moved to float32's place, the exponent is 112 too small; the product with 2^112 mends it, subnormals included.
  float scaled = float_of_bits(magnitude << 13) * 0x1p112f;
  uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN keep the full exponent
  return float_of_bits(bits_of_float(scaled) | special | sign);
}

TW_INLINE bfloat16 to_bfloat16(float value) {
  uint32_t bits = bits_of_float(value);
  if (value != value) return {(uint16_t)(bits >> 16 | 0x40)};  // a NaN must not round to infinity
  return {(uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
TW_INLINE half to_half(float value) {
  uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {(uint16_t)(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {(uint16_t)(sign | 0x7c00u)};  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves multiples of 2^-24 in the low fraction bits
    float sum = float_of_bits(magnitude) + 0.5f;
    return {(uint16_t)(sign | (bits_of_float(sum) - 0x3f000000u))};
  }
  return {(uint16_t)(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13))};
}
template <class Number>
TW_INLINE Number from_float(float value);
template <>
inline float from_float<float>(float value) { return value; }
template <>
inline half from_float<half>(float value) { return to_half(value); }
template <>
inline bfloat16 from_float<bfloat16>(float value) { return to_bfloat16(value); }

// LANES numbers from memory, widened.
TW_INLINE floats load(const bfloat16* from) {
#if defined(TW_AVX512)  // words to the upper halves of lanes in one instruction; widening and shifting are two
  const ints places = lane_numbers() << 16;
  const __m512i words = _mm512_castsi256_si512((__m256i)load_as<shorts>(from));
  return (floats)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)places, words);
#else
  return (floats)(widen(load_as<shorts>(from)) << 16);
#endif
}
TW_INLINE floats load(const half* from) {
#if defined(TW_AVX512)
  return (floats)_mm512_cvtph_ps((__m256i)load_as<shorts>(from));
#elif defined(TW_AVX2) && defined(__F16C__)
  return (floats)_mm256_cvtph_ps((__m128i)load_as<shorts>(from));
#elif defined(__aarch64__)
  return (floats)vcvt_f32_f16(load_as<float16x4_t>(from));
#else
  ints wide = widen(load_as<shorts>(from));
  ints magnitude = wide & 0x7fff;
  floats scaled = (floats)(magnitude << 13) * 0x1p112f;
  ints special = (magnitude >= 0x7c00) & 0x7f800000;
  return (floats)((ints)scaled | special | ((wide & 0x8000) << 16));
#endif
}

// LANES numbers to memory, narrowed.
TW_INLINE void store(bfloat16* to, floats vector) {
  ints bits = (ints)vector;
  ints rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  ints not_a_number = vector != vector;
  shorts narrow = __builtin_convertvector((not_a_number & (bits >> 16 | 0x40)) | (~not_a_number & rounded), shorts);
  memcpy(to, &narrow, sizeof(narrow));
}
TW_INLINE void store(half* to, floats vector) {
#if defined(TW_AVX512)
  __m256i narrow = _mm512_cvtps_ph((__m512)vector, _MM_FROUND_TO_NEAREST_INT);
  memcpy(to, &narrow, sizeof(narrow));
#elif defined(TW_AVX2) && defined(__F16C__)
  __m128i narrow = _mm256_cvtps_ph((__m256)vector, _MM_FROUND_TO_NEAREST_INT);
  memcpy(to, &narrow, sizeof(narrow));
#elif defined(__aarch64__)
  float16x4_t narrow = vcvt_f16_f32((float32x4_t)vector);
  memcpy(to, &narrow, sizeof(narrow));
#else
  for (int i = 0; i < LANES; i++) to[i] = to_half(vector[i]);
#endif
}

}  // namespace tw

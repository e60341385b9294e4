// Vectors of float32 and int32 as wide as the target's registers. Knows the instruction sets, not the kernels.
//
// `floats` and `ints` are the compiler's vector types: + - * & | ^ << >> < > and ?: work on them on every target. What
// those cannot say, or say slowly, is a function here. LANES is 16 (AVX-512), 8 (AVX2) or 4 (SSE, NEON, plain C++).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define TW_INLINE static inline __attribute__((always_inline))
#define TW_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define TW_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define TW_AVX2 1
#endif

namespace tw {

#if defined(TW_AVX512)
constexpr int LANES = 16;
#elif defined(TW_AVX2)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));
typedef uint8_t unsigned_bytes __attribute__((vector_size(LANES)));

// Calls body(index<0>()) ... body(index<COUNT - 1>()). Indices that are constants let arrays of vectors stay in
// registers: gcc 12 keeps them in memory when a loop indexes them.
template <int I>
struct index {
  static constexpr int value = I;
};
template <int COUNT, int I = 0, class Body>
TW_INLINE void unrolled(Body&& body) {
  if constexpr (I < COUNT) {
    body(index<I>());
    unrolled<COUNT, I + 1>(body);
  }
}

template <class Vector>
TW_INLINE Vector load_as(const void* from) {
  Vector vector;
  memcpy(&vector, from, sizeof(Vector));
  return vector;
}
TW_INLINE floats load(const float* from) { return load_as<floats>(from); }
TW_INLINE void store(float* to, floats vector) { memcpy(to, &vector, sizeof(vector)); }

// The first `count` (0 .. LANES) numbers; the other lanes are 0.
TW_INLINE floats load(const float* from, int count) {
#if defined(TW_AVX512)
  return (floats)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#else
  floats vector = {};
  memcpy(&vector, from, sizeof(float) * (size_t)count);
  return vector;
#endif
}
TW_INLINE void store(float* to, floats vector, int count) {
#if defined(TW_AVX512)
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)vector);
#else
  memcpy(to, &vector, sizeof(float) * (size_t)count);
#endif
}

TW_INLINE floats broadcast(float value) { return value - floats{}; }
TW_INLINE ints broadcast(int32_t value) { return value - ints{}; }
TW_INLINE ints broadcast_bytes(const int8_t* four) {  // the same four bytes in every lane
  int32_t word;
  memcpy(&word, four, 4);
  return broadcast(word);
}

// Small integers to 32 bits and back. gcc 12 takes __builtin_convertvector apart, lane by lane, below AVX-512.
TW_INLINE ints widen(shorts vector) {
#if defined(TW_AVX2)
  return (ints)_mm256_cvtepu16_epi32((__m128i)vector);
#elif defined(__SSE4_1__) && !defined(TW_AVX512)
  return (ints)_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)&vector));
#else
  return __builtin_convertvector(vector, ints);
#endif
}
TW_INLINE ints widen(unsigned_bytes vector) {
#if defined(TW_AVX2)
  return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&vector));
#elif defined(__SSE4_1__) && !defined(TW_AVX512)
  int32_t four;
  memcpy(&four, &vector, 4);
  return (ints)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four));
#else
  return __builtin_convertvector(vector, ints);
#endif
}
TW_INLINE void store_bytes(int8_t* to, ints vector) {  // numbers outside int8 give no defined byte
#if defined(TW_AVX2)
  __m128i low = _mm256_castsi256_si128((__m256i)vector), high = _mm256_extracti128_si256((__m256i)vector, 1);
  __m128i words = _mm_packs_epi32(low, high);
  _mm_storel_epi64((__m128i*)to, _mm_packs_epi16(words, words));
#elif defined(__SSE2__) && !defined(TW_AVX512)
  __m128i words = _mm_packs_epi32((__m128i)vector, (__m128i)vector);
  int32_t four = _mm_cvtsi128_si32(_mm_packs_epi16(words, words));
  memcpy(to, &four, 4);
#else
  bytes narrow = __builtin_convertvector(vector, bytes);
  memcpy(to, &narrow, sizeof(narrow));
#endif
}

TW_INLINE floats to_floats(ints vector) { return __builtin_convertvector(vector, floats); }

// a · b + c, rounded once where the target has fused arithmetic.
TW_INLINE floats multiply_add(floats a, floats b, floats c) {
#if defined(TW_AVX512)
  return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(TW_AVX2)
  return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

TW_INLINE floats maximum(floats a, floats b) {
#if defined(TW_AVX512)
  return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(TW_AVX2)
  return (floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
TW_INLINE floats minimum(floats a, floats b) { return a < b ? a : b; }
TW_INLINE floats absolute(floats a) { return (floats)((ints)a & 0x7fffffff); }

// To the nearest integer, ties to even.
TW_INLINE ints round_to_ints(floats a) {
#if defined(TW_AVX512)
  return (ints)_mm512_cvtps_epi32((__m512)a);
#elif defined(TW_AVX2)
  return (ints)_mm256_cvtps_epi32((__m256)a);
#elif defined(__SSE2__)
  return (ints)_mm_cvtps_epi32((__m128)a);
#elif defined(__aarch64__)
  return (ints)vcvtnq_s32_f32((float32x4_t)a);
#else
  ints rounded;
  for (int i = 0; i < LANES; i++) rounded[i] = (int32_t)lrintf(a[i]);
  return rounded;
#endif
}

// Sums and maxima fold halves onto each other: log2(LANES) steps, the same order on every run.
TW_INLINE float reduce_add(floats a) {
#if defined(TW_AVX512)
  return _mm512_reduce_add_ps((__m512)a);
#else
  float lanes[LANES];
  memcpy(lanes, &a, sizeof(a));
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}
TW_INLINE float reduce_maximum(floats a) {
#if defined(TW_AVX512)
  return _mm512_reduce_max_ps((__m512)a);
#else
  float lanes[LANES];
  memcpy(lanes, &a, sizeof(a));
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
#endif
}
TW_INLINE ints maximum(ints a, ints b) { return a > b ? a : b; }
TW_INLINE int32_t reduce_maximum(ints a) {
#if defined(TW_AVX512)
  return _mm512_reduce_max_epi32((__m512i)a);
#else
  int32_t lanes[LANES];
  memcpy(lanes, &a, sizeof(a));
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
#endif
}
TW_INLINE int32_t reduce_add(ints a) {
#if defined(TW_AVX512)
  return _mm512_reduce_add_epi32((__m512i)a);
#else
  int32_t lanes[LANES];
  memcpy(lanes, &a, sizeof(a));
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

TW_INLINE ints lane_numbers() {
  ints lanes;
  for (int i = 0; i < LANES; ++i) lanes[i] = i;
  return lanes;
}

TW_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

}  // namespace tw

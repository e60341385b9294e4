// Rows of the KV cache: one head of one token, as float32, float16, bfloat16, or int8 with a float32 scale.
// Cache [blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_SIZE], scales [blocks, 2, KV_HEADS, BLOCK_SIZE]; keys 0, values 1.
#pragma once
#include "numbers.h"

namespace tw {

TW_INLINE floats load(const int8_t* from) {
#if defined(TW_AVX512)
  return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(from)));
#elif defined(TW_AVX2)
  return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  return to_floats(__builtin_convertvector(load_as<bytes>(from), ints));
#endif
}

// Vector number V of a row of SIZE numbers; lanes beyond the row are 0, and nothing beyond it is read.
template <int SIZE, int V, class Number>
TW_INLINE floats load_part(const Number* row) {
  if constexpr ((V + 1) * LANES <= SIZE) {
    return load(row + V * LANES);
  } else {
    Number part[LANES] = {};
    memcpy(part, row + V * LANES, (SIZE - V * LANES) * sizeof(Number));
    return load(part);
  }
}

// Compared as integers, for which NaN is above infinity: either ends up in the scale, and so in every result.
template <int SIZE>
TW_INLINE float largest_magnitude(const float* row) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < SIZE; ++i) {
    const uint32_t magnitude = bits_of_float(row[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return float_of_bits(largest);
}

// Writes one head of one token. `scale` is used by int8 only: max|x| / 127, and codes are x * 127 / max|x| rounded.
template <int SIZE, class Number>
TW_INLINE void store_head(Number* to, float* scale, const float* row) {
  if constexpr (sizeof(Number) == 1) {
    const float largest = largest_magnitude<SIZE>(row);
    const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    *scale = largest / 127.0f;
    for (int i = 0; i < SIZE; ++i) to[i] = (int8_t)rintf(row[i] * inverse);
  } else if constexpr (sizeof(Number) == 4) {
    memcpy(to, row, SIZE * sizeof(float));
  } else {
    constexpr int WHOLE = SIZE / LANES * LANES;
    for (int i = 0; i < WHOLE; i += LANES) store(to + i, load(row + i));
    for (int i = WHOLE; i < SIZE; ++i) to[i] = from_float<Number>(row[i]);
  }
}

// Where the numbers of a slot (block * BLOCK_SIZE + offset) or of a block lie.
template <int KV_HEADS, int HEAD_SIZE, int BLOCK_SIZE>
struct kv_layout {
  static constexpr int64_t scale_at(int64_t block, int which, int head, int offset) {
    return ((block * 2 + which) * KV_HEADS + head) * BLOCK_SIZE + offset;
  }
  static constexpr int64_t row_at(int64_t block, int which, int head, int offset) {
    return scale_at(block, which, head, offset) * HEAD_SIZE;
  }
  template <class Number>
  TW_INLINE void write(Number* kv, float* scales, int32_t slot, int which, int head, const float* row) {
    const int64_t block = slot / BLOCK_SIZE;
    const int offset = slot % BLOCK_SIZE;
    float* scale = scales ? scales + scale_at(block, which, head, offset) : nullptr;
    store_head<HEAD_SIZE>(kv + row_at(block, which, head, offset), scale, row);
  }
};

}  // namespace tw

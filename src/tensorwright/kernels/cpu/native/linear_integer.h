// Products of int4 or int8 weights with int8 activations: dot products of four neighbouring inputs at a time.
//
// Layout "dot64": panels of 64 outputs; in a panel one block per group of inputs; in a block 32-bit words [words][64],
// word w of a column holding inputs 4w .. 4w + 3 of the block (int8, code + 128), or inputs 8w .. 8w + 3 in the low
// and 8w + 4 .. 8w + 7 in the high nibbles of its bytes (int4, code + 8); then the 64 scales of the group. With one
// scale per output these stand once, at the panel's end. A worker reads its panels as one sequential stream:
// int4 in groups of 128 with 16-bit scales is 4,224 bytes per block, 4.125 bits per weight.
#pragma once
#include "linear_input.h"
#include "numbers.h"

#if (defined(TW_AVX512) && defined(__AVX512VNNI__)) || (defined(TW_AVX2) && defined(__AVXVNNI__))
#define TW_DOT_UNSIGNED 1  // the dot product takes unsigned weights of all eight bits
#endif

namespace tw {

constexpr int PANEL = 64;                             // outputs of a panel
constexpr int COLUMN_VECTORS = 4;                     // vectors of outputs that a tile holds in registers
constexpr int TILE_COLUMNS = COLUMN_VECTORS * LANES;  // 64, 32 or 16: a panel is 1, 2 or 4 tiles wide
#if defined(TW_AVX512) || defined(__aarch64__)
constexpr int MAX_TILE_ROWS = 4;  // 16 sums, the weights and an activation fit 32 registers
#else
constexpr int MAX_TILE_ROWS = 2;  // 16 registers
#endif
#if defined(TW_AVX512) && defined(__AVX512VNNI__)
constexpr int CACHED_TILE_ROWS = 3;  // for weights in the first-level cache: 986 GOP/s a core, 4 rows 958 (Zen 5)
#else
constexpr int CACHED_TILE_ROWS = MAX_TILE_ROWS;
#endif

// What is added to a weight's code in the operand that `dot` takes.
template <int BITS>
constexpr int32_t weight_shift() {
#if defined(TW_DOT_UNSIGNED)
  return BITS == 4 ? 8 : 128;
#else
  return BITS == 4 ? 8 : 0;
#endif
}

// Stored int8 codes (+ 128) as the operand.
TW_INLINE ints int8_operand(ints stored) {
#if defined(TW_DOT_UNSIGNED)
  return stored;
#else
  return stored ^ (int32_t)0x80808080;
#endif
}

// sums + Σ of four neighbouring bytes, weight · activation, in each 32-bit lane. int4 weights are 0 .. 15; int8 weights
// are 0 .. 255, or signed where the target's instruction wants that. Activations are −127 .. 127.
template <int BITS>
TW_INLINE ints dot(ints sums, ints weights, ints activations) {
#if defined(TW_AVX512) && defined(__AVX512VNNI__)
  return (ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)activations);
#elif defined(TW_AVX512)
  __m512i magnitude = (__m512i)weights, other = (__m512i)activations;
  if constexpr (BITS == 8) {  // |w| · sign(w) a: pairs stay below 2^15, so nothing saturates
    magnitude = _mm512_abs_epi8((__m512i)weights);
    other = _mm512_mask_sub_epi8(other, _mm512_movepi8_mask((__m512i)weights), _mm512_setzero_si512(), other);
  }
  return sums + (ints)_mm512_madd_epi16(_mm512_maddubs_epi16(magnitude, other), _mm512_set1_epi16(1));
#elif defined(TW_AVX2) && defined(__AVXVNNI__)
  return (ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights, (__m256i)activations);
#elif defined(TW_AVX2)
  __m256i magnitude = (__m256i)weights, other = (__m256i)activations;
  if constexpr (BITS == 8) {
    magnitude = _mm256_abs_epi8((__m256i)weights);
    other = _mm256_sign_epi8((__m256i)activations, (__m256i)weights);
  }
  return sums + (ints)_mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, other), _mm256_set1_epi16(1));
#elif defined(__SSSE3__)
  __m128i magnitude = (__m128i)weights, other = (__m128i)activations;
  if constexpr (BITS == 8) {
    magnitude = _mm_abs_epi8((__m128i)weights);
    other = _mm_sign_epi8((__m128i)activations, (__m128i)weights);
  }
  return sums + (ints)_mm_madd_epi16(_mm_maddubs_epi16(magnitude, other), _mm_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (ints)vdotq_s32((int32x4_t)sums, (int8x16_t)weights, (int8x16_t)activations);
#else
  for (int shift = 0; shift < 32; shift += 8)  // sign-extended bytes, four lanes at a time
    sums += (weights << (24 - shift) >> 24) * (activations << (24 - shift) >> 24);
  return sums;
#endif
}

// GROUP inputs share an activation scale and, unless PER_OUTPUT, a weight scale. GROUP is a multiple of 8.
template <int BITS, int GROUP, class Scale, bool PER_OUTPUT>
struct integer_weights {
  static constexpr bool SCALES_OUTPUTS = PER_OUTPUT;
  static constexpr int STEPS = GROUP / 8;  // of 8 inputs: one word of int4, two of int8
  static constexpr int WORD_BYTES = PANEL * 4;
  static constexpr int STEP_BYTES = BITS == 4 ? WORD_BYTES : 2 * WORD_BYTES;
  static constexpr int CODE_BYTES = STEPS * STEP_BYTES;
  static constexpr int BLOCK_INPUTS = GROUP;
  static constexpr int BLOCK_BYTES = CODE_BYTES + (PER_OUTPUT ? 0 : PANEL * (int)sizeof(Scale));
  // A block of int8 takes long enough to read; int4 only loses by it (4 % with 8 rows).
  static constexpr bool SHARES_PREFETCH = BITS == 8;
  static constexpr int64_t PREFETCH_BYTES = 2 * 4224;  // ahead of the stream, about what memory latency asks for

  static constexpr int num_blocks(int k) { return (k + GROUP - 1) / GROUP; }
  static constexpr int64_t panel_bytes(int k) {
    return (int64_t)num_blocks(k) * BLOCK_BYTES + (PER_OUTPUT ? PANEL * (int)sizeof(Scale) : 0);
  }
  static TW_INLINE_LAMBDA inline floats output_scale(const uint8_t* panel, int k, int column) {
    return load((const Scale*)(panel + (int64_t)num_blocks(k) * BLOCK_BYTES) + column);
  }

  using rows_type = quantized_rows;
  static constexpr int64_t ROW_BYTES_PER_INPUT = 1;
  template <class Input>
  static quantized_rows prepare(const float* x, const float* norm, void* scratch, int64_t rows,
                                const tw_worker* worker) {
    quantized_rows prepared(scratch, rows, Input::SIZE, GROUP);
    prepared.fill<Input, GROUP>(x, norm, rows, weight_shift<BITS>(), worker);
    return prepared;
  }
  template <class Input>
  static constexpr bool NEEDS_PREPARATION = true;

  // Inputs 8 · step + 4 · HALF .. + 3 of LANES columns, as `dot` takes them.
  template <int HALF>
  static TW_INLINE_LAMBDA inline ints operand(const uint8_t* block, int step, int column) {
    if constexpr (BITS == 8)
      return int8_operand(load_as<ints>(block + step * STEP_BYTES + HALF * WORD_BYTES + column * 4));
    ints word = load_as<ints>(block + step * STEP_BYTES + column * 4);
    return (HALF ? word >> 4 : word) & 0x0f0f0f0f;
  }
  static TW_INLINE_LAMBDA inline floats scaled(floats sum, ints dots, const uint8_t* block, int column, float scale) {
    if constexpr (PER_OUTPUT) return multiply_add(to_floats(dots), broadcast(scale), sum);
    floats weight_scale = load((const Scale*)(block + CODE_BYTES) + column);
    return multiply_add(to_floats(dots), weight_scale * scale, sum);
  }

  // sums [ROWS, PANEL] (+)= rows · blocks [first, last) of a panel; from zero when first is 0. A step's weights are
  // held and its rows pass by; with rows held and weights passing, gcc 12 made code that took 10 % longer (Zen 5).
  template <int ROWS>
  static __attribute__((noinline)) void tile(const uint8_t* panel, int, int first, int last,
                                             const quantized_rows& rows, float* sums, int lines) {
    const float* scales = rows.scales;
    const int32_t* offsets = rows.offsets;
    const int64_t groups = rows.groups, stride = rows.stride;
    if (first == 0)
      for (int i = 0; i < ROWS * PANEL; i += LANES) store(sums + i, floats{});
    for (int group = first; group < last; group++) {
      const uint8_t* block = panel + (int64_t)group * BLOCK_BYTES;
      const int8_t* codes = rows.codes + group * GROUP;
      for (int column = 0; column < PANEL; column += TILE_COLUMNS) {
        ints dots[ROWS][COLUMN_VECTORS];
        unrolled<ROWS>([&](auto row) TW_INLINE_LAMBDA {
          ints offset = broadcast(offsets[row.value * groups + group]);
          unrolled<COLUMN_VECTORS>([&](auto i) TW_INLINE_LAMBDA { dots[row.value][i.value] = offset; });
        });
        for (int step = 0; step < STEPS; step++)
          unrolled<2>([&](auto half) TW_INLINE_LAMBDA {
            ints weights[COLUMN_VECTORS];
            unrolled<COLUMN_VECTORS>([&](auto i) TW_INLINE_LAMBDA {
              int place = column + i.value * LANES;
              constexpr bool STARTS_WORDS = BITS == 8 || half.value == 0;  // both halves of an int4 word lie together
              if (STARTS_WORDS && place % 16 == 0 && (SHARES_PREFETCH ? lines >> place / 16 & 1 : lines))
                prefetch(block + step * STEP_BYTES + half.value * WORD_BYTES + place * 4 + BLOCK_BYTES);
              weights[i.value] = operand<half.value>(block, step, place);
            });
            unrolled<ROWS>([&](auto row) TW_INLINE_LAMBDA {
              ints activations = broadcast_bytes(codes + row.value * stride + step * 8 + half.value * 4);
              unrolled<COLUMN_VECTORS>([&](auto i) TW_INLINE_LAMBDA {
                dots[row.value][i.value] = dot<BITS>(dots[row.value][i.value], weights[i.value], activations);
              });
            });
          });
        asm volatile("" ::: "memory");  // else gcc 12 keeps the sums of all groups in registers, and these on the stack
        floats weight_scales[COLUMN_VECTORS];
        unrolled<COLUMN_VECTORS>([&](auto i) TW_INLINE_LAMBDA {
          if constexpr (!PER_OUTPUT)
            weight_scales[i.value] = load((const Scale*)(block + CODE_BYTES) + column + i.value * LANES);
        });
        unrolled<ROWS>([&](auto row) TW_INLINE_LAMBDA {
          floats scale = broadcast(scales[row.value * groups + group]);
          unrolled<COLUMN_VECTORS>([&](auto i) TW_INLINE_LAMBDA {
            float* sum = sums + row.value * PANEL + column + i.value * LANES;
            floats factor = scale;
            if constexpr (!PER_OUTPUT) factor = weight_scales[i.value] * scale;
            store(sum, multiply_add(to_floats(dots[row.value][i.value]), factor, load(sum)));
          });
        });
      }
    }
  }

  // One row times a whole panel, bound by memory: 8 chains of dot products and the float sums stay in registers, and
  // the bits are those of `tile`. Only where a panel is one tile wide.
  static __attribute__((noinline)) void panel_times_row(const uint8_t* panel, int k, const quantized_rows& row,
                                                        float* sums) {
    floats totals[COLUMN_VECTORS] = {};
    const uint8_t* block = panel;
    for (int group = 0; group < num_blocks(k); group++, block += BLOCK_BYTES) {
      ints dots[2][COLUMN_VECTORS];
      unrolled<COLUMN_VECTORS>([&](auto i) TW_INLINE_LAMBDA {
        dots[0][i.value] = broadcast(row.offsets[group]);
        dots[1][i.value] = ints{};
      });
      const int8_t* codes = row.codes + group * GROUP;
#pragma GCC unroll 1  // unrolled, gcc gathers the prefetches of several steps: 6 % less bandwidth on Zen 5
      for (int step = 0; step < STEPS; step++) {
        ints activations[2] = {broadcast_bytes(codes + step * 8), broadcast_bytes(codes + step * 8 + 4)};
        unrolled<COLUMN_VECTORS>([&](auto i) TW_INLINE_LAMBDA {
          const uint8_t* line = block + step * STEP_BYTES + i.value * LANES * 4;
          prefetch(line + PREFETCH_BYTES);
          if (BITS == 8) prefetch(line + WORD_BYTES + PREFETCH_BYTES);
          unrolled<2>([&](auto half) TW_INLINE_LAMBDA {
            ints weights = operand<half.value>(block, step, i.value * LANES);
            dots[half.value][i.value] = dot<BITS>(dots[half.value][i.value], weights, activations[half.value]);
          });
        });
      }
      unrolled<COLUMN_VECTORS>([&](auto i) TW_INLINE_LAMBDA {
        ints both = dots[0][i.value] + dots[1][i.value];
        totals[i.value] = scaled(totals[i.value], both, block, i.value * LANES, row.scales[group]);
      });
    }
    unrolled<COLUMN_VECTORS>([&](auto i) TW_INLINE_LAMBDA { store(sums + i.value * LANES, totals[i.value]); });
  }
};

}  // namespace tw

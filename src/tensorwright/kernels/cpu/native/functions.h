// exp and the activation functions over vectors, to about float32's own precision. Knows formulas, not ops.
#pragma once
#include "vector.h"

namespace tw {

// e^x within 2 units in the last place; 0 below -87.3, no infinity: x is held at 88.
// Cephes' scheme: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for e^r, then n goes into the exponent bits.
TW_INLINE floats exponential(floats x) {
  floats held = minimum(maximum(x, broadcast(-87.3f)), broadcast(88.0f));
  ints n = round_to_ints(held * 1.44269504088896341f);
  floats whole = to_floats(n);
  floats r = multiply_add(whole, broadcast(-0.693359375f), held);  // ln 2 in two parts: the first has few bits
  r = multiply_add(whole, broadcast(2.12194440e-4f), r);
  floats p = broadcast(1.9875691500e-4f);
  p = multiply_add(p, r, broadcast(1.3981999507e-3f));
  p = multiply_add(p, r, broadcast(8.3334519073e-3f));
  p = multiply_add(p, r, broadcast(4.1665795894e-2f));
  p = multiply_add(p, r, broadcast(1.6666665459e-1f));
  p = multiply_add(p, r, broadcast(5.0000001201e-1f));
  p = multiply_add(p, r * r, r + 1.0f);
  floats power = (floats)((n + 127) << 23);
  return (floats)((ints)(p * power) & (x >= -87.3f));
}

// 2^x for x <= 16, within 3 units in the last place (COARSE: within 2^-18 of it). NaN stays NaN.
// 0 below -100 or, elsewhere than with AVX-512, -126.5: that instruction is slow where its result is denormal.
template <bool COARSE = false>
TW_INLINE floats exponential2(floats x) {
#if defined(TW_AVX512)  // 2^floor(x) and x - floor(x) are an instruction each
  const floats r = (floats)_mm512_reduce_ps((__m512)x, 0x9);
  floats p = broadcast(COARSE ? 0.013534178957343102f : 0.0018775780918076634f);
  if constexpr (COARSE) {
    p = multiply_add(p, r, broadcast(0.05201149359345436f));
    p = multiply_add(p, r, broadcast(0.2414426952600479f));
    p = multiply_add(p, r, broadcast(0.6930038332939148f));
  } else {
    p = multiply_add(p, r, broadcast(0.008989342488348484f));
    p = multiply_add(p, r, broadcast(0.05582631006836891f));
    p = multiply_add(p, r, broadcast(0.24015362560749054f));
    p = multiply_add(p, r, broadcast(0.6931530833244324f));
  }
  p = multiply_add(p, r, broadcast(1.0f));
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-100.0f), _CMP_NLT_UQ);
  return (floats)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)x);
#else
  // x + 1.5 * 2^23 rounds x to an integer and leaves it in the low bits: with 127 more, they are the exponent's.
  const floats shift = broadcast(12582912.0f + 127.0f);
  const floats held = maximum(broadcast(-127.0f), x);  // the operands' order lets NaN through
  const floats shifted = held + shift;
  const floats r = held - (shifted - shift);  // in [-1/2, 1/2]
  floats p = broadcast(0.001327647129073739f);
  p = multiply_add(p, r, broadcast(0.009675540961325169f));
  p = multiply_add(p, r, broadcast(0.05550713092088699f));
  p = multiply_add(p, r, broadcast(0.24022120237350464f));
  p = multiply_add(p, r, broadcast(0.6931469440460205f));
  p = multiply_add(p, r, broadcast(1.0f));
  return p * (floats)((ints)shifted << 23);
#endif
}

TW_INLINE floats sigmoid(floats x) { return 1.0f / (1.0f + exponential(-x)); }
TW_INLINE floats silu(floats x) { return x * sigmoid(x); }

// x · Phi(x). 1 - erf by Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7.
TW_INLINE floats gelu(floats x) {
  floats z = absolute(x) * 0.70710678118654752f;
  floats t = 1.0f / multiply_add(z, broadcast(0.3275911f), broadcast(1.0f));
  floats p = broadcast(1.061405429f);
  p = multiply_add(p, t, broadcast(-1.453152027f));
  p = multiply_add(p, t, broadcast(1.421413741f));
  p = multiply_add(p, t, broadcast(-0.284496736f));
  p = multiply_add(p, t, broadcast(0.254829592f));
  floats tail = 0.5f * p * t * exponential(-(z * z));  // Phi(-|x|)
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// 0.5 x (1 + tanh(u)) = x · sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
TW_INLINE floats gelu_tanh(floats x) {
  return x * sigmoid(1.5957691216057308f * multiply_add(0.044715f * x, x * x, x));
}

enum class activation { none, silu, gelu, gelu_tanh };

template <activation FUNCTION>
TW_INLINE floats activate(floats x) {
  if constexpr (FUNCTION == activation::silu) return silu(x);
  if constexpr (FUNCTION == activation::gelu) return gelu(x);
  if constexpr (FUNCTION == activation::gelu_tanh) return gelu_tanh(x);
  return x;
}

}  // namespace tw

// Small floating-point numbers as bits, and their conversions. Knows no registers.
#pragma once
#include <cmath>

#include "machine.h"

namespace sim {

inline u32 bits_of(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(u32 bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// A format of EXPONENT and MANTISSA bits below a sign. `INFINITIES`: it has them; otherwise the largest code is NaN (e4m3).
template <int EXPONENT, int MANTISSA, bool INFINITIES> struct Small {
  static constexpr int BIAS = (1 << (EXPONENT - 1)) - 1, LARGEST = (1 << EXPONENT) - 1, SIGN = EXPONENT + MANTISSA;

  static float wide(u32 code) {
    const u32 exponent = code >> MANTISSA & LARGEST, mantissa = code & ((1u << MANTISSA) - 1);
    float value;
    if (INFINITIES && exponent == LARGEST) value = mantissa ? NAN : INFINITY;
    else if (!INFINITIES && (code & ((1u << SIGN) - 1)) == (1u << SIGN) - 1) value = NAN;
    else if (exponent) value = std::ldexp(float((1u << MANTISSA) + mantissa), int(exponent) - BIAS - MANTISSA);
    else value = std::ldexp(float(mantissa), 1 - BIAS - MANTISSA);
    return code >> SIGN & 1 ? -value : value;
  }

  // Nearest, ties to even. Too large: infinity or NaN, or, saturated, the largest finite number.
  static u32 narrow(double x, bool is_saturated = false) {
    const u32 sign = std::signbit(x) ? 1u << SIGN : 0;
    const u32 top = INFINITIES ? (u32(LARGEST) << MANTISSA) - 1 : (1u << SIGN) - 2;  // the largest finite code
    if (std::isnan(x)) return (1u << SIGN) - 1;
    const double size = std::fabs(x);
    int exponent = 0;
    std::frexp(size, &exponent);
    const int least = std::max(exponent - 1, 1 - BIAS) - MANTISSA;  // of the last mantissa bit
    const double steps = std::nearbyint(std::ldexp(size, -least));
    const double rounded = std::ldexp(steps, least);
    if (rounded > wide(top)) return sign | (is_saturated ? top : INFINITIES ? top + 1 : (1u << SIGN) - 1);
    if (rounded == 0) return sign;
    std::frexp(rounded, &exponent);
    exponent -= 1;
    if (exponent < 1 - BIAS) return sign | u32(std::ldexp(rounded, BIAS - 1 + MANTISSA));
    return sign | ((u32(exponent + BIAS - 1) << MANTISSA) + u32(std::ldexp(rounded, MANTISSA - exponent)));
  }
};

using Half = Small<5, 10, true>;
using Brain = Small<8, 7, true>;
using E4M3 = Small<4, 3, false>;
using E5M2 = Small<5, 2, true>;

struct f16 {
  u16 bits;
  operator float() const { return (float)reinterpret_cast<const _Float16&>(bits); }
  static f16 of(float x) {
    const _Float16 half = (_Float16)x;
    f16 result;
    std::memcpy(&result.bits, &half, 2);
    return result;
  }
};
struct bf16 {
  u16 bits;
  operator float() const { return float_of(u32(bits) << 16); }
  static bf16 of(float x) {
    const u32 wide = bits_of(x);
    return std::isnan(x) ? bf16{0x7fff} : bf16{u16((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
  }
};
template <class T> struct Two {
  T lower, upper;
};

}  // namespace sim

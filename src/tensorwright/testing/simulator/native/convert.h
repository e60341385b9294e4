// cvt: conversions between all types, with PTX's roundings; packing two numbers into one register. Knows no memory.
#pragma once
#include "scalar.h"

namespace sim {

enum Rounding { NEAREST = 0, ZERO = 1, DOWN = 2, UP = 3, SATURATED = 8 };  // Instruction::mode

template <class T> constexpr bool is_small = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;
template <class T> constexpr bool is_float = std::is_floating_point_v<T> || is_small<T>;

inline double rounded(double x, int mode) {
  switch (mode & 7) {
    case ZERO: return std::trunc(x);
    case DOWN: return std::floor(x);
    case UP: return std::ceil(x);
    default: return std::nearbyint(x);
  }
}
template <class D> D from_double(double x) {
  if constexpr (is_small<D>) return D::of(float(x));
  else return D(x);
}
// Float to float keeps fractions unless mode has 16 (rni and its kin); float to integer clamps.
template <class D, class A> D converted(A a, int mode) {
  if constexpr (is_float<A> && is_float<D>) {
    double x = double(a);
    if (mode & 16) x = rounded(x, mode);
    if (mode & SATURATED) x = std::isnan(x) ? 0.0 : std::min(1.0, std::max(0.0, x));
    return from_double<D>(x);
  } else if constexpr (is_float<A>) {
    const double x = rounded(double(a), mode);
    if (std::isnan(x)) return D(0);
    if (x <= double(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
    if (x >= double(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
    return D(x);
  } else if constexpr (is_float<D>) {
    if constexpr (std::is_same_v<D, float>) return float(a);
    else return from_double<D>(double(a));
  } else {
    if (mode & SATURATED)
      return D(std::min<__int128>(std::max<__int128>(a, std::numeric_limits<D>::min()), std::numeric_limits<D>::max()));
    return D(a);
  }
}
template <class D, class A> void conversion(Table& table, const std::string& to, const std::string& from) {
  UNARY("cvt." + to + "." + from, D, A, (converted<D, A>(a, in.mode)));
}
template <class A> void conversions_of(Table& table, const std::string& from) {
  conversion<i8_t, A>(table, "s8", from), conversion<u8, A>(table, "u8", from);
  conversion<i16, A>(table, "s16", from), conversion<u16, A>(table, "u16", from);
  conversion<i32, A>(table, "s32", from), conversion<u32, A>(table, "u32", from);
  conversion<i64, A>(table, "s64", from), conversion<u64, A>(table, "u64", from);
  conversion<float, A>(table, "f32", from), conversion<double, A>(table, "f64", from);
  conversion<f16, A>(table, "f16", from), conversion<bf16, A>(table, "bf16", from);
}

// From the lower part of a 64-bit register.
template <class A> void conversions_of_low(Table& table, const std::string& from) {
  UNARY("cvt.s64." + from + ".low", i64, u64, i64(A(a)));
  UNARY("cvt.u64." + from + ".low", u64, u64, u64(A(a)));
  UNARY("cvt.s32." + from + ".low", i32, u64, i32(A(a)));
  UNARY("cvt.u32." + from + ".low", u32, u64, u32(A(a)));
}

// The first operand goes into the upper half.
template <class Format> void narrow_pairs(Table& table, const std::string& type) {
  BINARY("cvt." + type + "x2.f32", u16, float, float,
         Format::narrow(a, in.mode & SATURATED) << 8 | Format::narrow(b, in.mode & SATURATED));
  UNARY("cvt." + type + "x2.f16x2", u16, Two<f16>,
        Format::narrow(float(a.upper), in.mode & SATURATED) << 8 | Format::narrow(float(a.lower), in.mode & SATURATED));
  using Halves = Two<f16>;
  UNARY("cvt.f16x2." + type + "x2", Halves, u16, (Halves{f16::of(Format::wide(a & 255)), f16::of(Format::wide(a >> 8))}));
}

inline void convert_table(Table& table) {
  conversions_of<i8_t>(table, "s8"), conversions_of<u8>(table, "u8");
  conversions_of<i16>(table, "s16"), conversions_of<u16>(table, "u16");
  conversions_of<i32>(table, "s32"), conversions_of<u32>(table, "u32");
  conversions_of<i64>(table, "s64"), conversions_of<u64>(table, "u64");
  conversions_of<float>(table, "f32"), conversions_of<double>(table, "f64");
  conversions_of<f16>(table, "f16"), conversions_of<bf16>(table, "bf16");
  conversions_of_low<i32>(table, "s32"), conversions_of_low<u32>(table, "u32");
  conversions_of_low<i16>(table, "s16"), conversions_of_low<u16>(table, "u16");
  conversions_of_low<i8_t>(table, "s8"), conversions_of_low<u8>(table, "u8");
  narrow_pairs<E4M3>(table, "e4m3"), narrow_pairs<E5M2>(table, "e5m2");
  using Halves = Two<f16>;
  using Brains = Two<bf16>;
  BINARY("cvt.f16x2.f32", Halves, float, float, (Halves{f16::of(b), f16::of(a)}));
  BINARY("cvt.bf16x2.f32", Brains, float, float, (Brains{bf16::of(b), bf16::of(a)}));
  // Registers of several parts: mov {a, b}, c and mov c, {a, b}.
  SIM_HANDLER("split.b32") {
    u32 *a = row_of<u32>(warp, in, 0), *b = row_of<u32>(warp, in, 1), *c = row_of<u32>(warp, in, 2);
    FOR_LANES(mask) { const u32 whole = c[lane]; a[lane] = whole & 0xffff, b[lane] = whole >> 16; }
  };
  SIM_HANDLER("join.b32") {
    u32 *c = row_of<u32>(warp, in, 0), *a = row_of<u32>(warp, in, 1), *b = row_of<u32>(warp, in, 2);
    FOR_LANES(mask) c[lane] = (a[lane] & 0xffff) | b[lane] << 16;
  };
  SIM_HANDLER("split.b64") {
    u32 *a = row_of<u32>(warp, in, 0), *b = row_of<u32>(warp, in, 1);
    u64* c = row_of<u64>(warp, in, 2);
    FOR_LANES(mask) { const u64 whole = c[lane]; a[lane] = u32(whole), b[lane] = u32(whole >> 32); }
  };
  SIM_HANDLER("join.b64") {
    u64* c = row_of<u64>(warp, in, 0);
    u32 *a = row_of<u32>(warp, in, 1), *b = row_of<u32>(warp, in, 2);
    FOR_LANES(mask) c[lane] = u64(b[lane]) << 32 | a[lane];
  };
  SIM_HANDLER("join4.b32") {
    u32* c = row_of<u32>(warp, in, 0);
    FOR_LANES(mask) {
      u32 whole = 0;
      for (int i = 0; i < 4; i++) whole |= (row_of<u32>(warp, in, 1 + i)[lane] & 255) << 8 * i;
      c[lane] = whole;
    }
  };
}

}  // namespace sim

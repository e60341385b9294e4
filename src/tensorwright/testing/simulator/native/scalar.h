// Arithmetic, logic, comparisons and conversions of each lane by itself. Knows no memory.
#pragma once
#include <algorithm>
#include <unordered_map>

#include "machine.h"
#include "numbers.h"

namespace sim {

using Table = std::unordered_map<std::string, Handler>;

// Rows hold numbers of up to 32 bits in 4 bytes a lane.
template <class T> using Stored = std::conditional_t<sizeof(T) == 8, u64, u32>;
template <class T> inline T get(const Stored<T>* row, int lane) {
  T value;
  std::memcpy(&value, row + lane, sizeof(T));
  return value;
}
template <class T> inline void put(Stored<T>* row, int lane, T value) {
  Stored<T> wide = 0;
  std::memcpy(&wide, &value, sizeof(T));
  row[lane] = wide;
}
inline i32 operand(const Warp& warp, const Instruction& in, int index) { return warp.machine->kernel->operands[in.first + index]; }
template <class T> inline Stored<T>* row_of(Warp& warp, const Instruction& in, int index) {
  return warp.row<Stored<T>>(operand(warp, in, index));
}
inline u32& predicate(Warp& warp, const Instruction& in, int index) { return warp.predicates[operand(warp, in, index)]; }

#define SIM_HANDLER(name) table[name] = [](Warp & warp, const Instruction& in, u32 mask)
#define UNARY(name, D, A, value) \
  SIM_HANDLER(name) { \
    auto *d = row_of<D>(warp, in, 0); \
    auto* s = row_of<A>(warp, in, 1); \
    FOR_LANES(mask) { const A a = get<A>(s, lane); put<D>(d, lane, (D)(value)); } \
  }
#define BINARY(name, D, A, B, value) \
  SIM_HANDLER(name) { \
    auto *d = row_of<D>(warp, in, 0); \
    auto *s = row_of<A>(warp, in, 1); \
    auto* t = row_of<B>(warp, in, 2); \
    FOR_LANES(mask) { const A a = get<A>(s, lane); const B b = get<B>(t, lane); put<D>(d, lane, (D)(value)); } \
  }
#define TERNARY(name, D, A, C, value) \
  SIM_HANDLER(name) { \
    auto *d = row_of<D>(warp, in, 0); \
    auto *s = row_of<A>(warp, in, 1), *t = row_of<A>(warp, in, 2); \
    auto* u = row_of<C>(warp, in, 3); \
    FOR_LANES(mask) { \
      const A a = get<A>(s, lane), b = get<A>(t, lane); \
      const C c = get<C>(u, lane); \
      put<D>(d, lane, (D)(value)); \
    } \
  }

template <class T> inline T wrapped_shift_left(T a, u32 b) { return b >= 8 * sizeof(T) ? T(0) : T(a << b); }
template <class T> inline T shift_right(T a, u32 b) {
  return b >= 8 * sizeof(T) ? (std::is_signed_v<T> && a < 0 ? T(-1) : T(0)) : T(a >> b);
}
inline float not_nan(float a, float b, bool is_larger) {
  return std::isnan(a) ? b : std::isnan(b) ? a : is_larger ? std::max(a, b) : std::min(a, b);
}
// The bytes of {b, a} that the selector's nibbles name; the top bit of a nibble repeats the byte's sign.
inline u32 permuted(u32 a, u32 b, u32 selector) {
  const u64 bytes = u64(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    const u32 nibble = selector >> 4 * i & 15;
    u32 byte = u32(bytes >> 8 * (nibble & 7)) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline u32 by_table(u32 a, u32 b, u32 c, u32 lookup) {
  u32 result = 0;
  for (int i = 0; i < 8; i++)
    if (lookup >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}

template <class T> void integer_operations(Table& table, const std::string& type) {
  using U = std::make_unsigned_t<T>;
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  BINARY("add." + type, T, T, T, U(a) + U(b));
  BINARY("sub." + type, T, T, T, U(a) - U(b));
  BINARY("mul.lo." + type, T, T, T, (u64)a * (u64)b);
  BINARY("mul.hi." + type, T, T, T, ((Wide)a * (Wide)b) >> 8 * sizeof(T));
  TERNARY("mad.lo." + type, T, T, T, (u64)a * (u64)b + (u64)c);
  TERNARY("mad.hi." + type, T, T, T, U(((Wide)a * (Wide)b) >> 8 * sizeof(T)) + U(c));
  BINARY("div." + type, T, T, T, b == 0 ? T(-1) : (std::is_signed_v<T> && b == T(-1)) ? T(U(0) - U(a)) : T(a / b));
  BINARY("rem." + type, T, T, T, b == 0 ? a : (std::is_signed_v<T> && b == T(-1)) ? T(0) : T(a % b));
  BINARY("min." + type, T, T, T, std::min(a, b));
  BINARY("max." + type, T, T, T, std::max(a, b));
  UNARY("neg." + type, T, T, U(0) - U(a));
  UNARY("abs." + type, T, T, a < T(0) ? U(0) - U(a) : U(a));
  BINARY("shr." + type, T, T, u32, shift_right<T>(a, b));
}
template <class T> void wide_operations(Table& table, const std::string& type) {
  using D = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, i32, u32>,
                               std::conditional_t<std::is_signed_v<T>, i64, u64>>;
  BINARY("mul.wide." + type, D, T, T, D(a) * D(b));
  TERNARY("mad.wide." + type, D, T, D, D(a) * D(b) + c);
}
template <class T> void bit_operations(Table& table, const std::string& type) {
  BINARY("and." + type, T, T, T, a & b);
  BINARY("or." + type, T, T, T, a | b);
  BINARY("xor." + type, T, T, T, a ^ b);
  UNARY("not." + type, T, T, ~a);
  BINARY("shl." + type, T, T, u32, wrapped_shift_left<T>(a, b));
  UNARY("mov." + type, T, T, a);
  BINARY("shr." + type, T, T, u32, shift_right<T>(a, b));
}
template <class T> void float_operations(Table& table, const std::string& type) {
  BINARY("add." + type, T, T, T, a + b);
  BINARY("sub." + type, T, T, T, a - b);
  BINARY("mul." + type, T, T, T, a * b);
  BINARY("div." + type, T, T, T, a / b);
  TERNARY("fma." + type, T, T, T, std::fma(a, b, c));
  BINARY("min." + type, T, T, T, std::fmin(a, b));
  BINARY("max." + type, T, T, T, std::fmax(a, b));
  UNARY("neg." + type, T, T, -a);
  UNARY("abs." + type, T, T, std::fabs(a));
  UNARY("mov." + type, T, T, a);
  UNARY("sqrt." + type, T, T, std::sqrt(a));
  UNARY("rsqrt." + type, T, T, T(1) / std::sqrt(a));
  UNARY("rcp." + type, T, T, T(1) / a);
  UNARY("ex2." + type, T, T, std::exp2(a));
  UNARY("lg2." + type, T, T, std::log2(a));
  UNARY("sin." + type, T, T, std::sin(a));
  UNARY("cos." + type, T, T, std::cos(a));
  UNARY("tanh." + type, T, T, std::tanh(a));
}
template <class T> void small_operations(Table& table, const std::string& type) {
  BINARY("add." + type, T, T, T, T::of(float(a) + float(b)));
  BINARY("sub." + type, T, T, T, T::of(float(a) - float(b)));
  BINARY("mul." + type, T, T, T, T::of(float(a) * float(b)));
  TERNARY("fma." + type, T, T, T, T::of(float(double(a) * double(b) + double(c))));
  BINARY("min." + type, T, T, T, T::of(not_nan(a, b, false)));
  BINARY("max." + type, T, T, T, T::of(not_nan(a, b, true)));
  UNARY("neg." + type, T, T, (T{u16(a.bits ^ 0x8000)}));
  UNARY("abs." + type, T, T, (T{u16(a.bits & 0x7fff)}));
  UNARY("ex2." + type, T, T, T::of(std::exp2(float(a))));
  UNARY("tanh." + type, T, T, T::of(std::tanh(float(a))));
  using P = Two<T>;
#define PAIR2(name, op) BINARY(name "." + type + "x2", P, P, P, (P{T::of(op(float(a.lower), float(b.lower))), T::of(op(float(a.upper), float(b.upper)))}))
  PAIR2("add", [](float x, float y) { return x + y; });
  PAIR2("sub", [](float x, float y) { return x - y; });
  PAIR2("mul", [](float x, float y) { return x * y; });
  PAIR2("min", [](float x, float y) { return not_nan(x, y, false); });
  PAIR2("max", [](float x, float y) { return not_nan(x, y, true); });
  TERNARY("fma." + type + "x2", P, P, P, (P{T::of(float(double(a.lower) * double(b.lower) + double(c.lower))),
                                           T::of(float(double(a.upper) * double(b.upper) + double(c.upper)))}));
  UNARY("neg." + type + "x2", u32, u32, a ^ 0x80008000u);
  UNARY("abs." + type + "x2", u32, u32, a & 0x7fff7fffu);
  UNARY("ex2." + type + "x2", P, P, (P{T::of(std::exp2(float(a.lower))), T::of(std::exp2(float(a.upper)))}));
  UNARY("tanh." + type + "x2", P, P, (P{T::of(std::tanh(float(a.lower))), T::of(std::tanh(float(a.upper)))}));
}

// setp: d[|not d] = a <=> b, then combined with a predicate where one is given (mode 1 and, 2 or, 3 xor).
template <class T, class Compare> void compare(Warp& warp, const Instruction& in, u32 mask, Compare is_true) {
  auto *s = row_of<T>(warp, in, 2), *t = row_of<T>(warp, in, 3);
  u32 found = 0;
  FOR_LANES(mask) found |= u32(is_true(get<T>(s, lane), get<T>(t, lane))) << lane;
  u32 other = ~found;
  if (in.mode) {
    const u32 with = predicate(warp, in, 4);
    found = in.mode == 1 ? found & with : in.mode == 2 ? found | with : found ^ with;
    other = in.mode == 1 ? other & with : in.mode == 2 ? other | with : other ^ with;
  }
  for (int i = 0; i < 2; i++)
    if (operand(warp, in, i) >= 0) predicate(warp, in, i) = (predicate(warp, in, i) & ~mask) | ((i ? other : found) & mask);
}
#define COMPARE(name, T, test) \
  SIM_HANDLER("setp." name "." + type) { compare<T>(warp, in, mask, [](T a, T b) { (void)a, (void)b; return bool(test); }); }
template <class T> void comparisons(Table& table, const std::string& type) {
  COMPARE("eq", T, a == b);
  COMPARE("ne", T, a != b && !(a != a) && !(b != b));
  COMPARE("lt", T, a < b);
  COMPARE("le", T, a <= b);
  COMPARE("gt", T, a > b);
  COMPARE("ge", T, a >= b);
  COMPARE("lo", T, a < b);
  COMPARE("ls", T, a <= b);
  COMPARE("hi", T, a > b);
  COMPARE("hs", T, a >= b);
  COMPARE("equ", T, !(a < b) && !(a > b));
  COMPARE("neu", T, a != b);
  COMPARE("ltu", T, !(a >= b));
  COMPARE("leu", T, !(a > b));
  COMPARE("gtu", T, !(a <= b));
  COMPARE("geu", T, !(a < b));
  COMPARE("num", T, a == a && b == b);
  COMPARE("nan", T, a != a || b != b);
}
template <class T> void selection(Table& table, const std::string& type) {
  SIM_HANDLER("selp." + type) {
    auto *d = row_of<T>(warp, in, 0), *s = row_of<T>(warp, in, 1), *t = row_of<T>(warp, in, 2);
    const u32 which = predicate(warp, in, 3);
    FOR_LANES(mask) d[lane] = which >> lane & 1 ? s[lane] : t[lane];
  };
}

// a's lowest bits into b, at position c, so many.
template <class T> void insertions(Table& table, const std::string& type) {
  SIM_HANDLER("bfi." + type) {
    auto *d = row_of<T>(warp, in, 0), *a = row_of<T>(warp, in, 1), *b = row_of<T>(warp, in, 2);
    const u32 *c = row_of<u32>(warp, in, 3), *length = row_of<u32>(warp, in, 4);
    FOR_LANES(mask) {
      const T ones = wrapped_shift_left<T>(length[lane] >= 8 * sizeof(T) ? ~T(0) : (T(1) << length[lane]) - 1, c[lane]);
      d[lane] = (b[lane] & ~ones) | (wrapped_shift_left<T>(a[lane], c[lane]) & ones);
    }
  };
}

inline void predicate_operations(Table& table) {
#define PREDICATE(name, value) \
  SIM_HANDLER(name ".pred") { \
    const u32 a = predicate(warp, in, 1), b = in.count > 2 ? predicate(warp, in, 2) : 0; \
    (void)b; \
    u32& d = predicate(warp, in, 0); \
    d = (d & ~mask) | ((value) & mask); \
  }
  PREDICATE("and", a & b);
  PREDICATE("or", a | b);
  PREDICATE("xor", a ^ b);
  PREDICATE("not", ~a);
  PREDICATE("mov", a);
}

inline void scalar_table(Table& table) {
  integer_operations<i16>(table, "s16"), integer_operations<u16>(table, "u16");
  integer_operations<i32>(table, "s32"), integer_operations<u32>(table, "u32");
  integer_operations<i64>(table, "s64"), integer_operations<u64>(table, "u64");
  wide_operations<i16>(table, "s16"), wide_operations<u16>(table, "u16");
  wide_operations<i32>(table, "s32"), wide_operations<u32>(table, "u32");
  bit_operations<u16>(table, "b16"), bit_operations<u32>(table, "b32"), bit_operations<u64>(table, "b64");
  float_operations<float>(table, "f32"), float_operations<double>(table, "f64");
  small_operations<f16>(table, "f16"), small_operations<bf16>(table, "bf16");
  comparisons<i16>(table, "s16"), comparisons<u16>(table, "u16"), comparisons<u16>(table, "b16");
  comparisons<i32>(table, "s32"), comparisons<u32>(table, "u32"), comparisons<u32>(table, "b32");
  comparisons<i64>(table, "s64"), comparisons<u64>(table, "u64"), comparisons<u64>(table, "b64");
  comparisons<float>(table, "f32"), comparisons<double>(table, "f64");
  comparisons<f16>(table, "f16"), comparisons<bf16>(table, "bf16");
  for (const char* type : {"b16", "u16", "s16", "f16", "bf16", "b32", "u32", "s32", "f32"}) selection<u32>(table, type);
  for (const char* type : {"b64", "u64", "s64", "f64"}) selection<u64>(table, type);
  for (const char* type : {"u16", "s16"}) { UNARY(std::string("mov.") + type, u16, u16, a); }
  for (const char* type : {"u32", "s32"}) { UNARY(std::string("mov.") + type, u32, u32, a); }
  for (const char* type : {"u64", "s64"}) { UNARY(std::string("mov.") + type, u64, u64, a); }
  predicate_operations(table);
  SIM_HANDLER("lop3.b32") {
    u32 *d = row_of<u32>(warp, in, 0), *a = row_of<u32>(warp, in, 1), *b = row_of<u32>(warp, in, 2), *c = row_of<u32>(warp, in, 3);
    FOR_LANES(mask) d[lane] = by_table(a[lane], b[lane], c[lane], u32(in.immediate));
  };
  TERNARY("prmt.b32", u32, u32, u32, permuted(a, b, c));
  TERNARY("bfe.u32", u32, u32, u32, c == 0 ? 0 : shift_right<u32>(a, b & 255) & (c >= 32 ? ~0u : (1u << c) - 1));
  insertions<u32>(table, "b32"), insertions<u64>(table, "b64");
  TERNARY("shf.l.wrap.b32", u32, u32, u32, u32((u64(b) << 32 | a) << (c & 31) >> 32));
  TERNARY("shf.r.wrap.b32", u32, u32, u32, u32((u64(b) << 32 | a) >> (c & 31)));
  UNARY("popc.b32", u32, u32, __builtin_popcount(a));
  UNARY("clz.b32", u32, u32, a ? __builtin_clz(a) : 32);
  UNARY("popc.b64", u32, u64, __builtin_popcountll(a));
  UNARY("clz.b64", u32, u64, a ? __builtin_clzll(a) : 64);
}

}  // namespace sim

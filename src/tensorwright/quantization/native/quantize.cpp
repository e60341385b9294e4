// Quantisation of a weight matrix, and casts: the bits of ../reference.py (tests compare them). That needs IEEE float32
// in the reference's order: no fast math and no contraction of a·b + c. Sums run in the reference's 16 lanes on every
// machine, a register's width of them at a time. Plain loops are turned into vectors by the compiler.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace {

constexpr int kLanes = 16, kCandidates = 16;
constexpr float kRound = 12582912.0f;  // 1.5 · 2^23: adding and subtracting it rounds to the nearest even integer
constexpr float kSmallest = 0x1p-100f;

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float floats __attribute__((vector_size(4 * kWidth)));  // one register: a part of the 16 lanes, or all
typedef float half_floats __attribute__((vector_size(2 * kWidth)));
typedef double doubles __attribute__((vector_size(4 * kWidth)));
typedef float quad __attribute__((vector_size(16)));

enum Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };
enum Codes : int32_t { kInt4 = 4, kInt8 = 8, kFloat8 = 108 };

inline float largest_code(int32_t codes) { return codes == kFloat8 ? 448.0f : codes == kInt8 ? 127.0f : 8.0f; }

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// float16 to float32: the exponent's bias is corrected by a multiplication, which also does the subnormals.
inline float half_to_float(uint16_t half) {
  return from_bits(to_bits(from_bits(uint32_t(half & 0x7fff) << 13) * 0x1p112f) | uint32_t(half & 0x8000) << 16);
}

// float32 to float16, to nearest even; subnormals by adding a number whose last bit is worth 2^-24.
inline uint16_t float_to_half(float value) {
  uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (bits < 0x38800000) return uint16_t(sign | (to_bits(from_bits(bits) + 0.5f) - 0x3f000000));
  bits += 0xc8000fff + (bits >> 13 & 1);
  return uint16_t(sign | bits >> 13);
}

inline uint16_t float_to_bfloat(float value) {
  uint32_t bits = to_bits(value);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// To the nearest float8_e4m3, ties to even; |value| is at most 448. Subnormals by adding a number whose last bit is
// worth 2^-9.
inline uint8_t float_to_float8(float value) {
  const uint32_t bits = to_bits(value), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 16384.0f) - 0x46800000;
  const uint32_t normal = (magnitude + 0x7ffff + (magnitude >> 20 & 1) - 0x3c000000) >> 20;
  return uint8_t(sign | (magnitude < 0x3c800000 ? subnormal : normal));
}

// The inverse: the exponent's bias is corrected by a multiplication, which also does the subnormals.
inline float float8_to_float(uint8_t code) {
  const float magnitude = from_bits(uint32_t(code & 0x7f) << 20) * 0x1p120f;
  return from_bits(to_bits(magnitude) | uint32_t(code & 0x80) << 24);
}

// The bits of a scale in the dtype where it is stored. Negative zeros become positive.
inline uint32_t scale_bits(float value, int32_t dtype) {
  if (dtype == kFloat32) return value == 0.0f ? 0 : to_bits(value);
  const uint16_t bits = dtype == kFloat16 ? float_to_half(value) : float_to_bfloat(value);
  return bits == 0x8000 ? 0 : bits;
}

inline float scale_value(uint32_t bits, int32_t dtype) {
  if (dtype == kFloat32) return from_bits(bits);
  if (dtype == kBfloat16) return from_bits(bits << 16);
  return (bits & 0x7fff) == 0x7c00 ? from_bits(0x7f800000 | (bits & 0x8000) << 16) : half_to_float(uint16_t(bits));
}

inline float as_stored(float value, int32_t dtype) { return scale_value(scale_bits(value, dtype), dtype); }

inline void store_scale(void* scales, int64_t index, int32_t dtype, float value) {
  const uint32_t bits = scale_bits(value, dtype);
  if (dtype == kFloat32)
    static_cast<uint32_t*>(scales)[index] = bits;
  else
    static_cast<uint16_t*>(scales)[index] = uint16_t(bits);
}

// A row as float32. Gives false when it holds NaN or infinity.
bool load_row(const void* row, int32_t dtype, int64_t columns, float* out) {
  uint32_t bad = 0;
  if (dtype == kFloat32) {
    const float* in = static_cast<const float*>(row);
    for (int64_t i = 0; i < columns; ++i) {
      out[i] = in[i];
      bad |= (to_bits(in[i]) & 0x7f800000) == 0x7f800000;
    }
  } else if (dtype == kFloat16) {
    const uint16_t* in = static_cast<const uint16_t*>(row);
    for (int64_t i = 0; i < columns; ++i) {
      out[i] = half_to_float(in[i]);
      bad |= (in[i] & 0x7c00) == 0x7c00;
    }
  } else {
    const uint16_t* in = static_cast<const uint16_t*>(row);
    for (int64_t i = 0; i < columns; ++i) {
      out[i] = from_bits(uint32_t(in[i]) << 16);
      bad |= (in[i] & 0x7f80) == 0x7f80;
    }
  }
  return !bad;
}

// The inverse of load_row. Gives false when a number became infinity.
bool store_row(const float* row, int32_t dtype, int64_t columns, void* out) {
  uint32_t bad = 0;
  if (dtype == kFloat32) {
    std::memcpy(out, row, size_t(columns) * sizeof(float));
  } else if (dtype == kFloat16) {
    uint16_t* to = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < columns; ++i) {
      to[i] = float_to_half(row[i]);
      bad |= (to[i] & 0x7c00) == 0x7c00;
    }
  } else {
    uint16_t* to = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < columns; ++i) {
      to[i] = float_to_bfloat(row[i]);
      bad |= (to[i] & 0x7f80) == 0x7f80;
    }
  }
  return !bad;
}

inline int64_t item_bytes(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

template <class Vector = floats>
inline Vector load(const float* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

inline void store(float* to, floats vector) { std::memcpy(to, &vector, sizeof(vector)); }

inline float clip(float x, float lowest, float highest) {
  x = x < lowest ? lowest : x;
  return x > highest ? highest : x;
}

inline float to_code(float x, float lowest, float highest) { return (clip(x, lowest, highest) + kRound) - kRound; }

inline floats maximum(floats a, floats b) { return a > b ? a : b; }
inline floats minimum(floats a, floats b) { return a < b ? a : b; }

// The codes −8 … 7 of a vector of numbers in units of the scale; and q · q + sum, exact for codes, fused or not.
#if defined(__AVX512F__)
inline floats to_codes(floats x) {
  const __m512 cut = _mm512_min_ps(_mm512_max_ps((__m512)x, _mm512_set1_ps(-8.0f)), _mm512_set1_ps(7.0f));
  return (floats)_mm512_roundscale_ps(cut, 8);
}
inline floats add_square(floats q, floats sum) { return (floats)_mm512_fmadd_ps((__m512)q, (__m512)q, (__m512)sum); }
#else
inline floats to_codes(floats x) { return (minimum(maximum(x, floats{} - 8.0f), floats{} + 7.0f) + kRound) - kRound; }
inline floats add_square(floats q, floats sum) { return q * q + sum; }
#endif

// Folds 16 lanes in halves: lane l meets lane l + 8, then l + 4; the last four numbers are left.
template <class Join>
inline quad fold_to_four(const float* lanes, Join join) {
  quad parts[4];
  std::memcpy(parts, lanes, sizeof(parts));
  return join(join(parts[0], parts[2]), join(parts[1], parts[3]));
}

inline float add_lanes(const float* lanes) {
  const quad x = fold_to_four(lanes, [](quad a, quad b) { return a + b; });
  return (x[0] + x[2]) + (x[1] + x[3]);
}

inline float larger(float a, float b) { return a > b ? a : b; }

inline float largest_lane(const float* lanes) {
  const quad x = fold_to_four(lanes, [](quad a, quad b) { return a > b ? a : b; });
  return larger(larger(x[0], x[2]), larger(x[1], x[3]));
}

// sums[c] becomes the sum of rows[c]'s lanes, in the order of add_lanes.
inline void add_lanes(const float (&rows)[kCandidates][kLanes], float* sums) {
  float fours[kCandidates][4];
  for (int c = 0; c < kCandidates; ++c) {
    const quad x = fold_to_four(rows[c], [](quad a, quad b) { return a + b; });
    std::memcpy(fours[c], &x, sizeof(x));
  }
  for (int c = 0; c < kCandidates; ++c) sums[c] = (fours[c][0] + fours[c][2]) + (fours[c][1] + fours[c][3]);
}

inline float reciprocal(float value) { return value != 0.0f ? 1.0f / value : 0.0f; }

// What the search knows of a group of kSize numbers. Each pass below runs over all groups of a row before the next, so
// that the processor has other groups to work on while it waits for the end of one.
struct Group {
  float extreme;  // the number of largest magnitude, with its sign
  float inverse;  // its reciprocal, or 0
  float scale;    // first of the best candidate, then the one that is stored
};

template <int kSize>
inline void find_extreme(const float* w, Group& group) {
  float highest[kLanes], negated[kLanes];
  for (int part = 0; part < kLanes; part += kWidth) {
    floats high = load(w + part), low = high;
    for (int i = part + kLanes; i < kSize; i += kLanes) {
      high = maximum(high, load(w + i));
      low = minimum(low, load(w + i));
    }
    store(highest + part, high);
    store(negated + part, -low);
  }
  const float top = largest_lane(highest), bottom = largest_lane(negated), extreme = top >= bottom ? top : -bottom;
  group.extreme = std::fabs(extreme) < kSmallest ? 0.0f : extreme;
  group.inverse = reciprocal(group.extreme);
}

// For each candidate the codes, and with them the best scale in closed form, Σ u·q / Σ q²; the best of these.
template <int kSize>
inline void find_scale(const float* w, const float* candidates, Group& group) {
  float unit[kSize];
  for (int i = 0; i < kSize; ++i) unit[i] = w[i] * group.inverse;
  float products[kCandidates][kLanes], squares[kCandidates][kLanes];
  for (int c = 0; c < kCandidates; ++c)
    for (int part = 0; part < kLanes; part += kWidth) {
      floats product = {}, square = {};
      for (int i = part; i < kSize; i += kLanes) {
        const floats u = load(unit + i), q = to_codes(u * -candidates[c]);
        product += u * q;
        square = add_square(q, square);
      }
      store(products[c] + part, product);
      store(squares[c] + part, square);
    }
  float p[kCandidates], s[kCandidates], gain[kCandidates], ratio[kCandidates];
  add_lanes(products, p);
  add_lanes(squares, s);
  for (int c = 0; c < kCandidates; ++c) {
    s[c] = s[c] > 1.0f ? s[c] : 1.0f;
    gain[c] = p[c] * p[c] / s[c];
    ratio[c] = p[c] / s[c];
  }
  const float best = largest_lane(gain);
  uint32_t winners = 0;
  for (int c = 0; c < kCandidates; ++c) winners |= uint32_t(gain[c] == best) << c;
  group.scale = ratio[__builtin_ctz(winners)] * group.extreme;
}

// The best scale as stored against plain rounding with |extreme| over 7, 8 and −8.
template <int kSize>
inline void choose_scale(const float* w, int32_t dtype, Group& group) {
  const float largest = std::fabs(group.extreme);
  const float contenders[4] = {group.scale, largest / 7.0f, largest / 8.0f, largest / -8.0f};
  float least = INFINITY, chosen = 0.0f;
  for (float contender : contenders) {
    const float scale = as_stored(contender, dtype), inverse_scale = reciprocal(scale);
    float errors[kLanes];
    for (int part = 0; part < kLanes; part += kWidth) {
      floats error = {};
      for (int i = part; i < kSize; i += kLanes) {
        const floats x = load(w + i), difference = (x - to_codes(x * inverse_scale) * scale) * group.inverse;
        error += difference * difference;
      }
      store(errors + part, error);
    }
    const float total = add_lanes(errors);
    chosen = total < least ? scale : chosen;
    least = total < least ? total : least;
  }
  group.scale = chosen;
}

template <int kSize>
void search_row(const float* row, int64_t num_groups, const float* candidates, int32_t dtype, Group* groups) {
  for (int64_t g = 0; g < num_groups; ++g) find_extreme<kSize>(row + g * kSize, groups[g]);
  for (int64_t g = 0; g < num_groups; ++g) find_scale<kSize>(row + g * kSize, candidates, groups[g]);
  for (int64_t g = 0; g < num_groups; ++g) choose_scale<kSize>(row + g * kSize, dtype, groups[g]);
}

// Plain rounding's scale: the largest magnitude over the largest code, as stored.
float plain_scale(const float* w, int64_t size, int32_t kind, int32_t dtype) {
  float largest = 0.0f;
  for (int64_t i = 0; i < size; ++i) largest = std::fabs(w[i]) > largest ? std::fabs(w[i]) : largest;
  return as_stored((largest < kSmallest ? 0.0f : largest) / largest_code(kind), dtype);
}

// Codes of one group; Σ (w − q·scale)² and Σ w² are added to sums.
void encode(const float* w, int64_t size, float scale, int32_t kind, float* codes, double* sums) {
  const float inverse = reciprocal(scale), lowest = -largest_code(kind), highest = kind == kInt4 ? 7.0f : -lowest;
  if (kind == kFloat8)
    for (int64_t i = 0; i < size; ++i) codes[i] = float8_to_float(float_to_float8(clip(w[i] * inverse, lowest, highest)));
  else
    for (int64_t i = 0; i < size; ++i) codes[i] = to_code(w[i] * inverse, lowest, highest);
  doubles errors = {}, norms = {};
  const int64_t whole = size / (kWidth / 2) * (kWidth / 2);
  for (int64_t i = 0; i < whole; i += kWidth / 2) {
    const half_floats x = load<half_floats>(w + i), near = load<half_floats>(codes + i) * scale;
    const doubles wide = __builtin_convertvector(x, doubles);
    const doubles difference = wide - __builtin_convertvector(near, doubles);
    errors += difference * difference;
    norms += wide * wide;
  }
  for (int l = 0; l < kWidth / 2; ++l) sums[0] += errors[l], sums[1] += norms[l];
  for (int64_t i = whole; i < size; ++i) {
    const double x = w[i], difference = x - double(codes[i] * scale);
    sums[0] += difference * difference;
    sums[1] += x * x;
  }
}

void pack_row(const float* codes, int64_t columns, int32_t kind, uint8_t* out) {
  if (kind == kFloat8) {
    for (int64_t i = 0; i < columns; ++i) out[i] = float_to_float8(codes[i]);
  } else if (kind == kInt8) {
    for (int64_t i = 0; i < columns; ++i) out[i] = uint8_t(int8_t(codes[i]));
  } else {
    for (int64_t i = 0; i < columns / 2; ++i)
      out[i] = uint8_t(int(codes[2 * i]) + 8) | uint8_t((int(codes[2 * i + 1]) + 8) << 4);
  }
}

}  // namespace

// weights [rows, columns] of `dtype`, rows `row_bytes` apart; columns / group_size scales per row, of scale_dtype;
// codes [rows, columns] of a byte, or [rows, columns / 2] of kInt4. With `candidates` [16] scales are searched, and group_size is 32, 64 or 128; without,
// it is `columns`. sums [2] get Σ (w − q·scale)² and Σ w². Gives 1 as soon as a row holds NaN or infinity, else 0.
extern "C" __attribute__((visibility("default"))) int32_t tw_quantize(
    const void* weights, int32_t dtype, int64_t rows, int64_t columns, int64_t row_bytes, int32_t kind,
    int64_t group_size, const float* candidates, uint8_t* codes, void* scales, int32_t scale_dtype, double* sums) {
  const int64_t num_groups = columns / group_size;
  std::vector<float> buffer(size_t(2 * columns));
  std::vector<Group> groups(size_t(num_groups), Group{});
  float *row = buffer.data(), *row_codes = row + columns;
  for (int64_t r = 0; r < rows; ++r) {
    if (!load_row(static_cast<const char*>(weights) + r * row_bytes, dtype, columns, row)) return 1;
    if (!candidates)
      groups[0].scale = plain_scale(row, columns, kind, scale_dtype);
    else if (group_size == 32)
      search_row<32>(row, num_groups, candidates, scale_dtype, groups.data());
    else if (group_size == 64)
      search_row<64>(row, num_groups, candidates, scale_dtype, groups.data());
    else
      search_row<128>(row, num_groups, candidates, scale_dtype, groups.data());
    for (int64_t g = 0; g < num_groups; ++g) {
      encode(row + g * group_size, group_size, groups[size_t(g)].scale, kind, row_codes + g * group_size, sums);
      store_scale(scales, r * num_groups + g, scale_dtype, groups[size_t(g)].scale);
    }
    pack_row(row_codes, columns, kind, codes + r * (kind == kInt4 ? columns / 2 : columns));
  }
  return 0;
}

// `count` numbers to another dtype; with `out` null they are only looked at. Gives 1 where they hold NaN or infinity,
// 2 where they are beyond the range of `out_dtype`, else 0.
extern "C" __attribute__((visibility("default"))) int32_t tw_cast(const void* values, int32_t dtype, int64_t count,
                                                                  void* out, int32_t out_dtype) {
  constexpr int64_t kBlock = 4096;
  float block[kBlock];
  const char* from = static_cast<const char*>(values);
  char* to = static_cast<char*>(out);
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = count - start < kBlock ? count - start : kBlock;
    if (!load_row(from + start * item_bytes(dtype), dtype, size, block)) return 1;
    if (out && !store_row(block, out_dtype, size, to + start * item_bytes(out_dtype))) return 2;
  }
  return 0;
}

// Quantisation of a weight matrix, the same codes and scales as ../reference.py bit by bit (tests compare them).
// That needs IEEE float32 in the reference's order: no fast math and no contraction of a·b + c. The loops are plain, with
// fixed trip counts of 16, so that the compiler turns them into vectors of whatever width the machine has.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace {

constexpr int kLanes = 16;
constexpr float kRound = 12582912.0f;  // 1.5 · 2^23: adding and subtracting it rounds to the nearest even integer
constexpr float kSmallest = 0x1p-100f;

enum Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

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

// Stores a scale at `index` and gives back the number that was stored. Negative zeros become positive.
inline float store_scale(void* scales, int64_t index, int32_t dtype, float value) {
  if (dtype == kFloat16) {
    uint16_t half = float_to_half(value);
    if (half == 0x8000) half = 0;
    static_cast<uint16_t*>(scales)[index] = half;
    return (half & 0x7fff) == 0x7c00 ? from_bits(0x7f800000 | uint32_t(half & 0x8000) << 16) : half_to_float(half);
  }
  if (dtype == kBfloat16) {
    uint16_t bfloat = float_to_bfloat(value);
    if (bfloat == 0x8000) bfloat = 0;
    static_cast<uint16_t*>(scales)[index] = bfloat;
    return from_bits(uint32_t(bfloat) << 16);
  }
  value = value == 0.0f ? 0.0f : value;
  static_cast<float*>(scales)[index] = value;
  return value;
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

inline float clip(float x, float lowest, float highest) {
  x = x < lowest ? lowest : x;
  return x > highest ? highest : x;
}

inline float to_code(float x, float lowest, float highest) { return (clip(x, lowest, highest) + kRound) - kRound; }

inline float add_lanes(float* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[half + l];
  return lanes[0];
}

inline float reciprocal(float value) { return value != 0.0f ? 1.0f / value : 0.0f; }

// The scale of least squared error for one group (see _search in the reference), and its codes in `codes`.
void search_group(const float* w, int64_t size, const float* candidates, int32_t num_candidates, void* scales,
                  int64_t index, int32_t dtype, float* unit, float* trial, float* codes) {
  float highest = w[0], lowest = w[0];
  for (int64_t i = 1; i < size; ++i) {
    highest = w[i] > highest ? w[i] : highest;
    lowest = w[i] < lowest ? w[i] : lowest;
  }
  float extreme = highest >= -lowest ? highest : lowest;
  if (std::fabs(extreme) < kSmallest) extreme = 0.0f;
  const float inverse = reciprocal(extreme);
  for (int64_t i = 0; i < size; ++i) unit[i] = w[i] * inverse;

  float best = -1.0f, ratio = 0.0f;
  for (int32_t c = 0; c < num_candidates; ++c) {
    const float factor = -candidates[c];
    float product[kLanes] = {}, square[kLanes] = {};
    for (int64_t i = 0; i < size; i += kLanes)
      for (int l = 0; l < kLanes; ++l) {
        const float q = to_code(unit[i + l] * factor, -8.0f, 7.0f);
        product[l] += unit[i + l] * q;
        square[l] += q * q;
      }
    const float p = add_lanes(product), s = add_lanes(square), s1 = s > 1.0f ? s : 1.0f;
    const float gain = p * p / s1;
    if (gain > best) best = gain, ratio = p / s1;
  }

  const float largest = std::fabs(extreme);
  const float contenders[4] = {ratio * extreme, largest / 7.0f, largest / 8.0f, largest / -8.0f};
  float least = INFINITY, chosen = 0.0f;
  for (float contender : contenders) {
    const float scale = store_scale(scales, index, dtype, contender), inverse_scale = reciprocal(scale);
    float error[kLanes] = {};
    for (int64_t i = 0; i < size; i += kLanes)
      for (int l = 0; l < kLanes; ++l) {
        const float q = to_code(w[i + l] * inverse_scale, -8.0f, 7.0f);
        const float difference = (w[i + l] - q * scale) * inverse;
        trial[i + l] = q;
        error[l] += difference * difference;
      }
    const float total = add_lanes(error);
    if (total < least) {
      least = total, chosen = scale;
      std::memcpy(codes, trial, size * sizeof(float));
    }
  }
  store_scale(scales, index, dtype, least < INFINITY ? chosen : 0.0f);
  if (!(least < INFINITY)) std::memset(codes, 0, size * sizeof(float));
}

// Round to nearest with the largest magnitude over 127 or 8.
void round_group(const float* w, int64_t size, int32_t bits, void* scales, int64_t index, int32_t dtype, float* codes) {
  float largest = 0.0f;
  for (int64_t i = 0; i < size; ++i) largest = std::fabs(w[i]) > largest ? std::fabs(w[i]) : largest;
  if (largest < kSmallest) largest = 0.0f;
  const float inverse = reciprocal(store_scale(scales, index, dtype, largest / (bits == 8 ? 127.0f : 8.0f)));
  const float lowest = bits == 8 ? -127.0f : -8.0f, highest = bits == 8 ? 127.0f : 7.0f;
  for (int64_t i = 0; i < size; ++i) codes[i] = to_code(w[i] * inverse, lowest, highest);
}

float stored_scale(const void* scales, int64_t index, int32_t dtype) {
  if (dtype == kFloat32) return static_cast<const float*>(scales)[index];
  const uint16_t bits = static_cast<const uint16_t*>(scales)[index];
  return dtype == kFloat16 ? half_to_float(bits) : from_bits(uint32_t(bits) << 16);
}

// Σ (w − q·scale)² and Σ w² of one group, added to sums.
void measure_group(const float* w, const float* codes, int64_t size, float scale, double* sums) {
  double error[kLanes] = {}, norm[kLanes] = {};
  for (int64_t i = 0; i + kLanes <= size; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const double x = w[i + l], difference = x - double(codes[i + l] * scale);
      error[l] += difference * difference;
      norm[l] += x * x;
    }
  for (int64_t i = size / kLanes * kLanes; i < size; ++i) {
    const double x = w[i], difference = x - double(codes[i] * scale);
    error[0] += difference * difference;
    norm[0] += x * x;
  }
  for (int l = 0; l < kLanes; ++l) sums[0] += error[l], sums[1] += norm[l];
}

void pack_row(const float* codes, int64_t columns, int32_t bits, uint8_t* out) {
  if (bits == 8) {
    for (int64_t i = 0; i < columns; ++i) out[i] = uint8_t(int8_t(codes[i]));
  } else {
    for (int64_t i = 0; i < columns / 2; ++i)
      out[i] = uint8_t(int(codes[2 * i]) + 8) | uint8_t((int(codes[2 * i + 1]) + 8) << 4);
  }
}

}  // namespace

// weights [rows, columns] of `dtype`, rows `row_bytes` apart; columns / group_size scales per row, of scale_dtype;
// codes [rows, columns · bits / 8]; group_size a multiple of 16 where there are candidates to search. sums [2] get
// Σ (w − q·scale)² and Σ w². Gives 1 as soon as a row holds NaN or infinity, else 0.
extern "C" __attribute__((visibility("default"))) int32_t tw_quantize(
    const void* weights, int32_t dtype, int64_t rows, int64_t columns, int64_t row_bytes, int32_t bits,
    int64_t group_size, const float* candidates, int32_t num_candidates, uint8_t* codes, void* scales,
    int32_t scale_dtype, double* sums) {
  std::vector<float> buffer(size_t(2 * columns + 2 * group_size));
  float *row = buffer.data(), *row_codes = row + columns, *unit = row_codes + columns, *trial = unit + group_size;
  const int64_t groups = columns / group_size;
  for (int64_t r = 0; r < rows; ++r) {
    if (!load_row(static_cast<const char*>(weights) + r * row_bytes, dtype, columns, row)) return 1;
    for (int64_t g = 0; g < groups; ++g) {
      const float* w = row + g * group_size;
      float* q = row_codes + g * group_size;
      const int64_t index = r * groups + g;
      if (num_candidates)
        search_group(w, group_size, candidates, num_candidates, scales, index, scale_dtype, unit, trial, q);
      else
        round_group(w, group_size, bits, scales, index, scale_dtype, q);
      measure_group(w, q, group_size, stored_scale(scales, index, scale_dtype), sums);
    }
    pack_row(row_codes, columns, bits, codes + r * (columns * bits / 8));
  }
  return 0;
}

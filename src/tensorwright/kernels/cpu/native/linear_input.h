// The input side of a linear: RMS norm or gate, then int8 rounding or plain float32 rows. Knows no weights.
//
// Memory: x is [rows, K] float32 ([rows, 2K] with a gate). What the products read lies in the run's scratch, written
// once by all workers together: (row, group) pairs are shared out, so that even one row keeps every worker busy.
#pragma once
#include "abi.h"
#include "functions.h"
#include "numbers.h"
#include "pool.h"

namespace tw {

// x' of one row: rms_norm(x) · norm, or GATE(x[:K]) · x[K:], or x itself. EPSILON is the bit pattern of a float32
// (template arguments cannot be floats).
template <int K, bool HAS_NORM, activation GATE, uint32_t EPSILON>
struct linear_input {
  static constexpr int SIZE = K;
  static constexpr bool HAS_GATE = GATE != activation::none;
  static constexpr bool IS_PLAIN = !HAS_NORM && !HAS_GATE;
  static constexpr int64_t ROW_STRIDE = HAS_GATE ? 2 * (int64_t)K : K;

  // What the whole row is multiplied by: 1 / sqrt(mean(x²) + epsilon), or 1.
  static float factor(const float* row) {
    if constexpr (!HAS_NORM) return 1.0f;
    floats sums[4] = {};
    int k = 0;
    for (; k + 4 * LANES <= K; k += 4 * LANES)
      unrolled<4>([&](auto i) TW_INLINE_LAMBDA {
        floats x = load(row + k + i.value * LANES);
        sums[i.value] = multiply_add(x, x, sums[i.value]);
      });
    for (; k < K; k += LANES) {
      floats x = load(row + k, K - k < LANES ? K - k : LANES);
      sums[0] = multiply_add(x, x, sums[0]);
    }
    float sum = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
    return 1.0f / sqrtf(sum / (float)K + float_of_bits(EPSILON));
  }

  // x'[k .. k + LANES), with zeros from K on.
  static TW_INLINE_LAMBDA inline floats values(const float* row, const float* norm, float factor, int k) {
    if (k >= K) return floats{};
    int count = K - k < LANES ? K - k : LANES;
    auto part = [&](const float* from) TW_INLINE_LAMBDA {
      return K % LANES == 0 || count == LANES ? load(from + k) : load(from + k, count);
    };
    if constexpr (HAS_NORM) return part(row) * factor * part(norm);
    if constexpr (HAS_GATE) return activate<GATE>(part(row)) * part(row + K);
    return part(row);
  }
};

// Calls body(row, its factor, group) for this worker's share of all (row, group) pairs.
template <class Input, class Body>
TW_INLINE void for_each_group(const float* x, int64_t rows, int groups, const tw_worker* worker, Body&& body) {
  int64_t begin, end;
  share(rows * groups, 1, worker, &begin, &end);
  int64_t factor_row = -1;
  float factor = 1.0f;
  for (int64_t unit = begin; unit < end; unit++) {
    int64_t row = unit / groups;
    if (row != factor_row) factor = Input::factor(x + row * Input::ROW_STRIDE);
    factor_row = row;
    body(row, factor, (int)(unit % groups));
  }
}

TW_INLINE constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Rows rounded to int8 per token and group: x' ≈ code · scale, scale = max|x'| / 127.
struct quantized_rows {
  int8_t* codes;     // [rows, stride], zeros behind K
  float* scales;     // [rows, groups]
  int32_t* offsets;  // [rows, groups]: −(what the weight codes are shifted by) · Σ codes
  int64_t stride;
  int groups;

  static constexpr int64_t row_stride(int k, int group) { return round_up(round_up(k, group), 64); }
  // Scratch: codes, then scales, then offsets (kernels/cpu/linear.py has the same sum).
  quantized_rows(void* scratch, int64_t rows, int k, int group)
      : codes((int8_t*)scratch), stride(row_stride(k, group)), groups((k + group - 1) / group) {
    scales = (float*)(codes + rows * stride);
    offsets = (int32_t*)(scales + round_up(rows * groups, 16));
  }
  quantized_rows from_row(int64_t row) const {
    quantized_rows rest = *this;
    rest.codes += row * stride;
    rest.scales += row * groups;
    rest.offsets += row * groups;
    return rest;
  }

  // Multiplies by the float32 number 127 / max and rounds ties to even; the NumPy reference does the same. Magnitudes
  // are compared as integers, for which NaN is above infinity: either ends up in the scale and so in every result.
  template <class Input, int GROUP>
  void fill(const float* x, const float* norm, int64_t rows, int32_t weight_shift, const tw_worker* worker) {
    constexpr int VECTORS = (GROUP + LANES - 1) / LANES;
    for_each_group<Input>(x, rows, groups, worker, [&](int64_t row, float factor, int group) {
      floats values[VECTORS];
      ints largest = {};
      for (int i = 0; i < VECTORS; i++) {
        values[i] = Input::values(x + row * Input::ROW_STRIDE, norm, factor, group * GROUP + i * LANES);
        largest = maximum(largest, (ints)absolute(values[i]));
      }
      float limit = float_of_bits((uint32_t)reduce_maximum(largest));
      float inverse = limit > 1e-30f ? 127.0f / limit : 0.0f;
      ints sum = {};
      for (int i = 0; i < VECTORS; i++) {
        ints rounded = round_to_ints(maximum(values[i] * inverse, broadcast(-127.0f)));  // NaN becomes a code, too
        store_bytes(codes + row * stride + group * GROUP + i * LANES, rounded);
        sum += rounded;
      }
      scales[row * groups + group] = limit / 127.0f;
      offsets[row * groups + group] = -weight_shift * reduce_add(sum);
    });
  }
};

// Rows of float32: x itself when there is nothing to do to it, else x' in scratch.
struct float_rows {
  const float* values;
  int64_t stride;

  float_rows from_row(int64_t row) const { return {values + row * stride, stride}; }

  template <class Input>
  static void fill(float* prepared, const float* x, const float* norm, int64_t rows, const tw_worker* worker) {
    constexpr int GROUP = 128, GROUPS = (Input::SIZE + GROUP - 1) / GROUP;
    for_each_group<Input>(x, rows, GROUPS, worker, [&](int64_t row, float factor, int group) {
      int end = (group + 1) * GROUP < Input::SIZE ? (group + 1) * GROUP : Input::SIZE;
      for (int k = group * GROUP; k < end; k += LANES) {
        floats part = Input::values(x + row * Input::ROW_STRIDE, norm, factor, k);
        store(prepared + row * Input::SIZE + k, part, end - k < LANES ? end - k : LANES);
      }
    });
  }
};

}  // namespace tw

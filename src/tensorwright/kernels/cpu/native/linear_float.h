// Products with float32 activations: 32-bit and 16-bit weights, and int4 or int8 codes widened as they are read.
//
// Layout "input64": panels of 64 outputs; in a panel the inputs one after another, 64 numbers each: [K][64]. int4 codes
// lie two inputs to a byte, [K / 2][64], the even input in the low nibble, code + 8. Codes with scales per group are
// followed, group by group, by the group's 64 scales; one scale per output stands once, at the panel's end.
#pragma once
#include "linear_integer.h"

namespace tw {

// sums [ROWS, PANEL] (+)= rows · blocks [first, last) of a panel; the sums of a column are added in the order of the
// inputs, so that every number of rows gives the same bits.
template <class Weights, int ROWS>
static __attribute__((noinline)) void float_tile(const uint8_t* panel, int k, int first, int last,
                                                 const float_rows& rows, float* sums) {
  for (int number = first; number < last; number++) {
    const uint8_t* block = panel + (int64_t)number * Weights::BLOCK_BYTES;
    const float* values = rows.values + (int64_t)number * Weights::BLOCK_INPUTS;
    const int left = k - number * Weights::BLOCK_INPUTS;
    const int inputs = left < Weights::BLOCK_INPUTS ? left : Weights::BLOCK_INPUTS;
    for (int column = 0; column < PANEL; column += TILE_COLUMNS) {
      floats totals[ROWS][COLUMN_VECTORS];
      auto each = [&](auto body) TW_INLINE_LAMBDA {
        unrolled<ROWS>([&](auto row) TW_INLINE_LAMBDA {
          unrolled<COLUMN_VECTORS>([&](auto i) TW_INLINE_LAMBDA {
            int place = column + i.value * LANES;
            body(totals[row.value][i.value], sums + row.value * PANEL + place, place);
          });
        });
      };
      each([&](floats& total, const float* sum, int) TW_INLINE_LAMBDA {
        total = number && !Weights::SCALES_BLOCKS ? load(sum) : floats{};
      });
      for (int input = 0; input < inputs; input++) {
        floats weights[COLUMN_VECTORS];
        unrolled<COLUMN_VECTORS>([&](auto i) TW_INLINE_LAMBDA {
          weights[i.value] = Weights::values(block, input, column + i.value * LANES);
        });
        unrolled<ROWS>([&](auto row) TW_INLINE_LAMBDA {
          floats x = broadcast(values[row.value * rows.stride + input]);
          unrolled<COLUMN_VECTORS>([&](auto i) TW_INLINE_LAMBDA {
            totals[row.value][i.value] = multiply_add(weights[i.value], x, totals[row.value][i.value]);
          });
        });
      }
      each([&](floats& total, float* sum, int place) TW_INLINE_LAMBDA {
        if constexpr (Weights::SCALES_BLOCKS)
          total = multiply_add(total, Weights::block_scale(block, place), number ? load(sum) : floats{});
        store(sum, total);
      });
    }
  }
}

// What both weight types of this file share.
template <class Weights>
struct float_products {
  using rows_type = float_rows;
  static constexpr int64_t ROW_BYTES_PER_INPUT = 4;
  static constexpr bool SHARES_PREFETCH = false;
  template <class Input>
  static constexpr bool NEEDS_PREPARATION = !Input::IS_PLAIN;
  template <class Input>
  static float_rows prepare(const float* x, const float* norm, void* scratch, int64_t rows, const tw_worker* worker) {
    if constexpr (Input::IS_PLAIN) return {x, Input::SIZE};
    float_rows::fill<Input>((float*)scratch, x, norm, rows, worker);
    return {(const float*)scratch, Input::SIZE};
  }
  template <int ROWS>
  static void tile(const uint8_t* panel, int k, int first, int last, const float_rows& rows, float* sums, int) {
    float_tile<Weights, ROWS>(panel, k, first, last, rows, sums);
  }
  static void panel_times_row(const uint8_t* panel, int k, const float_rows& row, float* sums) {
    float_tile<Weights, 1>(panel, k, 0, Weights::num_blocks(k), row, sums);
  }
};

template <class Number>
struct float_weights : float_products<float_weights<Number>> {
  static constexpr bool SCALES_OUTPUTS = false, SCALES_BLOCKS = false;
  static constexpr int BLOCK_INPUTS = 256 / sizeof(Number);
  static constexpr int BLOCK_BYTES = BLOCK_INPUTS * PANEL * sizeof(Number);
  static constexpr int64_t PREFETCH_BYTES = 4096;

  static constexpr int num_blocks(int k) { return (k + BLOCK_INPUTS - 1) / BLOCK_INPUTS; }
  static constexpr int64_t panel_bytes(int k) { return (int64_t)k * PANEL * (int64_t)sizeof(Number); }
  static TW_INLINE_LAMBDA inline floats values(const uint8_t* block, int input, int column) {
    const Number* from = (const Number*)block + input * PANEL + column;
    if (column * sizeof(Number) % 64 == 0) prefetch((const uint8_t*)from + PREFETCH_BYTES);
    return load(from);
  }
};

// Quantised weights, exact activations: right rather than fast.
template <int BITS, int GROUP, class Scale, bool PER_OUTPUT>
struct float_codes : float_products<float_codes<BITS, GROUP, Scale, PER_OUTPUT>> {
  static constexpr bool SCALES_OUTPUTS = PER_OUTPUT, SCALES_BLOCKS = !PER_OUTPUT;
  static constexpr int BLOCK_INPUTS = GROUP;
  static constexpr int CODE_BYTES = GROUP * PANEL * BITS / 8;
  static constexpr int BLOCK_BYTES = CODE_BYTES + (PER_OUTPUT ? 0 : PANEL * (int)sizeof(Scale));

  static constexpr int num_blocks(int k) { return (k + GROUP - 1) / GROUP; }
  static constexpr int64_t panel_bytes(int k) {
    return (int64_t)num_blocks(k) * BLOCK_BYTES + (PER_OUTPUT ? PANEL * (int)sizeof(Scale) : 0);
  }
  static TW_INLINE_LAMBDA inline floats output_scale(const uint8_t* panel, int k, int column) {
    return load((const Scale*)(panel + (int64_t)num_blocks(k) * BLOCK_BYTES) + column);
  }
  static TW_INLINE_LAMBDA inline floats block_scale(const uint8_t* block, int column) {
    return load((const Scale*)(block + CODE_BYTES) + column);
  }
  static TW_INLINE_LAMBDA inline floats values(const uint8_t* block, int input, int column) {
    const uint8_t* from = block + (BITS == 4 ? input / 2 : input) * PANEL + column;
    ints codes = widen(load_as<unsigned_bytes>(from));
    if constexpr (BITS == 4) return to_floats((codes >> (input % 2 * 4) & 15) - 8);
    return to_floats(codes - 128);
  }
};

}  // namespace tw

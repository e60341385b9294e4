// Arithmetic as fast as a worker can do it, and nothing else: the limit that kernels of many rows are compared with.
#pragma once
#include <type_traits>
#include "linear_integer.h"
#include "pairs.h"
#include "pool.h"

namespace tw {

struct arithmetic_job {
  int32_t bits;    // of the weights: 4 or 8 (by int8), 16 (by 16, float32 where the target lacks pairs), 32 (float32)
  int64_t rounds;  // of each worker
};

constexpr int PROBE_ROWS = 2, PROBE_COLUMNS = 5;  // 10 sums hide a latency of 5 cycles, and fit 16 registers

// Two operations (a product and its addition) for each pair of numbers that a round of all workers multiplies.
inline int64_t operations_of_round(int32_t bits, int32_t workers) {
  const int numbers = bits < 16 ? 4 : bits == 16 && HAS_PAIRS ? 2 : 1;  // of a lane
  return 2ll * PROBE_ROWS * PROBE_COLUMNS * LANES * numbers * workers;
}

// The compiler must believe that a register has changed, so that nothing is computed once for all rounds.
#if defined(__aarch64__)
#define TW_CHANGED(vector) asm volatile("" : "+w"(vector))
#else
#define TW_CHANGED(vector) asm volatile("" : "+v"(vector))
#endif

template <int BITS, class vector>
inline void do_arithmetic(int64_t rounds) {
  const vector one = vector{} + 1;
  vector rows[PROBE_ROWS] = {one, one};
  vector sums[PROBE_ROWS][PROBE_COLUMNS] = {};
  for (int64_t round = 0; round < rounds; ++round) {
    unrolled<PROBE_ROWS>([&](auto row) TW_INLINE_LAMBDA { TW_CHANGED(rows[row.value]); });
    unrolled<PROBE_COLUMNS>([&](auto column) TW_INLINE_LAMBDA {
      vector weights = one;
      TW_CHANGED(weights);
      unrolled<PROBE_ROWS>([&](auto row) TW_INLINE_LAMBDA {
        vector& sum = sums[row.value][column.value];
        if constexpr (BITS >= 16) sum = multiply_add(weights, rows[row.value], sum);
        else sum = dot<BITS>(sum, weights, rows[row.value]);
      });
    });
  }
  vector total = {};
  unrolled<PROBE_ROWS * PROBE_COLUMNS>([&](auto i) TW_INLINE_LAMBDA {
    total += sums[i.value / PROBE_COLUMNS][i.value % PROBE_COLUMNS];
  });
  asm volatile("" : : "m"(total));  // the sums are wanted
}

inline void compute(void* argument, const tw_worker*) {
  const arithmetic_job* job = static_cast<const arithmetic_job*>(argument);
  if (job->bits == 4) do_arithmetic<4, ints>(job->rounds);
  else if (job->bits == 8) do_arithmetic<8, ints>(job->rounds);
  else if (job->bits == 16) do_arithmetic<16, std::conditional_t<HAS_PAIRS, ints, floats>>(job->rounds);
  else do_arithmetic<32, floats>(job->rounds);
}

}  // namespace tw

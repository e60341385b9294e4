// Reading memory as fast as a worker can, and nothing else: the limit that kernels are compared with.
#pragma once
#include "pool.h"
#include "vector.h"

namespace tw {

struct reading_job {
  const uint8_t* from;
  int64_t bytes;
};

// One sequential stream per worker, eight registers at a time, with the prefetch distance that the linears use.
inline void read_memory(void* argument, const tw_worker* worker) {
  constexpr int64_t STRIDE = 8 * sizeof(ints), AHEAD = 8 << 10;
  const reading_job* job = static_cast<const reading_job*>(argument);
  int64_t begin, end;
  share(job->bytes / STRIDE, 1, worker, &begin, &end);
  ints sums[8] = {};
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t* from = job->from + i * STRIDE;
    for (int64_t line = 0; line < STRIDE; line += TW_LINE) prefetch(from + AHEAD + line);
    unrolled<8>([&](auto constant) TW_INLINE_LAMBDA {
      constexpr int I = decltype(constant)::value;
      sums[I] += load_as<ints>(from + I * sizeof(ints));
    });
  }
  ints total = {};
  for (int i = 0; i < 8; ++i) total += sums[i];
  asm volatile("" : : "m"(total));  // the sums are wanted, or the loads would be removed
}

}  // namespace tw

// A token drawn from a row of logits as runtime/sampling.py does it, without sorting the row.
//
// What a filter keeps is the beginning of the row in the order of falling probability, so all that the draw needs to
// know of it is the probability that it holds. Both that and the token itself are found by going down that order to
// where a sum is reached: in bins of 2^21, 2^10 and 1 units, which 32-bit keys are split into. Keys are bits (powers of
// two) below the likeliest token in 2^-26, weights are probabilities in 2^-40 of its own: whole numbers, whose sums do
// not depend on the order of the additions, so that every rank and every run draws the same token.
#pragma once
#include "sample.cuh"

namespace tw {

struct Sampling {
  int row;            // of the logits
  float temperature;  // 0: the largest
  int top_k;          // 0: off
  float top_p;        // 1: off
  float min_p;        // 0: off
  u32 uniform;        // a number in [0, 1), in 2^-32
  float repetition, presence, frequency;
  int first, biased, seen;  // its adjustments: so many biases from the first on, then so many tokens that were seen
};

struct Adjustment {
  int token;
  float value;  // the bias, or how often the token was generated
};

// The sum over the lanes before this one.
__device__ inline u64 warp_sum_before(u64 number) {
  u64 running = number;
#pragma unroll
  for (int o = 1; o < LANES; o *= 2) {
    const u64 other = __shfl_up_sync(~0u, running, o);
    if (threadIdx.x % LANES >= o) running += other;
  }
  return running - number;
}

template <int COLUMNS> struct Drawing {
  static constexpr int THREADS = 1024, WARPS = THREADS / LANES, BINS = 2048, PARTS = 3, PART_BITS = 14;
  static constexpr int SEGMENT = (COLUMNS + THREADS - 1) / THREADS * LANES;  // columns of a warp
  static_assert(COLUMNS <= 1 << 18, "a bin holds the sum of 14-bit parts of so many weights");

  struct Memory {
    u32 bins[PARTS][BINS];
    u64 sums[WARPS];
    u64 before;
    int found;
  };
  struct Place {
    u32 key;
    u64 before;  // the sum over smaller keys
  };

  Memory& memory;
  const float* line;
  float highest, bits;  // the largest logit; bits for each unit of logits

  __device__ u32 key(int i) const { return (u32)(fminf((highest - line[i]) * bits, 63.99999f) * 67108864.f); }
  static __device__ u64 weight(u32 key) {
    return (u64)(exp2f((float)key * -1.4901161193847656e-8f) * 1099511627776.f + 0.5f);
  }

  // The sum over all columns, in every thread.
  template <class Number> __device__ u64 sum(Number number) {
    u64 mine = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < COLUMNS; i += THREADS) mine += number(i);
    return start_of(mine).total;
  }

  struct Start {
    u64 before, total;
  };
  // Over the numbers of the threads: the sum of those before this thread's, and of all.
  __device__ Start start_of(u64 number) {
    const int warp = threadIdx.x / LANES;
    const u64 before = warp_sum_before(number);
    __syncthreads();  // whoever still reads the sums of the last call
    if (threadIdx.x % LANES == LANES - 1) memory.sums[warp] = before + number;
    __syncthreads();
    Start start = {before, 0};
    for (int w = 0; w < WARPS; w++) {
      if (w < warp) start.before += memory.sums[w];
      start.total += memory.sums[w];
    }
    return start;
  }

  // The first column, by number, at which the sum passes the target, which is below the sum of all.
  template <class Number> __device__ int find(Number number, u64 target) {
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int begin = warp * SEGMENT, end = min(begin + SEGMENT, COLUMNS);
    u64 mine = 0;
#pragma unroll 4
    for (int i = begin + lane; i < end; i += LANES) mine += number(i);
#pragma unroll
    for (int o = LANES / 2; o; o /= 2) mine += __shfl_xor_sync(~0u, mine, o);
    u64 before = start_of(lane == 0 ? mine : 0).before;
    before = __shfl_sync(~0u, before, 0);
    if (threadIdx.x == 0) memory.found = 0;
    __syncthreads();
    if (before <= target && target < before + mine) {
      for (int i = begin + lane;; i += LANES) {
        const u64 own = i < end ? number(i) : 0;
        const u64 passed = before + own + warp_sum_before(own);
        if (passed - own <= target && target < passed) memory.found = i;
        if (__any_sync(~0u, target < passed)) break;
        before = __shfl_sync(~0u, passed, LANES - 1);
      }
    }
    __syncthreads();
    return memory.found;
  }

  // The key at which the sum over keys from 0 on passes the target, which is below the sum of all.
  template <class Number> __device__ Place descend(Number number, u64 target) {
    Place place = {0, 0};
    for (int shift = 21, width = 11;; shift = shift == 21 ? 10 : 0, width = shift ? 11 : 10) {
      for (int i = threadIdx.x; i < PARTS * BINS; i += THREADS) (&memory.bins[0][0])[i] = 0;
      __syncthreads();
      for (int i = threadIdx.x; i < COLUMNS; i += THREADS) {
        const u32 k = key(i);
        const u64 n = number(k);
        if (n == 0 || (shift < 21 && k >> (shift + width) != place.key)) continue;
        const int bin = k >> shift & ((1 << width) - 1);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
          const u32 p = (u32)(n >> part * PART_BITS) & ((1 << PART_BITS) - 1);
          if (p) atomicAdd(&memory.bins[part][bin], p);
        }
      }
      __syncthreads();
      u64 sums[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int bin = threadIdx.x * 2 + i;
        sums[i] = memory.bins[0][bin] + ((u64)memory.bins[1][bin] << PART_BITS) + ((u64)memory.bins[2][bin] << 2 * PART_BITS);
      }
      u64 before = place.before + start_of(sums[0] + sums[1]).before;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (before <= target && target < before + sums[i]) memory.found = threadIdx.x * 2 + i, memory.before = before;
        before += sums[i];
      }
      __syncthreads();
      place = {place.key << width | memory.found, memory.before};
      __syncthreads();
      if (shift == 0) return place;
    }
  }

  // The token for a uniform number in 2^-32. Filters keep a beginning of the order; a token's own weight is its last.
  __device__ int draw(const Sampling& s) {
    const auto weights = [&](u32 k) { return weight(k); };
    u64 all = sum([&](int i) { return weight(key(i)); });
    const u64 fraction = (u64)s.uniform << 32;
    if (s.top_k == 0 && s.top_p >= 1.f && s.min_p == 0.f)
      return find([&](int i) { return weight(key(i)); }, __umul64hi(all, fraction));
    if (s.top_k > 0 && s.top_k < COLUMNS) {
      const Place last = descend([](u32) { return (u64)1; }, s.top_k - 1);
      all = sum([&](int i) { return key(i) < last.key ? weight(key(i)) : 0; }) + (s.top_k - last.before) * weight(last.key);
    }
    u64 kept = all;
    if (s.top_p < 1.f) {
      const u64 target = min(max((u64)ceil((double)s.top_p * (double)all), (u64)1), all) - 1;
      const Place last = descend(weights, target);
      kept = min(all, last.before + ((target - last.before) / weight(last.key) + 1) * weight(last.key));
    }
    if (s.min_p > 0.f) {
      const u64 least = (u64)ceil((double)s.min_p * (double)weight(0));
      kept = min(kept, sum([&](int i) { const u64 w = weight(key(i)); return w >= least ? w : 0; }));
    }
    const u64 target = __umul64hi(kept, fraction);
    const Place place = descend(weights, target);
    return find([&](int i) { return (u64)(key(i) == place.key); }, (target - place.before) / weight(place.key));
  }
};

// Biases, then penalties, on a copy of the row. Threads: all of the block.
template <int COLUMNS>
__device__ void adjust(const float* row, float* line, const Sampling& s, const Adjustment* adjustments) {
  for (int i = threadIdx.x; i < COLUMNS; i += blockDim.x) line[i] = row[i];
  __syncthreads();
  for (int i = threadIdx.x; i < s.biased; i += blockDim.x) atomicAdd(&line[adjustments[i].token], adjustments[i].value);
  __syncthreads();
  for (int i = threadIdx.x; i < s.seen; i += blockDim.x) {
    const Adjustment a = adjustments[s.biased + i];
    const float value = line[a.token] > 0.f ? line[a.token] / s.repetition : line[a.token] * s.repetition;
    line[a.token] = value - (s.presence * (a.value > 0.f) + s.frequency * a.value);
  }
  __syncthreads();
}

// Grid: draws. `chosen` is the greedy choice of each row of logits; `lines` has a row for each draw.
template <int COLUMNS>
__global__ void __launch_bounds__(1024, 1)
draw(const float* logits, float* lines, const Sampling* samplings, const Adjustment* adjustments, const Chosen* chosen,
     Chosen* drawn) {
  __shared__ typename Drawing<COLUMNS>::Memory memory;
  begin_kernel();
  const Sampling s = samplings[blockIdx.x];
  const Chosen greedy = chosen[s.row];
  const float *row = logits + (size_t)s.row * COLUMNS, *line = row;
  Largest largest = {row[greedy.token], greedy.token};
  if (s.biased + s.seen > 0) {
    float* own = lines + (size_t)blockIdx.x * COLUMNS;
    adjust<COLUMNS>(row, own, s, adjustments + s.first);
    largest = block_largest<COLUMNS>(own, [](float) {});
    line = own;
  }
  int token = largest.token;
  if (s.temperature > 0.f && isfinite(largest.value)) {
    Drawing<COLUMNS> drawing = {memory, line, largest.value, fminf(1.4426950408889634f / s.temperature, 1e30f)};
    token = drawing.draw(s);
  }
  const float logit = row[token];
  const float log_prob = isfinite(logit) ? logit - row[greedy.token] + greedy.log_prob : __int_as_float(0x7fc00000);
  if (threadIdx.x == 0) drawn[blockIdx.x] = {token, log_prob, greedy.sum, 0.f};
}

}  // namespace tw

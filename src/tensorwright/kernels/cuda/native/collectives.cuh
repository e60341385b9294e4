// Sums and gathers over ranks, as ops: float32 rows in, float32 rows out. A block handles 256 numbers.
//
// A block sends all its numbers before it waits for any, and waits for the same block of the other ranks only: blocks start
// in order, so it does not matter how many run at a time.
#pragma once
#include "ranks.cuh"

namespace tw {

// Grid: (rows, ceil(COLUMNS / 256)).
template <int COLUMNS>
__global__ void __launch_bounds__(256) all_reduce(const Ranks* ranks, int number, const float* x, float* y) {
  begin_kernel();
  const Collective collective(ranks, number);
  const int column = blockIdx.y * 256 + threadIdx.x;
  if (column >= COLUMNS) return;
  const size_t at = (size_t)blockIdx.x * COLUMNS + column;
  const float mine = x[at];
  collective.send(at, mine);
  y[at] = collective.sum(at, mine);
}

// Grid: (rows, ceil(COLUMNS / 256)); COLUMNS of each rank, side by side in y.
template <int COLUMNS>
__global__ void __launch_bounds__(256) all_gather(const Ranks* ranks, int number, const float* x, float* y) {
  begin_kernel();
  const Collective collective(ranks, number);
  const int column = blockIdx.y * 256 + threadIdx.x;
  if (column >= COLUMNS) return;
  const size_t at = (size_t)blockIdx.x * COLUMNS + column;
  const float mine = x[at];
  collective.send(at, mine);
  float* to = y + (size_t)blockIdx.x * COLUMNS * collective.size + column;
  for (int from = 0; from < collective.size; from++)
    to[(size_t)from * COLUMNS] = from == collective.rank ? mine : collective.receive(from, at);
}

// Ends the collectives of an op or a stretch: so many.
__global__ void count_collectives(Ranks* ranks, int number) {
  begin_kernel();
  ranks->epoch += number;
}

// What a library gathers, [ranks][rows][COLUMNS], as rows of all ranks' columns. Grid: (rows, ranks).
template <int COLUMNS> __global__ void __launch_bounds__(256) join_columns(const float* x, float* y) {
  begin_kernel();
  const float* from = x + ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * COLUMNS;
  float* to = y + ((size_t)blockIdx.x * gridDim.y + blockIdx.y) * COLUMNS;
  for (int i = threadIdx.x; i < COLUMNS; i += 256) to[i] = from[i];
}

}  // namespace tw

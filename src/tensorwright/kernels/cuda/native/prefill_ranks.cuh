// The pass after a matrix product that every rank has a part of, in steps of many tokens.
#pragma once
#include "collectives.cuh"
#include "prefill.cuh"

namespace tw {

// As add_norm, with y this rank's part: stream += sum of y + bias over ranks; x = rms_norm(stream) where NORM. A block sends
// its row in 16 bits and reads the stream while the others' rows come. Grid: rows. bias: null, as on all ranks but one.
template <class Type, int COLUMNS, int THREADS, bool NORM, class Operand>
__global__ void __launch_bounds__(THREADS)
sum_norm(const Ranks* ranks, int number, float* stream, const Type* y, const float* bias, const float* norm, const Operand x, float epsilon) {
  begin_kernel();
  const Collective collective(ranks, number);
  const int row = blockIdx.x, rank = collective.rank;
  const size_t start = (size_t)row * COLUMNS;
  float mine[PARTS<THREADS, COLUMNS>][8], values[PARTS<THREADS, COLUMNS>][8], sum = 0.f;
#pragma unroll
  for (int part = 0; part < PARTS<THREADS, COLUMNS>; part++) {
    const int column = column_of<THREADS>(part);
    if (column >= COLUMNS) continue;
    load_eight(y + start + column, mine[part]);
    if (bias) add_eight(bias + column, mine[part]);
#pragma unroll
    for (int i = 0; i < 8; i++) mine[part][i] = to_float(to_finite<Type>(mine[part][i]));  // as the others will have it
    for (int to = 0; to < collective.size; to++)
      if (to != rank) store_eight(collective.parcels<Type>(to, rank) + start + column, mine[part]);
  }
  __syncthreads();
  if (threadIdx.x == 0) collective.send_flag(row);
#pragma unroll
  for (int part = 0; part < PARTS<THREADS, COLUMNS>; part++)
    if (const int column = column_of<THREADS>(part); column < COLUMNS) load_eight(stream + start + column, values[part]);
  if (threadIdx.x < collective.size && threadIdx.x != rank) collective.await_flag(threadIdx.x, row);
  __syncthreads();
#pragma unroll
  for (int part = 0; part < PARTS<THREADS, COLUMNS>; part++) {
    const int column = column_of<THREADS>(part);
    if (column >= COLUMNS) continue;
    float total[8] = {};
    for (int from = 0; from < collective.size; from++) {
      float theirs[8];
      if (from != rank) load_eight(collective.parcels<Type>(rank, from) + start + column, theirs);
#pragma unroll
      for (int i = 0; i < 8; i++) total[i] += from == rank ? mine[part][i] : theirs[i];
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      values[part][i] += total[i];
      sum += values[part][i] * values[part][i];
    }
    store_eight(stream + start + column, values[part]);
  }
  if constexpr (NORM) put_normed<THREADS, COLUMNS>(values, sum, norm, epsilon, x);
}

}  // namespace tw

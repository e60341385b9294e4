// Ops that touch each number once: float32 rows in, float32 rows out. A block handles one row.
#pragma once
#include "numbers.cuh"

namespace tw {

template <class Type, int COLUMNS>
__global__ void __launch_bounds__(256) embedding(const int* token_ids, const Type* table, float* y) {
  begin_kernel();
  const Type* from = table + (size_t)token_ids[blockIdx.x] * COLUMNS;
  for (int i = threadIdx.x; i < COLUMNS; i += 256) y[(size_t)blockIdx.x * COLUMNS + i] = to_float(from[i]);
}

// Grid: (rows, heads); SIZE numbers share a mean.
template <int COLUMNS, int SIZE>
__global__ void __launch_bounds__(256) rms_norm(const float* x, const float* weight, float* y, float epsilon) {
  begin_kernel();
  const size_t start = (size_t)blockIdx.x * COLUMNS + blockIdx.y * SIZE;
  float sum = 0.f;
  for (int i = threadIdx.x; i < SIZE; i += 256) sum += x[start + i] * x[start + i];
  const float factor = rsqrtf(block_sum<256>(sum) / SIZE + epsilon);
  for (int i = threadIdx.x; i < SIZE; i += 256) y[start + i] = x[start + i] * factor * weight[i];
}

template <int COLUMNS> __global__ void __launch_bounds__(256) gather_rows(const float* x, const int* rows, float* y) {
  begin_kernel();
  const float* from = x + (size_t)rows[blockIdx.x] * COLUMNS;
  for (int i = threadIdx.x; i < COLUMNS; i += 256) y[(size_t)blockIdx.x * COLUMNS + i] = from[i];
}

template <int COLUMNS, int START, int SIZE>
__global__ void __launch_bounds__(256) slice(const float* x, float* y) {
  begin_kernel();
  for (int i = threadIdx.x; i < SIZE; i += 256) y[(size_t)blockIdx.x * SIZE + i] = x[(size_t)blockIdx.x * COLUMNS + START + i];
}

template <int COLUMNS> __global__ void __launch_bounds__(256) add(const float* a, const float* b, float* y) {
  begin_kernel();
  const size_t start = (size_t)blockIdx.x * COLUMNS;
  for (int i = threadIdx.x; i < COLUMNS; i += 256) y[start + i] = a[start + i] + b[start + i];
}

template <int COLUMNS> __global__ void __launch_bounds__(256) multiply_rows(const float* a, const float* b, float* y) {
  begin_kernel();
  const size_t start = (size_t)blockIdx.x * COLUMNS;
  for (int i = threadIdx.x; i < COLUMNS; i += 256) y[start + i] = a[start + i] * b[start + i];
}

template <int COLUMNS, Function FUNCTION> __global__ void __launch_bounds__(256) activation(const float* x, float* y) {
  begin_kernel();
  const size_t start = (size_t)blockIdx.x * COLUMNS;
  for (int i = threadIdx.x; i < COLUMNS; i += 256) y[start + i] = activate<FUNCTION>(x[start + i]);
}

}  // namespace tw

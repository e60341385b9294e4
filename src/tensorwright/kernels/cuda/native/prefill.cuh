// What stands between the matrix products of a step of many tokens: 16-bit rows, and a residual stream in float32.
//
// Eight numbers a thread. Products are rounded to 16 bits by the library: what became infinite there is read as the
// largest number of the type.
#pragma once
#include "linear.cuh"

namespace tw {

template <class Type> __device__ inline void load_eight(const Type* from, float (&x)[8]) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 each = word(words, i);
    const float2 two = to_float(reinterpret_cast<const typename Pair<Type>::type&>(each));
    x[2 * i] = finite<Type>(two.x), x[2 * i + 1] = finite<Type>(two.y);
  }
}
__device__ inline void load_eight(const float* from, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
  }
}
template <class Type> __device__ inline void store_eight(Type* to, const float (&x)[8]) {
  u32 words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) words[i] = pack<Type>(finite<Type>(x[2 * i]), finite<Type>(x[2 * i + 1]));
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}
__device__ inline void store_eight(float* to, const float (&x)[8]) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
  *reinterpret_cast<float4*>(to + 4) = make_float4(x[4], x[5], x[6], x[7]);
}
__device__ inline void store_eight(float8* to, const float (&x)[8]) {
  *reinterpret_cast<uint2*>(to) = make_uint2(to_float8(x[0], x[1]) | to_float8(x[2], x[3]) << 16,
                                             to_float8(x[4], x[5]) | to_float8(x[6], x[7]) << 16);
}
__device__ inline void add_eight(const float* bias, float (&x)[8]) {
  float more[8];
  load_eight(bias, more);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] += more[i];
}

// How a row becomes an operand of a product. put<THREADS, COLUMNS> takes a block's row: part i of a thread is the eight
// numbers from i * THREADS * 8 + threadIdx.x * 8 on.
template <int THREADS, int COLUMNS> constexpr int PARTS = (COLUMNS + THREADS * 8 - 1) / (THREADS * 8);
template <int THREADS> __device__ inline int column_of(int part) { return (part * THREADS + threadIdx.x) * 8; }

template <class Type> struct Rows16 {
  Type* x;  // [rows, COLUMNS]

  template <int THREADS, int COLUMNS> __device__ void put(const float (&values)[PARTS<THREADS, COLUMNS>][8]) const {
#pragma unroll
    for (int part = 0; part < PARTS<THREADS, COLUMNS>; part++)
      if (const int column = column_of<THREADS>(part); column < COLUMNS)
        store_eight(x + (size_t)blockIdx.x * COLUMNS + column, values[part]);
  }
};

// A row's numbers over their scale, so that the largest is 448; of a row below 2^-100, zeros.
template <int THREADS, int COLUMNS> __device__ inline void scale_row(float (&values)[PARTS<THREADS, COLUMNS>][8], float* scales) {
  float largest = 0.f;
#pragma unroll
  for (int part = 0; part < PARTS<THREADS, COLUMNS>; part++)
    if (column_of<THREADS>(part) < COLUMNS)
#pragma unroll
      for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(values[part][i]));
  largest = block_max<THREADS>(largest);
  const float inverse = largest >= 0x1p-100f ? 448.f / largest : 0.f;
  if (threadIdx.x == 0) scales[blockIdx.x] = largest / 448.f;
#pragma unroll
  for (int part = 0; part < PARTS<THREADS, COLUMNS>; part++)
#pragma unroll
    for (int i = 0; i < 8; i++) values[part][i] *= inverse;
}

// float8 and one scale a row.
struct RowsFloat8 {
  float8* x;      // [rows, COLUMNS]
  float* scales;  // [rows]

  template <int THREADS, int COLUMNS> __device__ void put(float (&values)[PARTS<THREADS, COLUMNS>][8]) const {
    scale_row<THREADS, COLUMNS>(values, scales);
#pragma unroll
    for (int part = 0; part < PARTS<THREADS, COLUMNS>; part++)
      if (const int column = column_of<THREADS>(part); column < COLUMNS)
        store_eight(x + (size_t)blockIdx.x * COLUMNS + column, values[part]);
  }
};

// x = y, as an operand. Grid: rows.
template <class Type, int COLUMNS, int THREADS, class Operand>
__global__ void __launch_bounds__(THREADS) operand_rows(const Type* y, const Operand x) {
  begin_kernel();
  float values[PARTS<THREADS, COLUMNS>][8];
#pragma unroll
  for (int part = 0; part < PARTS<THREADS, COLUMNS>; part++)
    if (const int column = column_of<THREADS>(part); column < COLUMNS)
      load_eight(y + (size_t)blockIdx.x * COLUMNS + column, values[part]);
  x.template put<THREADS, COLUMNS>(values);
}

// A row as an operand after rms_norm; `sum`: of its squares, this thread's part.
template <int THREADS, int COLUMNS, class Operand>
__device__ inline void put_normed(float (&values)[PARTS<THREADS, COLUMNS>][8], float sum, const float* norm, float epsilon, const Operand& x) {
  const float factor = rsqrtf(block_sum<THREADS>(sum) / COLUMNS + epsilon);
#pragma unroll
  for (int part = 0; part < PARTS<THREADS, COLUMNS>; part++) {
    const int column = column_of<THREADS>(part);
    if (column >= COLUMNS) continue;
    float weights[8];
    load_eight(norm + column, weights);
#pragma unroll
    for (int i = 0; i < 8; i++) values[part][i] *= weights[i] * factor;
  }
  x.template put<THREADS, COLUMNS>(values);
}

// stream += y + bias where ADD; x = rms_norm(stream) where NORM. Grid: rows. bias: null or [COLUMNS].
template <class Type, int COLUMNS, int THREADS, bool ADD, bool NORM, class Operand>
__global__ void __launch_bounds__(THREADS)
add_norm(float* stream, const Type* y, const float* bias, const float* norm, const Operand x, float epsilon) {
  begin_kernel();
  const size_t start = (size_t)blockIdx.x * COLUMNS;
  float values[PARTS<THREADS, COLUMNS>][8], sum = 0.f;
#pragma unroll
  for (int part = 0; part < PARTS<THREADS, COLUMNS>; part++) {
    const int column = column_of<THREADS>(part);
    if (column >= COLUMNS) continue;
    float(&value)[8] = values[part];
    load_eight(stream + start + column, value);
    if (ADD) {
      float more[8];
      load_eight(y + start + column, more);
      if (bias) add_eight(bias + column, more);
#pragma unroll
      for (int i = 0; i < 8; i++) value[i] += more[i];
      store_eight(stream + start + column, value);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) sum += value[i] * value[i];
  }
  if constexpr (NORM) put_normed<THREADS, COLUMNS>(values, sum, norm, epsilon, x);
}

// x = f(gate) * up of rows [gate | up]. Grid: rows. bias: null or [2 COLUMNS].
template <class Type, int COLUMNS, int THREADS, Function FUNCTION, class Operand>
__global__ void __launch_bounds__(THREADS) gate_rows(const Type* both, const float* bias, const Operand x) {
  begin_kernel();
  float values[PARTS<THREADS, COLUMNS>][8];
#pragma unroll
  for (int part = 0; part < PARTS<THREADS, COLUMNS>; part++) {
    const int column = column_of<THREADS>(part);
    if (column >= COLUMNS) continue;
    const Type* from = both + (size_t)blockIdx.x * 2 * COLUMNS + column;
    float(&gate)[8] = values[part], up[8];
    load_eight(from, gate);
    load_eight(from + COLUMNS, up);
    if (bias) add_eight(bias + column, gate), add_eight(bias + COLUMNS + column, up);
#pragma unroll
    for (int i = 0; i < 8; i++) gate[i] = activate<FUNCTION>(gate[i]) * up[i];
  }
  x.template put<THREADS, COLUMNS>(values);
}

}  // namespace tw

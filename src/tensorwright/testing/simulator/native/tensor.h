// What a warp does together: shuffles, votes, and the tensor core's fragments, products and matrix loads.
//
// Fragments are PTX's: lane 4 g + t of an m16n8k16 product holds rows g and g + 8 of A and C, column g of B.
#pragma once
#include "memory.h"

namespace sim {

inline void shuffle(Warp& warp, const Instruction& in, u32 mask) {  // operands: d, predicate or -1, a, b, c; mode: 0 idx 1 up 2 down 3 bfly
  u32 *d = row_of<u32>(warp, in, 0), *a = row_of<u32>(warp, in, 2), *b = row_of<u32>(warp, in, 3), *c = row_of<u32>(warp, in, 4);
  u32 values[LANES], inside = 0;
  FOR_LANES(mask) {
    const u32 segment = c[lane] >> 8 & 31, clamp = c[lane] & 31, with = b[lane] & 31;
    const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
    int from = in.mode == 0 ? least | (with & ~segment) : in.mode == 1 ? lane - int(with) : in.mode == 2 ? lane + int(with) : lane ^ int(with);
    const bool is_inside = in.mode == 1 ? from >= most : from <= most;
    if (!is_inside) from = lane;
    if (!(mask >> from & 1)) return warp.machine->fail(warp, "a shuffle from a lane that takes no part");
    values[lane] = a[from], inside |= u32(is_inside) << lane;
  }
  FOR_LANES(mask) d[lane] = values[lane];
  if (operand(warp, in, 1) >= 0) {
    u32& p = predicate(warp, in, 1);
    p = (p & ~mask) | inside;
  }
}
inline void vote(Warp& warp, const Instruction& in, u32 mask) {  // mode: 0 all, 1 any, 2 uni, 3 ballot, + 4: the predicate negated
  const u32 given = (in.mode & 4 ? ~predicate(warp, in, 1) : predicate(warp, in, 1)) & mask;
  const int kind = in.mode & 3;
  if (kind == 3) {
    u32* d = row_of<u32>(warp, in, 0);
    FOR_LANES(mask) d[lane] = given;
    return;
  }
  const bool is_true = kind == 0 ? given == mask : kind == 1 ? given != 0 : given == 0 || given == mask;
  u32& d = predicate(warp, in, 0);
  d = (d & ~mask) | (is_true ? mask : 0);
}

template <class T> float number(u32 word, int index);
template <> inline float number<f16>(u32 word, int index) { return f16{u16(word >> 16 * index)}; }
template <> inline float number<bf16>(u32 word, int index) { return bf16{u16(word >> 16 * index)}; }
struct e4m3 {};
struct s8 {};
template <> inline float number<e4m3>(u32 word, int index) { return E4M3::wide(word >> 8 * index & 255); }
template <> inline float number<s8>(u32 word, int index) { return float(i8_t(word >> 8 * index)); }

// A's fragment of 16 rows and K inputs (4 registers) into a matrix.
template <class T, int K> void gather_a(Warp& warp, const Instruction& in, int first, float (&a)[16][K]) {
  constexpr int PACK = K / 8;  // numbers in a register
  for (int r = 0; r < 4; r++) {
    const u32* row = row_of<u32>(warp, in, first + r);
    for (int lane = 0; lane < LANES; lane++)
      for (int i = 0; i < PACK; i++) a[lane / 4 + r % 2 * 8][lane % 4 * PACK + r / 2 * K / 2 + i] = number<T>(row[lane], i);
  }
}
// Operands: d (4), a (4), b (2), c (4).
template <class T, int K, class Sum> void multiply(Warp& warp, const Instruction& in, u32) {
  constexpr int PACK = K / 8;
  float a[16][K], b[K][8];
  gather_a<T, K>(warp, in, 4, a);
  for (int r = 0; r < 2; r++) {
    const u32* row = row_of<u32>(warp, in, 8 + r);
    for (int lane = 0; lane < LANES; lane++)
      for (int i = 0; i < PACK; i++) b[lane % 4 * PACK + r * K / 2 + i][lane / 4] = number<T>(row[lane], i);
  }
  Sum sums[4][LANES];
  for (int r = 0; r < 4; r++)
    for (int lane = 0; lane < LANES; lane++) {
      Sum sum = get<Sum>(row_of<Sum>(warp, in, 10 + r), lane);
      for (int k = 0; k < K; k++) sum += Sum(a[lane / 4 + r / 2 * 8][k] * b[k][lane % 4 * 2 + r % 2]);
      sums[r][lane] = sum;
    }
  for (int r = 0; r < 4; r++)
    for (int lane = 0; lane < LANES; lane++) put<Sum>(row_of<Sum>(warp, in, r), lane, sums[r][lane]);
}

// Operands: d (vector), address (2); mode: 1 transposed. Lanes 8 i .. 8 i + 7 give the rows of matrix i.
inline void load_matrices(Warp& warp, const Instruction& in, u32) {
  for (int m = 0; m < in.vector; m++) {
    u16 matrix[8][8];
    for (int row = 0; row < 8; row++) {
      u8* from = locate(warp, SHARED, address_of(warp, in, in.vector, 8 * m + row), 16, 8 * m + row, READ);
      if (from == nullptr) return;
      std::memcpy(matrix[row], from, 16);
    }
    u32* d = row_of<u32>(warp, in, m);
    for (int lane = 0; lane < LANES; lane++) {
      const int g = lane / 4, t = lane % 4 * 2;
      d[lane] = in.mode ? matrix[t][g] | u32(matrix[t + 1][g]) << 16 : matrix[g][t] | u32(matrix[g][t + 1]) << 16;
    }
  }
}
inline void store_matrices(Warp& warp, const Instruction& in, u32) {
  for (int m = 0; m < in.vector; m++) {
    u16 matrix[8][8];
    const u32* s = row_of<u32>(warp, in, 2 + m);
    for (int lane = 0; lane < LANES; lane++) {
      const int g = lane / 4, t = lane % 4 * 2;
      (in.mode ? matrix[t][g] : matrix[g][t]) = u16(s[lane]), (in.mode ? matrix[t + 1][g] : matrix[g][t + 1]) = u16(s[lane] >> 16);
    }
    for (int row = 0; row < 8; row++) {
      u8* to = locate(warp, SHARED, address_of(warp, in, 0, 8 * m + row), 16, 8 * m + row, WRITE);
      if (to == nullptr) return;
      std::memcpy(to, matrix[row], 16);
    }
  }
}
inline void move_matrix(Warp& warp, const Instruction& in, u32) {
  u16 matrix[8][8];
  u32 *d = row_of<u32>(warp, in, 0), *s = row_of<u32>(warp, in, 1);
  for (int lane = 0; lane < LANES; lane++) matrix[lane / 4][lane % 4 * 2] = u16(s[lane]), matrix[lane / 4][lane % 4 * 2 + 1] = u16(s[lane] >> 16);
  for (int lane = 0; lane < LANES; lane++) {
    const int g = lane / 4, t = lane % 4 * 2;
    d[lane] = matrix[t][g] | u32(matrix[t + 1][g]) << 16;
  }
}

// A matrix in shared memory as wgmma's descriptor says: 8 rows of 16 bytes are a core matrix; swizzled rows are longer.
struct Descriptor {
  u64 start, leading, stride;
  int swizzle;  // 0, or 128, 64, 32 bytes
  explicit Descriptor(u64 word)
      : start((word & 0x3fff) << 4), leading((word >> 16 & 0x3fff) << 4), stride((word >> 32 & 0x3fff) << 4) {
    const int kind = word >> 62;
    swizzle = kind == 1 ? 128 : kind == 2 ? 64 : kind == 3 ? 32 : 0;
  }
  // Byte address of a number, `k` bytes along the inputs; transposed: numbers of one input follow each other along rows.
  u64 at(int row, int k, int bytes, bool is_transposed) const {
    u64 address;
    if (!is_transposed && swizzle == 0) address = start + k * bytes / 16 * leading + row / 8 * stride + row % 8 * 16 + k * bytes % 16;
    else if (!is_transposed) address = start + row / 8 * stride + row % 8 * swizzle + k * bytes;
    else if (swizzle == 0) address = start + row / 8 * stride + k / 8 * leading + k % 8 * 16 + row % 8 * bytes;
    else address = start + row * bytes / swizzle * leading + k / 8 * stride + k % 8 * swizzle + row * bytes % swizzle;
    if (swizzle) address ^= (address >> 7 & (swizzle / 16 - 1)) << 4;
    return address;
  }
};
// One warp's 16 rows of m64nNkK. Operands: d (N / 2), a (4, or 1: a descriptor), b's descriptor, scale-d predicate.
// vector: N; mode: 1 A in shared memory, 2 B transposed, 4 A transposed. Warps of a group come one by one: they share nothing.
template <class T, int K> void multiply_group(Warp& warp, const Instruction& in, u32) {
  const int n = in.vector, first_a = n / 2, in_shared = in.mode & 1, bytes = 16 / (K / 2);
  const int first_b = first_a + (in_shared ? 1 : 4);
  float a[16][K];
  auto read = [&](const Descriptor& d, int row, int k, bool is_transposed) {
    u8* at = locate(warp, SHARED, d.at(row, k, bytes, is_transposed), bytes, 0, READ);
    if (at == nullptr) return 0.f;
    u32 word = 0;
    std::memcpy(&word, at, bytes);
    return number<T>(word, 0);
  };
  if (in_shared) {
    const Descriptor d(row_of<u64>(warp, in, first_a)[0]);
    const int quarter = warp.row<u32>(warp.machine->kernel->special_row + 13 * 128)[0] % 4 * 16;
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < K; k++) a[row][k] = read(d, quarter + row, k, in.mode & 4);
  } else {
    gather_a<T, K>(warp, in, first_a, a);
  }
  const Descriptor d(row_of<u64>(warp, in, first_b)[0]);
  const u32 adds = predicate(warp, in, first_b + 1);
  for (int column = 0; column < n; column++) {
    float b[K];
    for (int k = 0; k < K; k++) b[k] = read(d, column, k, in.mode & 2);
    for (int row = 0; row < 16; row++) {
      const int lane = row % 8 * 4 + column % 8 / 2, r = column / 8 * 4 + row / 8 * 2 + column % 2;
      u32* sums = row_of<u32>(warp, in, r);
      float sum = adds & 1 ? float_of(sums[lane]) : 0.f;
      for (int k = 0; k < K; k++) sum += a[row][k] * b[k];
      sums[lane] = bits_of(sum);
    }
  }
}

inline void tensor_table(Table& table) {
  table["shfl"] = shuffle;
  table["vote"] = vote;
  table["mma.m16n8k16.f32.f16"] = multiply<f16, 16, float>;
  table["mma.m16n8k16.f32.bf16"] = multiply<bf16, 16, float>;
  table["mma.m16n8k32.f32.e4m3"] = multiply<e4m3, 32, float>;
  table["mma.m16n8k32.s32.s8"] = multiply<s8, 32, i32>;
  table["ldmatrix"] = load_matrices;
  table["stmatrix"] = store_matrices;
  table["movmatrix"] = move_matrix;
  table["wgmma.k16.f32.f16"] = multiply_group<f16, 16>;
  table["wgmma.k16.f32.bf16"] = multiply_group<bf16, 16>;
  table["wgmma.k32.f32.e4m3"] = multiply_group<e4m3, 32>;
  SIM_HANDLER("activemask") {
    u32* d = row_of<u32>(warp, in, 0);
    FOR_LANES(mask) d[lane] = mask;
  };
  SIM_HANDLER("elect") {  // operands: d or -1, predicate
    u32& p = predicate(warp, in, 1);
    const int leader = __builtin_ctz(mask);
    p = (p & ~mask) | 1u << leader;
    if (operand(warp, in, 0) >= 0) FOR_LANES(mask) row_of<u32>(warp, in, 0)[lane] = leader;
  };
}

}  // namespace sim

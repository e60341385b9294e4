// Packed weight formats and how a warp multiplies one unit of them. Knows nothing of pipelines and outputs.
//
// A unit is 16 rows x 128 inputs, and weights [ROWS, K] are units [ROWS / 16][K / 128]. The inputs of a unit are cut into
// four quarters q of 32; lane (g, t) holds rows g and g + 8, inputs 32 q + 8 t .. + 7. So eight neighbouring inputs of a
// token are one 16-byte load of x, and two k-steps of the tensor core: inputs 0-3 of the eight, then 4-7 (the tensor core
// does not care which input is called which, as long as A and B agree).
// In the unit come the codes, as 16-byte pieces [load][lane], then the scales [128 / GROUP][g](row g, row g + 8).
//   16-bit: load 2 q + r: the eight inputs of row g + 8 r.        int8: load q: 8 bytes of row g, then 8 of row g + 8.
//   int4:   load q / 2: words (q even, g), (q even, g + 8), (q odd, g), (q odd, g + 8); the nibbles of a word, lowest
//           first, are inputs 0 2 4 6 1 3 5 7, so that a mask and a shift by 8 leave pairs in the halves of a register.
// int4 and int8 codes are stored with 8 and 128 added. Products of codes are summed in float32 over a group of inputs and
// then multiplied by its scale, so that a code is never rounded.
#pragma once
#include "pipeline.cuh"

namespace tw {

constexpr int UNIT_ROWS = 16;
constexpr int UNIT_INPUTS = 128;
constexpr int QUARTERS = 4;

// Scales of GROUP inputs inside the unit; GROUP = 0: none here (one per row, applied to the finished sum, or none at all).
template <class Type, int GROUP, int CODE_BYTES_> struct UnitShape {
  using Number = Type;
  static constexpr int CODE_BYTES = CODE_BYTES_;
  static constexpr int LOADS = CODE_BYTES / (16 * LANES);
  static constexpr int SCALE_BYTES = GROUP ? UNIT_INPUTS / GROUP * UNIT_ROWS * 2 : 0;
  static constexpr int BYTES = CODE_BYTES + SCALE_BYTES;
  static constexpr bool HAS_SCALES = GROUP > 0;
  static constexpr bool ROW_SCALES = GROUP == 0 && CODE_BYTES < 4096;
  static constexpr int GROUP_QUARTERS = GROUP ? GROUP / 32 : QUARTERS;

  __device__ static float2 scales(const char* unit, int q, int lane) {
    auto all = reinterpret_cast<const typename Pair<Type>::type*>(unit + CODE_BYTES);
    return to_float(all[q / GROUP_QUARTERS * 8 + lane / 4]);
  }
};

// Weights::fragments<EXACT> gives the A operands of a quarter's two products: inputs 0 1 4 5 of the lane's eight, then 2 3 6 7.
// EXACT: the codes themselves. Otherwise what a mask leaves, which costs half the instructions: the first product is
// RAW_FACTOR times too small, the second RAW_FACTOR / RAW_RATIO times, and every code is RAW_BIAS too large (taken off by a sum of x).
struct NotBiased {
  static constexpr float RAW_FACTOR = 1.f, RAW_RATIO = 1.f, RAW_BIAS = 0.f;
};

template <class Type> struct Plain : UnitShape<Type, 0, 4096>, NotBiased {
  template <bool EXACT> __device__ static void fragments(const uint4* codes, int q, u32 (&a)[2][4]) {
    const uint4 lower = codes[2 * q], upper = codes[2 * q + 1];
    a[0][0] = lower.x, a[0][1] = upper.x, a[0][2] = lower.z, a[0][3] = upper.z;
    a[1][0] = lower.y, a[1][1] = upper.y, a[1][2] = lower.w, a[1][3] = upper.w;
  }
};

template <class Type> struct Int4Numbers;

// In float16, 1024 + code has the code in the lowest mantissa bits, and one nibble higher 1024 + 16 code. Without the
// 1024, the bits are a subnormal number, code * 2^-24 or code * 2^-20, which the tensor core multiplies exactly.
template <> struct Int4Numbers<half> {
  static constexpr float RAW_FACTOR = 16777216.f, RAW_RATIO = 1.f / 16.f, RAW_BIAS = 8.f;
  template <bool EXACT> __device__ static void pairs(u32 word, u32& k01, u32& k23, u32& k45, u32& k67) {
    const u32 high = word >> 8;
    if (!EXACT) {
      k01 = word & 0x000f000f, k23 = word & 0x00f000f0;
      k45 = high & 0x000f000f, k67 = high & 0x00f000f0;
      return;
    }
    const __half2 sixteenth = __float2half2_rn(0.0625f), bias = __float2half2_rn(-72.f), thousand = __float2half2_rn(1032.f);
    u32 b = and_or(word, 0x00f000f0, 0x64006400), d = and_or(high, 0x00f000f0, 0x64006400);
    __half2 fb = __hfma2(reinterpret_cast<__half2&>(b), sixteenth, bias);
    __half2 fd = __hfma2(reinterpret_cast<__half2&>(d), sixteenth, bias);
    k01 = subtract(and_or(word, 0x000f000f, 0x64006400), thousand);
    k45 = subtract(and_or(high, 0x000f000f, 0x64006400), thousand);
    k23 = reinterpret_cast<u32&>(fb), k67 = reinterpret_cast<u32&>(fd);
  }
};
// A bfloat16 has seven mantissa bits: only 128 + code of the lowest nibble fits.
template <> struct Int4Numbers<bfloat16> {
  static constexpr float RAW_FACTOR = 1.f, RAW_RATIO = 1.f, RAW_BIAS = 136.f;
  template <bool EXACT> __device__ static void pairs(u32 word, u32& k01, u32& k23, u32& k45, u32& k67) {
    k01 = and_or(word, 0x000f000f, 0x43004300), k23 = and_or(word >> 4, 0x000f000f, 0x43004300);
    k45 = and_or(word >> 8, 0x000f000f, 0x43004300), k67 = and_or(word >> 12, 0x000f000f, 0x43004300);
    if (!EXACT) return;
    const __nv_bfloat162 bias = __float2bfloat162_rn(136.f);
    k01 = subtract(k01, bias), k23 = subtract(k23, bias), k45 = subtract(k45, bias), k67 = subtract(k67, bias);
  }
};

template <class Type, int GROUP> struct Int4 : UnitShape<Type, GROUP, 1024>, Int4Numbers<Type> {
  template <bool EXACT> __device__ static void fragments(const uint4* codes, int q, u32 (&a)[2][4]) {
    const uint4 four = codes[q / 2];
    Int4Numbers<Type>::template pairs<EXACT>(q % 2 ? four.z : four.x, a[0][0], a[1][0], a[0][2], a[1][2]);
    Int4Numbers<Type>::template pairs<EXACT>(q % 2 ? four.w : four.y, a[0][1], a[1][1], a[0][3], a[1][3]);
  }
};

// 1024 + byte is exact in float16; a bfloat16 holds -128..127 but not 1024 + byte, so it goes through float32.
template <class Type> struct Int8Numbers;
template <> struct Int8Numbers<half> {
  static constexpr float RAW_FACTOR = 16777216.f, RAW_RATIO = 1.f, RAW_BIAS = 128.f;
  template <bool EXACT> __device__ static u32 pair(u32 word, int i) {
    if (!EXACT) return __byte_perm(word, 0, i ? 0x4342 : 0x4140);
    return subtract(__byte_perm(word, 0x64646464, i ? 0x4342 : 0x4140), __float2half2_rn(1152.f));
  }
};
template <> struct Int8Numbers<bfloat16> : NotBiased {
  template <bool EXACT> __device__ static u32 pair(u32 word, int i) {
    float lower = __uint_as_float(__byte_perm(word, 0x4b000000, i ? 0x7442 : 0x7440)) - 8388736.f;
    float upper = __uint_as_float(__byte_perm(word, 0x4b000000, i ? 0x7443 : 0x7441)) - 8388736.f;
    return tw::pack<bfloat16>(lower, upper);
  }
};

// An e4m3 byte in the upper half of 16 bits, its exponent and mantissa moved to where the wider type has them, is the
// number times a power of two: 2^-8 in float16, 2^-120 in bfloat16.
template <class Type> struct Fp8Numbers;
template <> struct Fp8Numbers<half> {
  static constexpr float RAW_FACTOR = 256.f, RAW_RATIO = 1.f, RAW_BIAS = 0.f;
  template <bool EXACT> __device__ static u32 pair(u32 word, int i) {
    u32 bytes = __byte_perm(word, 0, i ? 0x3424 : 0x1404);
    u32 moved = (bytes & 0x80008000) | ((bytes & 0x7f007f00) >> 1);
    if (!EXACT) return moved;
    __half2 r = __hmul2(reinterpret_cast<__half2&>(moved), __float2half2_rn(256.f));
    return reinterpret_cast<u32&>(r);
  }
};
template <> struct Fp8Numbers<bfloat16> : NotBiased {
  template <bool EXACT> __device__ static u32 pair(u32 word, int i) {
    u32 bytes = __byte_perm(word, 0, i ? 0x3424 : 0x1404);
    u32 moved = (bytes & 0x80008000) | ((bytes & 0x7f007f00) >> 4);
    __nv_bfloat162 r = __hmul2(reinterpret_cast<__nv_bfloat162&>(moved), __float2bfloat162_rn(1.329227995784916e36f));
    return reinterpret_cast<u32&>(r);
  }
};

template <class Numbers, class Type, int GROUP> struct Bytes : UnitShape<Type, GROUP, 2048>, Numbers {
  template <bool EXACT> __device__ static void fragments(const uint4* codes, int q, u32 (&a)[2][4]) {
    const uint4 four = codes[q];
    a[0][0] = Numbers::template pair<EXACT>(four.x, 0), a[1][0] = Numbers::template pair<EXACT>(four.x, 1);
    a[0][2] = Numbers::template pair<EXACT>(four.y, 0), a[1][2] = Numbers::template pair<EXACT>(four.y, 1);
    a[0][1] = Numbers::template pair<EXACT>(four.z, 0), a[1][1] = Numbers::template pair<EXACT>(four.z, 1);
    a[0][3] = Numbers::template pair<EXACT>(four.w, 0), a[1][3] = Numbers::template pair<EXACT>(four.w, 1);
  }
};
template <class Type, int GROUP> using Int8 = Bytes<Int8Numbers<Type>, Type, GROUP>;
template <class Type, int GROUP> using Fp8 = Bytes<Fp8Numbers<Type>, Type, GROUP>;

// sums[r][n] += units[r] * x: ROW_TILES units (TILE_STRIDE bytes apart) with the same inputs, TOKEN_TILES tiles of tokens.
// `x` points at this lane's 16 bytes of quarter 0, token tile 0. With many tokens a second set of sums would not fit into
// registers: there the scale goes onto the weight, which then is rounded to its type.
template <class Weights, int ROW_TILES, int TOKEN_TILES, int QUARTER_STRIDE, int TOKEN_STRIDE>
__device__ inline void multiply_unit(const char* units, int tile_stride, const char* x, int lane,
                                     float (&sums)[ROW_TILES][TOKEN_TILES][4]) {
  using Type = typename Weights::Number;
  constexpr bool SCALE_FIRST = Weights::HAS_SCALES && TOKEN_TILES >= 4, SCALE_SUMS = Weights::HAS_SCALES && !SCALE_FIRST;
  uint4 codes[ROW_TILES][Weights::LOADS];
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int i = 0; i < Weights::LOADS; i++)
      codes[r][i] = reinterpret_cast<const uint4*>(units + r * tile_stride)[i * LANES + lane];

  float group[ROW_TILES][TOKEN_TILES][4];
#pragma unroll
  for (int q = 0; q < QUARTERS; q++) {
    if (SCALE_SUMS && q % Weights::GROUP_QUARTERS == 0)
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) group[r][n][i] = 0.f;
    // All of the quarter's x is asked for before the codes are taken apart, which takes as long as it needs to come.
    uint4 b[TOKEN_TILES];
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) b[n] = *reinterpret_cast<const uint4*>(x + q * QUARTER_STRIDE + n * TOKEN_STRIDE);
    u32 a[ROW_TILES][2][4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
      Weights::template fragments<true>(codes[r], q, a[r]);
      if (SCALE_FIRST) {
        const float2 scale = Weights::scales(units + r * tile_stride, q, lane);
#pragma unroll
        for (int i = 0; i < 8; i++) a[r][i / 4][i % 4] = tw::scaled<Type>(a[r][i / 4][i % 4], i % 2 ? scale.y : scale.x);
      }
    }
    // The two products of a sum lie far apart: the second waits for the first.
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
          float(&c)[4] = SCALE_SUMS ? group[r][n] : sums[r][n];
          if (half == 0) multiply<Type>(c, a[r][0], b[n].x, b[n].z);
          else multiply<Type>(c, a[r][1], b[n].y, b[n].w);
        }
    if (SCALE_SUMS && (q + 1) % Weights::GROUP_QUARTERS == 0)
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++) {
        const float2 scale = Weights::scales(units + r * tile_stride, q, lane);
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
          sums[r][n][0] += scale.x * group[r][n][0], sums[r][n][1] += scale.x * group[r][n][1];
          sums[r][n][2] += scale.y * group[r][n][2], sums[r][n][3] += scale.y * group[r][n][3];
        }
      }
  }
}

// A lane's 16 bytes of x, where it has any; elsewhere `b` stays what it is. Only lanes with x load: shared memory takes a
// cycle for every 8 lanes that take part, and sums of absent tokens are never used. So zeros are written once, not per load.
__device__ inline void load_where(bool has_x, uint4& b, u32 x) {
  asm("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(b.x), "+r"(b.y), "+r"(b.z), "+r"(b.w) : "r"(x), "r"((u32)has_x));
}

// One flag several times, such that the compiler does not know: loads under the same flag would become a branch.
struct Flags {
  bool each[QUARTERS];
  __device__ explicit Flags(bool value) {
    const u32 bits = __shfl_sync(~0u, value ? 15u : 0u, threadIdx.x % LANES);
#pragma unroll
    for (int i = 0; i < QUARTERS; i++) each[i] = bits >> i & 1;
  }
};

// Eight neighbouring inputs in the order that multiply_unit_raw takes them: each product's are one pair of registers.
__device__ inline uint4 paired(const uint4& x) { return make_uint4(x.x, x.z, x.y, x.w); }

// The same for one row tile and at most 8 tokens, with codes as a mask leaves them and x `paired` at an address in shared
// memory. `b` is zero at first, and the same from call to call. `bias` points at -RAW_BIAS times the sums of x of this lane's two tokens,
// one float2 per group, 8 floats apart.
template <class Weights, int QUARTER_STRIDE>
__device__ inline void multiply_unit_raw(const char* unit, u32 x, const float* bias, const Flags& has_x, int lane, uint4 (&b)[QUARTERS],
                                         float (&sum)[4]) {
  using Type = typename Weights::Number;
  uint4 codes[Weights::LOADS];
#pragma unroll
  for (int i = 0; i < Weights::LOADS; i++) codes[i] = reinterpret_cast<const uint4*>(unit)[i * LANES + lane];
#pragma unroll
  for (int q = 0; q < QUARTERS; q++) load_where(has_x.each[q], b[q], x + q * QUARTER_STRIDE);
#pragma unroll
  for (int first = 0; first < QUARTERS; first += Weights::GROUP_QUARTERS) {
    float low[4] = {}, high[4] = {};
#pragma unroll
    for (int q = first; q < first + Weights::GROUP_QUARTERS; q++) {
      u32 a[2][4];
      Weights::template fragments<false>(codes, q, a);
      multiply<Type>(low, a[0], b[q].x, b[q].y);
      multiply<Type>(high, a[1], b[q].z, b[q].w);
    }
    float2 scale = make_float2(1.f, 1.f), offset = make_float2(0.f, 0.f);
    if (Weights::HAS_SCALES) scale = Weights::scales(unit, first, lane);
    if (Weights::RAW_BIAS != 0.f) offset = *reinterpret_cast<const float2*>(bias + first / Weights::GROUP_QUARTERS * 8);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float product = fmaf(fmaf(high[i], Weights::RAW_RATIO, low[i]), Weights::RAW_FACTOR, i % 2 ? offset.y : offset.x);
      sum[i] = fmaf(i < 2 ? scale.x : scale.y, product, sum[i]);
    }
  }
}

}  // namespace tw

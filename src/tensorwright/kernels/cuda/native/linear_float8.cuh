// A linear for many tokens in float8, on sm_90a: packed weights by activations that have one scale per token.
//
// A tile is 128 rows of weights by 256 tokens. Two warpgroups multiply 64 rows each: the 16 bytes that a lane has of a
// quarter of a packed unit are its part of the A operand of m64n256k32 as they lie, so weights go from shared memory into
// registers and on without another instruction. The tensor core reads the tokens from shared memory itself. A third
// warpgroup copies, 128 inputs a stage. Blocks take tiles in turn; TOGETHER token tiles follow each other before the next
// rows do, so that what runs at a time reads the same weights and tokens out of the L2.
//
// Activations lie in "float8 order": [K / 128][tokens / 8][quarter 4][half 2][8 tokens][16], 8 tokens by 16 bytes being what
// the tensor core reads at a time. The 16 bytes of a token's first half are inputs 8 t .. 8 t + 3 of the quarter for t = 0,
// 1, 2, 3, those of the second 8 t + 4 .. 8 t + 7: where packed weights have them.
//
// Sums stay in the tensor core's accumulators, which keep fewer bits than float32 does.
#pragma once
#include "prefill.cuh"

namespace tw {

constexpr int FLOAT8_TOKENS = 256;  // of a tile: activations are padded up to a multiple of them

__host__ __device__ inline int float8_tiles(int tokens) { return (tokens + FLOAT8_TOKENS - 1) / FLOAT8_TOKENS; }

// An operand of prefill.cuh's kind: float8 in float8 order, and one scale a row.
struct RowsFloat8Order {
  char* x;        // of float8_tiles(rows) tiles
  float* scales;  // [rows]
  int rows;

  template <int THREADS, int COLUMNS> __device__ void put(float (&values)[PARTS<THREADS, COLUMNS>][8]) const {
    scale_row<THREADS, COLUMNS>(values, scales);
    const int row = blockIdx.x, groups = float8_tiles(rows) * (FLOAT8_TOKENS / 8);
#pragma unroll
    for (int part = 0; part < PARTS<THREADS, COLUMNS>; part++)
      if (const int column = column_of<THREADS>(part); column < COLUMNS) {
        const float(&eight)[8] = values[part];
        const size_t quarter = ((size_t)(column / UNIT_INPUTS) * groups + row / 8) * QUARTERS + column / 32 % 4;
        char* to = x + quarter * 256 + row % 8 * 16 + column / 8 % 4 * 4;
        *reinterpret_cast<u32*>(to) = to_float8(eight[0], eight[1]) | to_float8(eight[2], eight[3]) << 16;
        *reinterpret_cast<u32*>(to + 128) = to_float8(eight[4], eight[5]) | to_float8(eight[6], eight[7]) << 16;
      }
  }
};

template <class Type> struct Float8Linear {
  const char* weights;     // units [ROWS / 16][K / 128], of whole tiles of 16
  const Type* row_scales;  // by packed row
  const char* x;           // float8 order, of whole tiles
  const float* x_scales;   // [tokens]
  int tokens;
};

// Outputs: store(tile, token, tokens, values) gets of a row tile and of the 8 tokens from `token` on, of which those below
// `tokens` exist: (row g, token 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). Whole warps call it.

// As rows of float32, with bias and residual.
template <class Order, int ROWS> struct Float8Results {
  Rows<Order, ROWS> to;
  __device__ void store(int tile, int token, int tokens, const float (&values)[4]) const {
    const int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (token + 2 * t + i % 2 < tokens) to.put(Order::row(tile * UNIT_ROWS + g + i / 2 * 8), token + 2 * t + i % 2, values[i]);
  }
};

__device__ inline u32 transposed(u32 a) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}
// Eight neighbouring columns of eight tokens, of which a lane has (column g, tokens 2t, 2t + 1): then it has columns 2t,
// 2t + 1 of token g.
template <class Type> __device__ inline void store_columns(Type* y, int width, int token, int tokens, int column, float even, float odd) {
  const int lane = threadIdx.x % LANES;
  const u32 two = transposed(pack<Type>(finite<Type>(even), finite<Type>(odd)));
  if (token + lane / 4 < tokens) *reinterpret_cast<u32*>(y + (size_t)(token + lane / 4) * width + column + lane % 4 * 2) = two;
}

// As 16-bit rows [tokens][ROWS].
template <class Type, class Order, int ROWS> struct Float8Products {
  Type* y;
  __device__ void store(int tile, int token, int tokens, const float (&values)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; half++)
      store_columns(y, ROWS, token, tokens, Order::row(tile * UNIT_ROWS + half * 8), values[half * 2], values[half * 2 + 1]);
  }
};

// f(gate) * up of rows packed as GatePairs, as 16-bit rows [tokens][COLUMNS].
template <class Type, Function FUNCTION, int COLUMNS> struct Float8Gated {
  Type* y;
  __device__ void store(int tile, int token, int tokens, const float (&values)[4]) const {
    store_columns(y, COLUMNS, token, tokens, tile * 8, activate<FUNCTION>(values[0]) * values[2], activate<FUNCTION>(values[1]) * values[3]);
  }
};

__device__ inline void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ inline void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
__device__ inline void expect_bytes(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ inline void copy_bulk(void* to, const void* from, u32 bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
template <int REGISTERS> __device__ inline void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS> __device__ inline void leave_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }

// 8 tokens x 16 bytes are contiguous; the other half of a quarter's inputs follows, the next eight tokens come 1,024 bytes
// later. A quarter is 256 bytes.
__device__ inline u64 float8_descriptor(const void* tokens) {
  return (u64)((shared_address(tokens) & 0x3ffff) >> 4) | (u64)(128 >> 4) << 16 | (u64)(1024 >> 4) << 32;
}

// c += a * tokens: 64 rows of a warpgroup, 256 tokens, the 32 inputs of a quarter.
__device__ inline void multiply_float8(float (&c)[128], const uint4& a, u64 tokens) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
               "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
               "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
               "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
               "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127 "
               "}, {%128, %129, %130, %131}, %132, p, 1, 1; }"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
                 "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
                 "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
                 "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
                 "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
                 "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
                 "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
                 "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63]),
                 "+f"(c[64]), "+f"(c[65]), "+f"(c[66]), "+f"(c[67]), "+f"(c[68]), "+f"(c[69]), "+f"(c[70]), "+f"(c[71]),
                 "+f"(c[72]), "+f"(c[73]), "+f"(c[74]), "+f"(c[75]), "+f"(c[76]), "+f"(c[77]), "+f"(c[78]), "+f"(c[79]),
                 "+f"(c[80]), "+f"(c[81]), "+f"(c[82]), "+f"(c[83]), "+f"(c[84]), "+f"(c[85]), "+f"(c[86]), "+f"(c[87]),
                 "+f"(c[88]), "+f"(c[89]), "+f"(c[90]), "+f"(c[91]), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95]),
                 "+f"(c[96]), "+f"(c[97]), "+f"(c[98]), "+f"(c[99]), "+f"(c[100]), "+f"(c[101]), "+f"(c[102]), "+f"(c[103]),
                 "+f"(c[104]), "+f"(c[105]), "+f"(c[106]), "+f"(c[107]), "+f"(c[108]), "+f"(c[109]), "+f"(c[110]), "+f"(c[111]),
                 "+f"(c[112]), "+f"(c[113]), "+f"(c[114]), "+f"(c[115]), "+f"(c[116]), "+f"(c[117]), "+f"(c[118]), "+f"(c[119]),
                 "+f"(c[120]), "+f"(c[121]), "+f"(c[122]), "+f"(c[123]), "+f"(c[124]), "+f"(c[125]), "+f"(c[126]), "+f"(c[127])
               : "r"(a.x), "r"(a.z), "r"(a.y), "r"(a.w), "l"(tokens));
}

struct Float8Tiles {
  static constexpr int WARPS = 8, COPYING = 4, THREADS = (WARPS + COPYING) * LANES, STAGES = 4;
  static constexpr int UNIT_BYTES = UNIT_ROWS * UNIT_INPUTS, CHUNK_BYTES = FLOAT8_TOKENS * UNIT_INPUTS;
  static constexpr int STAGE_BYTES = WARPS * UNIT_BYTES + CHUNK_BYTES;  // shared memory: STAGES of them
};

template <class Type, int ROWS, int K, int TOGETHER, class Output>
__global__ void __launch_bounds__(Float8Tiles::THREADS, 1) linear_float8(const Float8Linear<Type> input, const Output output) {
  using Tiles = Float8Tiles;
  constexpr int WARPS = Tiles::WARPS, STAGES = Tiles::STAGES, UNIT_BYTES = Tiles::UNIT_BYTES, CHUNK_BYTES = Tiles::CHUNK_BYTES;
  constexpr int ROW_TILES = (ROWS + UNIT_ROWS - 1) / UNIT_ROWS, ROW_BLOCKS = (ROW_TILES + WARPS - 1) / WARPS;
  constexpr int STEPS = (K + UNIT_INPUTS - 1) / UNIT_INPUTS;
  extern __shared__ __align__(128) char memory[];
  __shared__ u64 filled[STAGES], emptied[STAGES];
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  const int token_tiles = float8_tiles(input.tokens), tiles = ROW_BLOCKS * token_tiles;
  auto place = [&](int tile, int& first_row_tile, int& first_token) {
    const int group = tile / (ROW_BLOCKS * TOGETHER), within = tile % (ROW_BLOCKS * TOGETHER);
    const int width = min(TOGETHER, token_tiles - group * TOGETHER);
    first_row_tile = within / width * WARPS, first_token = (group * TOGETHER + within % width) * FLOAT8_TOKENS;
  };

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(&filled[s], Tiles::COPYING);
      barrier_init(&emptied[s], WARPS);
    }
    barriers_ready();
  }
  __syncthreads();
  begin_kernel();
  RingPosition<STAGES> at;
  int first_row_tile, first_token;

  if (warp >= WARPS) {  // each of these copies two units and a quarter of the tokens
    leave_registers<24>();
    if (lane > 0) return;
    constexpr int PIECE_BYTES = CHUNK_BYTES / Tiles::COPYING, UNITS = WARPS / Tiles::COPYING;
    const int part = warp - WARPS;
    int fresh = STAGES;  // stages that nobody has used yet
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      place(tile, first_row_tile, first_token);
      const char* x = input.x + (size_t)first_token * UNIT_INPUTS + part * PIECE_BYTES;
      for (int step = 0; step < STEPS; step++) {
        if (fresh > 0) fresh--;
        else barrier_wait(&emptied[at.stage], at.parity ^ 1);
        char* stage = memory + at.stage * Tiles::STAGE_BYTES;
        u64* barrier = &filled[at.stage];
        expect_bytes(barrier, UNITS * UNIT_BYTES + PIECE_BYTES);
        copy_bulk(stage + WARPS * UNIT_BYTES + part * PIECE_BYTES, x + (size_t)step * token_tiles * CHUNK_BYTES, PIECE_BYTES, barrier);
#pragma unroll
        for (int i = 0; i < UNITS; i++) {  // rows beyond the last are the last again, and go nowhere
          const int unit = part * UNITS + i, row_tile = min(first_row_tile + unit, ROW_TILES - 1);
          copy_bulk(stage + unit * UNIT_BYTES, input.weights + ((size_t)row_tile * STEPS + step) * UNIT_BYTES, UNIT_BYTES, barrier);
        }
        at.advance();
      }
    }
    return;
  }

  take_registers<240>();
  auto release = [&](int stage) {
    __syncwarp();
    if (lane == 0) barrier_arrive(&emptied[stage]);
  };
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    place(tile, first_row_tile, first_token);
    float sums[FLOAT8_TOKENS / 2];
#pragma unroll
    for (int i = 0; i < FLOAT8_TOKENS / 2; i++) sums[i] = 0.f;
    int to_release = -1;
#pragma unroll 1
    for (int step = 0; step < STEPS; step += 2) {
      uint4 a[2][QUARTERS];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (STEPS % 2 && step + half == STEPS) break;
        barrier_wait(&filled[at.stage], at.parity);
        const char* stage = memory + at.stage * Tiles::STAGE_BYTES;
#pragma unroll
        for (int q = 0; q < QUARTERS; q++) a[half][q] = reinterpret_cast<const uint4*>(stage + warp * UNIT_BYTES)[q * LANES + lane];
        const u64 tokens = float8_descriptor(stage + WARPS * UNIT_BYTES);
        products_fence();
#pragma unroll
        for (int q = 0; q < QUARTERS; q++) multiply_float8(sums, a[half][q], tokens + q * (256 >> 4));
        products_commit();
        products_wait<1>();
        if (to_release >= 0) release(to_release);  // its products came before these
        to_release = at.stage;
        at.advance();
      }
    }
    products_wait<0>();
    release(to_release);

    const int row_tile = first_row_tile + warp;
    if (row_tile >= ROW_TILES) continue;
    const Type* row_scales = input.row_scales + row_tile * UNIT_ROWS + g;
    const float scale[2] = {to_float(row_scales[0]), to_float(row_scales[8])};
#pragma unroll
    for (int n = 0; n < FLOAT8_TOKENS / 8; n++) {
      const int token = first_token + n * 8;
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        values[i] = sums[4 * n + i] * (scale[i / 2] * __ldcg(input.x_scales + min(token + 2 * t + i % 2, input.tokens - 1)));
      output.store(row_tile, token, input.tokens, values);
    }
  }
}

}  // namespace tw

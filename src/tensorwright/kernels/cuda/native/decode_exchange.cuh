// What decode_layers takes, keeps in shared memory, and exchanges between its blocks. Knows no order of operations.
//
// Exchanged memory is words of 32 bits: two 16-bit numbers, or a float. A word that nobody has written is 0, and writers
// store the complement: all ones would be two NaNs that no conversion makes, so that no number is stored as 0.
#pragma once
#include "attention_decode.cuh"
#include "linear_small.cuh"

namespace tw {

template <class Type> struct LayerPointers {
  const char* weights[4];      // qkv, output projection, gate and up, down
  const float* attention_norm;  // [HIDDEN]
  const float* mlp_norm;
  Type* cache;                 // [blocks, 2, KV_HEADS, BLOCK_SIZE, 128]
};

template <class Type> struct LayersInput {
  const LayerPointers<Type>* layers;
  const float* final_norm;
  const Type* table;                 // [vocabulary, HIDDEN]
  const int *token_ids, *positions, *slots, *lengths, *block_tables;
  const float* inverse_frequencies;  // [64]
  u32 *x, *q, *kv, *attended, *x_mlp, *gated, *square_sums, *square_sums_mlp;  // exchanged words
  float* parts;                      // of attention: [tokens * KV_HEADS][chunks][heads per kv head][130]
  int* arrivals;                     // [tokens * KV_HEADS]
  Type* x_out;                       // input order, for the lm_head
  float* square_sums_out;            // [HIDDEN / 16, tokens]
  float* stream_out;                 // [tokens, HIDDEN]
  int num_layers, table_width, window;  // window 0: none
  float epsilon, scale;
};

constexpr u32 MAX_POLLS = 1u << 22;  // seconds: a block that never comes becomes an error, not a hang

__device__ inline void store_word(u32* to, u32 word) { asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory"); }
__device__ inline void publish(u32* to, u32 data) { store_word(to, ~data); }
__device__ inline void take_back(u32* to) { store_word(to, 0); }
// What this thread has written is there for all blocks before what its block publishes later.
__device__ inline void make_visible() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
__device__ inline uint4 read_words(const u32* from) {
  uint4 v;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
  return v;
}
__device__ inline bool are_there(const uint4& words) { return words.x && words.y && words.z && words.w; }
__device__ inline uint4 published(const uint4& words) { return make_uint4(~words.x, ~words.y, ~words.z, ~words.w); }
__device__ inline uint4 poll_words(const u32* from) {
  uint4 words = read_words(from);
  for (u32 polls = 0; !are_there(words); polls++) {
    words = read_words(from);
    if (polls == MAX_POLLS) __trap();
  }
  return published(words);
}

// After everything that reads the count: what blocks wait for in the next step differs from this one's.
__global__ void __launch_bounds__(1) count_step(u32* step) {
  launch_next_kernel();
  wait_for_previous_kernel();
  ++*step;
}

template <class Weights, int TOKENS_, int HIDDEN, int HEADS, int KV_HEADS, int FFN, int BLOCK_SIZE, int DEPTH, int WARPS, int BLOCKS>
struct Layers {
  using Type = typename Weights::Number;
  using Format = Weights;
  static constexpr int TOKENS = TOKENS_, STAGE_UNITS = 4096 / Weights::CODE_BYTES, STAGE_BYTES = STAGE_UNITS * Weights::BYTES, THREADS = WARPS * LANES;
  static constexpr int QKV_ROWS = (HEADS + 2 * KV_HEADS) * 128, ATTENDED = HEADS * 128, ROWS = HEADS / KV_HEADS;
  static constexpr int MAX_K = FFN > HIDDEN ? FFN : HIDDEN, GROUPS = Weights::HAS_SCALES ? QUARTERS / Weights::GROUP_QUARTERS : 1;
  static constexpr int larger(int a, int b) { return a > b ? a : b; }
  static constexpr int rows(int linear) { return linear == 0 ? QKV_ROWS : linear == 2 ? 2 * FFN : HIDDEN; }
  static constexpr int inputs(int linear) { return linear == 1 ? ATTENDED : linear == 3 ? FFN : HIDDEN; }
  static constexpr bool is_normed(int linear) { return linear % 2 == 0; }
  static constexpr int per_tile(int linear) { return inputs(linear) / 128 / STAGE_UNITS; }
  // Of one linear in one block: so many row tiles, and so many partial sums are kept.
  static constexpr int tiles(int linear) { return (rows(linear) / 16 + BLOCKS - 1) / BLOCKS; }
  static constexpr int stages(int linear) { return tiles(linear) * per_tile(linear); }
  static constexpr int MAX_TILES = larger(larger(tiles(0), tiles(1)), tiles(2)), MAX_STAGES = larger(larger(stages(0), stages(1)), larger(stages(2), stages(3)));
  static constexpr int X_BYTES = MAX_K * TOKENS * 2, SUM_BYTES = MAX_STAGES * TOKENS * 16 * 4;
  static constexpr int BIAS_BYTES = Weights::RAW_BIAS != 0.f ? MAX_K / 128 * GROUPS * 8 * 4 : 0;
  static constexpr int RING_BYTES = WARPS * DEPTH * STAGE_BYTES;
  static constexpr int SHARED_BYTES = RING_BYTES + X_BYTES + SUM_BYTES + BIAS_BYTES;
  static constexpr int MAX_LAYERS = 48, OWN_TILES = tiles(1), TABLE = 64, LEAST_KEYS = 256;
  static_assert(HIDDEN % 512 == 0 && ATTENDED % 512 == 0 && FFN % 512 == 0, "a stage lies in one row tile");
  static_assert(HIDDEN / 16 >= BLOCKS && QKV_ROWS / 16 >= BLOCKS && FFN / 8 >= BLOCKS, "every block has a part of every linear");
  static_assert(BLOCKS >= TOKENS * KV_HEADS, "a block for each kv head and token");

  struct Shared {
    u64 filled[WARPS][DEPTH];
    LayerPointers<Type> layers[MAX_LAYERS];
    size_t offset[4];  // of this block's units in each linear
    int first_tile[4], tiles[4], table[TABLE];
    float stream[OWN_TILES][TOKENS][16];
    alignas(16) float norms[2][OWN_TILES][16];  // this block's of the MLP, and of the next layer's attention
    alignas(16) Type row_scales[2][Weights::ROW_SCALES ? MAX_TILES : 1][16];  // of this linear and of the one before
    float2 rotation[TOKENS][64];
    float squares[WARPS][TOKENS], inverse_rms[TOKENS];
    float highest[WARPS][ROWS], totals[WARPS][ROWS];
    alignas(16) Type q[ROWS][128];
    alignas(16) Type kv[2][128];
    int is_last;
  };
};

// By all threads of a block: all of a linear's input, as it comes, to shared memory, with what products of raw codes need of it;
// and, where it is normed, this warp's share of its sum of squares. A barrier must follow.
template <class L, int INDEX>
__device__ inline void take_input(const u32* x, const u32* squares, char* x_shared, float* bias, float (*shared_squares)[L::TOKENS]) {
  constexpr int PIECES = L::inputs(INDEX) * L::TOKENS / 8, LOADS = (PIECES + L::THREADS - 1) / L::THREADS;
  constexpr int SQUARES = L::rows(1) / 16 * L::TOKENS / 4;
  constexpr bool IS_NORMED = L::is_normed(INDEX);
  static_assert(SQUARES <= L::THREADS && PIECES % LANES == 0, "at most four words of squares a thread; whole warps");
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, t = lane % 4;
  uint4 words[LOADS], four = make_uint4(~0u, ~0u, ~0u, ~0u);  // numbers 0 where this thread has none
#pragma unroll
  for (int i = 0; i < LOADS; i++) {
    const u32 first = i * L::THREADS + (int)threadIdx.x < PIECES ? 0 : ~0u;
    words[i] = make_uint4(first, ~0u, ~0u, ~0u);
  }
  if (IS_NORMED && threadIdx.x < SQUARES) four.x = 0;
  bool is_ready;
  u32 polls = 0;
  do {
#pragma unroll
    for (int i = 0; i < LOADS; i++)
      if (!are_there(words[i])) words[i] = read_words(x + (size_t)(i * L::THREADS + threadIdx.x) * 4);
    if (IS_NORMED && !are_there(four)) four = read_words(squares + threadIdx.x * 4);
    is_ready = are_there(four);
#pragma unroll
    for (int i = 0; i < LOADS; i++) is_ready = is_ready && are_there(words[i]);
    if (++polls == MAX_POLLS) __trap();
  } while (!is_ready);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < LOADS; i++) {
    const int piece = i * L::THREADS + threadIdx.x;
    if (piece >= PIECES) continue;  // whole warps
    const uint4 data = published(words[i]);
    reinterpret_cast<uint4*>(x_shared)[piece] = paired(data);
    if (L::Format::RAW_BIAS != 0.f) {
      float total = 0.f;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const u32 two = word(data, j);
        const float2 numbers = to_float(reinterpret_cast<const typename Pair<typename L::Type>::type&>(two));
        total += numbers.x + numbers.y;
      }
      // Pieces are [unit][quarter][token][t]: over t, then over the quarters of a group.
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      for (int o = 1; o < L::Format::GROUP_QUARTERS; o *= 2) total += __shfl_xor_sync(~0u, total, o * 4 * L::TOKENS);
      const int quarter = piece / (4 * L::TOKENS), token = piece / 4 % L::TOKENS;
      if (t == 0 && quarter % L::Format::GROUP_QUARTERS == 0)
        bias[quarter / L::Format::GROUP_QUARTERS * 8 + token] = -L::Format::RAW_BIAS * total;
    }
  }
  if (IS_NORMED) {
    const uint4 bits = published(four);  // words are [tile][token]
    const float values[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w)};
#pragma unroll
    for (int token = 0; token < L::TOKENS; token++) {
      float total = 0.f;
#pragma unroll
      for (int i = token; i < 4; i += L::TOKENS) total += values[i];
      for (int o = LANES / 2; o; o /= 2) total += __shfl_xor_sync(~0u, total, o);
      if (lane == 0) shared_squares[warp][token] = total;
    }
  }
}

}  // namespace tw

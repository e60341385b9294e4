// What decode_layers takes, keeps in shared memory, and exchanges between its blocks. Knows no order of operations.
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
  const u32* step;                   // goes up by one each step
  u64 *x, *q, *kv, *attended, *x_mlp, *gated, *square_sums, *square_sums_mlp;  // exchanged words; zero before the first step
  float* parts;                      // of attention: [tokens * KV_HEADS][chunks][heads per kv head][130]
  int* arrivals;                     // [tokens * KV_HEADS]
  Type* x_out;                       // input order, for the lm_head
  float* square_sums_out;            // [HIDDEN / 16, tokens]
  float* stream_out;                 // [tokens, HIDDEN]
  int num_layers, table_width, window;  // window 0: none
  float epsilon, scale;
};

constexpr u32 MAX_POLLS = 1u << 22;  // seconds: a block that never comes becomes an error, not a hang

__device__ inline void publish(u64* to, u32 data, u32 epoch) {
  asm volatile("st.volatile.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(data), "r"(epoch) : "memory");
}
__device__ inline uint4 read_words(const u64* from) {  // two words: data, epoch, data, epoch
  uint4 v;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
  return v;
}
__device__ inline uint4 poll_words(const u64* from, u32 epoch) {
  uint4 v = read_words(from);
  for (u32 polls = 0; v.y != epoch || v.w != epoch; polls++) {
    v = read_words(from);
    if (polls == MAX_POLLS) __trap();
  }
  return v;
}

// After everything that reads the count: what blocks wait for in the next step differs from this one's.
__global__ void __launch_bounds__(1) count_step(u32* step) {
  launch_next_kernel();
  wait_for_previous_kernel();
  ++*step;
}

template <class Weights, int TOKENS, int HIDDEN, int HEADS, int KV_HEADS, int FFN, int BLOCK_SIZE, int SLOTS, int WARPS, int BLOCKS>
struct Layers {
  using Type = typename Weights::Number;
  static constexpr int STAGE_UNITS = 4096 / Weights::CODE_BYTES, STAGE_BYTES = STAGE_UNITS * Weights::BYTES, THREADS = WARPS * LANES;
  static constexpr int QKV_ROWS = (HEADS + 2 * KV_HEADS) * 128, ATTENDED = HEADS * 128, ROWS = HEADS / KV_HEADS;
  static constexpr int MAX_K = FFN > HIDDEN ? FFN : HIDDEN, GROUPS = QUARTERS / Weights::GROUP_QUARTERS;
  static constexpr int tiles(int rows) { return (rows / 16 + BLOCKS - 1) / BLOCKS; }
  static constexpr int stages(int rows, int k) { return tiles(rows) * (k / 128 / STAGE_UNITS); }
  static constexpr int larger(int a, int b) { return a > b ? a : b; }
  // Of one linear in one block: so many partial sums are kept.
  static constexpr int MAX_STAGES = larger(larger(stages(QKV_ROWS, HIDDEN), stages(HIDDEN, ATTENDED)), larger(stages(2 * FFN, HIDDEN), stages(HIDDEN, FFN)));
  static constexpr int X_BYTES = MAX_K * TOKENS * 2, SUM_BYTES = MAX_STAGES * TOKENS * 16 * 4;
  static constexpr int BIAS_BYTES = MAX_K / 128 * GROUPS * 8 * 4;
  static constexpr int SHARED_BYTES = SLOTS * STAGE_BYTES + X_BYTES + SUM_BYTES + BIAS_BYTES;
  static constexpr int MAX_LAYERS = 48, OWN_TILES = tiles(HIDDEN), TABLE = 64, KEY_CHUNK = 256;

  struct Shared {
    u64 filled[SLOTS];
    int asked[SLOTS];  // the stage that a slot was last asked for
    LayerPointers<Type> layers[MAX_LAYERS];
    float stream[OWN_TILES][TOKENS][16];
    alignas(16) Type row_scales[Weights::ROW_SCALES ? larger(tiles(QKV_ROWS), tiles(2 * FFN)) : 1][16];  // of a linear
    alignas(16) float norms[2][OWN_TILES][16];  // this block's of the MLP, and of the next layer's attention
    float2 rotation[TOKENS][64];
    float squares[2][WARPS][TOKENS];
    int count[4], first_tile[4], table[TABLE];
    float highest[WARPS][ROWS], totals[WARPS][ROWS];
    alignas(16) Type q[ROWS][128];
    alignas(16) Type kv[2][128];
    int is_last;
  };
};

// Where the next stage to ask for lies.
struct Cursor {
  int layer = 0, linear = 0, base = 0;  // base: the linear's first stage in the sequence
};

}  // namespace tw

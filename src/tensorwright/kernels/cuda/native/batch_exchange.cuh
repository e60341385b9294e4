// How the blocks of decode_batch.cuh wait for each other, and what they hand over. Knows no order of operations.
//
// An operation is done when every block has arrived at its counter. Counters only grow: each step adds BLOCKS to each.
// Sums of cut row blocks need no counter: a place of `parts` holds +0 until its sum is there, which is never +0, and its
// reader puts +0 back.
#pragma once
#include "decode_exchange.cuh"
#include "linear_wgmma.cuh"

namespace tw {

// Of a layer. The linears come in the order of LayerPointers::weights.
enum Linear { QKV, OUTPUT, GATE_UP, DOWN };
constexpr int ATTENTION = 4, OPERATIONS = 5;

template <class Type> struct BatchInput {
  const LayerPointers<Type>* layers;
  const float* final_norm;
  const int *slots, *lengths, *block_tables;
  const float2* rotation;                      // [N, 64]: cosine and sine
  const u32* step;                             // goes up by one each step
  u32* done;                                   // [layers, OPERATIONS]
  float4* parts;                               // [BLOCKS][SLOTS][warps][row tiles of a warp][N / 8][32 lanes]
  float* stream;                               // [N, HIDDEN]
  Type *x, *q, *attended, *x_mlp, *gated;      // q: [N, HEADS, 128]; the others in core order
  float *square_sums, *square_sums_mlp;        // [BLOCKS, N]
  float* attention_parts;                      // [pieces of sequences][KV_HEADS][heads per kv head][130]
  int* attention_arrivals;                     // [N, KV_HEADS], 0 between steps
  int num_layers, table_width;
  float epsilon, scale;
};

// A block never came: an error, not a hang. (A trap would keep the assembler from giving warps different numbers of registers.)
__device__ inline void give_up() { asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(0ull), "r"(0) : "memory"); }

// Everything that this block wrote before its barrier comes before this.
__device__ inline void arrive_at(u32* done) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(done) : "memory"); }

// What the arrived blocks wrote is visible to this thread, and to the copies that it asks for.
__device__ inline void wait_for(const u32* done, u32 arrivals) {
  for (u32 polls = 0;; polls++) {
    u32 seen;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(done) : "memory");
    if ((int)(seen - arrivals) >= 0) break;
    if (polls == MAX_POLLS) return give_up();
  }
  asm volatile("fence.proxy.async;" ::: "memory");
}

__device__ inline float not_zero(float x) { return x == 0.f ? -0.f : x; }
__device__ inline void put_part(float4* part, const float* sums) {
  __stcg(part, make_float4(not_zero(sums[0]), not_zero(sums[1]), not_zero(sums[2]), not_zero(sums[3])));
}
__device__ inline float4 read_part(const float4* part) {
  float4 v;
  asm volatile("ld.volatile.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(part) : "memory");
  return v;
}
__device__ inline bool is_there(const float4& v) {
  return __float_as_uint(v.x) && __float_as_uint(v.y) && __float_as_uint(v.z) && __float_as_uint(v.w);
}
// The first `count` parts: all are asked for before the first is waited for.
template <int COUNT, class At> __device__ inline void take_parts(float4 (&parts)[COUNT], int count, const At& at) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) parts[i] = i < count ? read_part(at(i)) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int i = 0; i < COUNT; i++)
    if (i < count) {
      for (u32 polls = 0; !is_there(parts[i]) && polls < MAX_POLLS; polls++) parts[i] = read_part(at(i));
      if (!is_there(parts[i])) give_up();
      __stcg(at(i), make_float4(0.f, 0.f, 0.f, 0.f));
    }
  __syncwarp();  // lanes that saw their parts at different times go on together
}

template <class Reference> struct Bare;
template <class Type> struct Bare<const Type&> { using type = Type; };

// How the steps of a linear are cut: block b has steps first(b) .. first(b + 1) - 1 of all row blocks, inputs innermost.
template <int BLOCKS> struct Cut {
  int steps, total;  // of a row block, of all

  __device__ int first(int block) const { return total * block / BLOCKS; }
  __device__ int owner(int step) const { return ((step + 1) * BLOCKS - 1) / total; }  // the block that has a step
  // Which of a block's parts is that of a row block.
  __device__ int slot(int block, int row_block) const { return row_block - first(block) / steps; }
  static constexpr int most_parts(int steps, int total) { return (steps * BLOCKS + total - 1) / total + 1; }  // of a row block
  static constexpr int slots(int steps, int total) { return (total + BLOCKS - 1) / BLOCKS / steps + 2; }  // row blocks that a block has a part of
};

}  // namespace tw

// Tiles of keys and values on their way from the paged cache into shared memory. Knows no softmax.
//
// A tile is KEYS rows of one kv head, of keys or of values. Tiles pass through a ring of slots by cp.async: keys 0, values
// 0, keys 1, values 1, ... 8-bit numbers travel as they are and become 16-bit ones when their turn comes.
#pragma once
#include "numbers.cuh"
#include "weights.cuh"

namespace tw {

__device__ inline void copy_16_bytes(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ inline void copy_4_bytes(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ inline void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the newest PENDING groups of this thread's copies have come.
template <int PENDING> __device__ inline void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Eight stored numbers as eight of Type; `scale` belongs to int8.
template <class Type> __device__ inline uint4 eight(uint2 bytes, float scale, signed char) {
  const signed char* codes = reinterpret_cast<const signed char*>(&bytes);
  return make_uint4(pack<Type>(codes[0] * scale, codes[1] * scale), pack<Type>(codes[2] * scale, codes[3] * scale),
                    pack<Type>(codes[4] * scale, codes[5] * scale), pack<Type>(codes[6] * scale, codes[7] * scale));
}
template <class Type> __device__ inline uint4 eight(uint2 bytes, float, float8) {
  using Numbers = Fp8Numbers<Type>;
  return make_uint4(Numbers::template pair<true>(bytes.x, 0), Numbers::template pair<true>(bytes.x, 1),
                    Numbers::template pair<true>(bytes.y, 0), Numbers::template pair<true>(bytes.y, 1));
}

// Where keys lie that a block or a warp goes through: tiles from `begin` on, `step` keys apart.
template <class Stored> struct CachedKeys {
  const Stored* cache;  // [blocks, 2, KV_HEADS, BLOCK_SIZE, D], of this head
  const float* scales;  // [blocks, 2, KV_HEADS, BLOCK_SIZE] where Stored is int8, of this head
  const int* table;     // the sequence's blocks
  int begin, end, step;
};

// For the THREADS of a block, or for a warp by itself. Tiles begin at multiples of KEYS.
template <class Type, class Stored, int KV_HEADS, int D, int BLOCK_SIZE, int KEYS, int SLOTS, int THREADS> struct TileRing {
  static constexpr bool IS_CONVERTED = sizeof(Stored) == 1, HAS_SCALES = is_int8<Stored>, IS_WARP = THREADS == LANES;
  static constexpr int STRIDE = D + 8;  // so that eight rows of 16 bytes lie in all banks
  static constexpr int TILE_BYTES = KEYS * STRIDE * 2;
  static constexpr int SLOT_BYTES = IS_CONVERTED ? KEYS * D + (HAS_SCALES ? KEYS * 4 : 0) : TILE_BYTES;
  static constexpr int BYTES = SLOTS * SLOT_BYTES + (IS_CONVERTED ? TILE_BYTES : 0);
  static constexpr int ROW_PIECES = D * (int)sizeof(Stored) / 16, ROW_BYTES = IS_CONVERTED ? D : STRIDE * 2;
  static_assert(SLOTS >= 2, "a tile is on its way while another is used");

  char* memory;
  CachedKeys<Stored> from;  // begin: of the tile to ask for
  bool is_value = false;
  int asked_slot = 0, slot = 0, thread = threadIdx.x % THREADS;

  __device__ TileRing(char* memory, const CachedKeys<Stored>& from) : memory(memory), from(from) {
#pragma unroll
    for (int i = 0; i < SLOTS - 1; i++) ask();
  }

  __device__ static void synchronize() {
    if (IS_WARP) __syncwarp();
    else __syncthreads();
  }
  // Rows from `end` on repeat the last one: finite numbers, that no weight will count.
  __device__ size_t row(int key) const {
    return ((size_t)from.table[key / BLOCK_SIZE] * 2 + is_value) * KV_HEADS * BLOCK_SIZE + key % BLOCK_SIZE;
  }

  __device__ void ask() {
    if (from.begin < from.end) {
      char* to = memory + asked_slot * SLOT_BYTES;
      const size_t first = BLOCK_SIZE % KEYS == 0 ? row(from.begin) : 0;
#pragma unroll 2  // more would take registers
      for (int n = 0; n < (KEYS * ROW_PIECES + THREADS - 1) / THREADS; n++) {
        const int i = n * THREADS + thread, r = i / ROW_PIECES, piece = i % ROW_PIECES;
        if (KEYS * ROW_PIECES % THREADS != 0 && i >= KEYS * ROW_PIECES) break;
        const int key = min(from.begin + r, from.end - 1);
        const size_t at = BLOCK_SIZE % KEYS == 0 ? first + key - from.begin : row(key);
        copy_16_bytes(to + r * ROW_BYTES + piece * 16, reinterpret_cast<const char*>(from.cache + at * D) + piece * 16);
      }
      if (HAS_SCALES && thread < KEYS) copy_4_bytes(to + KEYS * D + thread * 4, from.scales + row(min(from.begin + thread, from.end - 1)));
      if (is_value) from.begin += from.step;
      is_value = !is_value;
      if (++asked_slot == SLOTS) asked_slot = 0;
    }
    end_copies();
  }

  // The next tile, [KEYS][STRIDE]; the one before may be overwritten.
  __device__ Type* take() {
    wait_for_copies<SLOTS - 2>();
    synchronize();
    ask();
    char* stored = memory + slot * SLOT_BYTES;
    if (++slot == SLOTS) slot = 0;
    if (!IS_CONVERTED) return reinterpret_cast<Type*>(stored);
    char* converted = memory + SLOTS * SLOT_BYTES;
#pragma unroll 2
    for (int i = thread; i < KEYS * D / 8; i += THREADS) {
      const int r = i / (D / 8), piece = i % (D / 8);
      const float scale = HAS_SCALES ? reinterpret_cast<const float*>(stored + KEYS * D)[r] : 1.f;
      *reinterpret_cast<uint4*>(converted + r * STRIDE * 2 + piece * 16) = eight<Type>(*reinterpret_cast<const uint2*>(stored + i * 8), scale, Stored());
    }
    synchronize();
    return reinterpret_cast<Type*>(converted);
  }
};

}  // namespace tw

// The attention of decode_batch.cuh: which pieces of which sequences a block attends to, and how. Knows no weights.
//
// Sequences are cut into chunks of keys, so long that every team of warps gets about one for one kv head. Chunks of one
// sequence are merged by the team that comes last, in their order.
#pragma once
#include "batch_exchange.cuh"

namespace tw {

template <class Type, int N, int HEADS, int KV_HEADS, int BLOCK_SIZE, int WARPS, int BLOCKS> struct BatchAttention {
  static constexpr int D = 128, ROWS = HEADS / KV_HEADS, TILE = 16, MIN_CHUNK = 256;
  static constexpr int TEAM = N * KV_HEADS <= BLOCKS ? WARPS : 4, TEAMS = WARPS / TEAM;  // warps of a team, teams of a block
  static constexpr int MOST_CHUNKS = N + (BLOCKS * TEAMS + KV_HEADS - 1) / KV_HEADS;
  static_assert(ROWS <= 8 && BLOCK_SIZE % TILE == 0 && MIN_CHUNK % (TILE * TEAM) == 0, "shapes");

  // A team's; the same in every layer but for what one item writes.
  struct Shared {
    float outputs[TEAM][ROWS][D];
    alignas(16) Type q[ROWS * D];
    float highest[TEAM][ROWS], totals[TEAM][ROWS];
    int is_last;
  };
  struct Plan {
    int first_chunk[N + 1];  // of each sequence
    int lengths[N], chunk;
  };
  struct Item {
    int sequence, kv_head, begin, end, chunk, chunks;  // keys; which chunk of how many
  };

  __device__ static void make_plan(Plan& plan, const int* lengths) {  // by one warp
    const int lane = threadIdx.x % LANES;
    int total = 0;
    for (int i = lane; i < N; i += LANES) total += plan.lengths[i] = lengths[i];
    for (int o = LANES / 2; o; o /= 2) total += __shfl_xor_sync(~0u, total, o);
    __syncwarp();
    const int even = (int)(((long long)total * KV_HEADS + BLOCKS * TEAMS - 1) / (BLOCKS * TEAMS));
    const int chunk = max(MIN_CHUNK, (even + TILE * TEAM - 1) / (TILE * TEAM) * (TILE * TEAM));
    if (lane == 0) {
      plan.chunk = chunk;
      int first = 0;
      for (int i = 0; i < N; i++) {
        plan.first_chunk[i] = first;
        first += (plan.lengths[i] + chunk - 1) / chunk;
      }
      plan.first_chunk[N] = first;
    }
  }
  __device__ static int items(const Plan& plan) { return plan.first_chunk[N] * KV_HEADS; }
  __device__ static Item item(const Plan& plan, int index) {
    const int which = index / KV_HEADS;
    int sequence = 0;
    for (int half = N / 2; half; half /= 2)
      if (plan.first_chunk[sequence + half] <= which) sequence += half;
    while (plan.first_chunk[sequence + 1] <= which) sequence++;  // past sequences of no chunks
    const int chunk = which - plan.first_chunk[sequence], begin = chunk * plan.chunk, length = plan.lengths[sequence];
    return {sequence, index % KV_HEADS, begin, min(length, begin + plan.chunk), chunk, plan.first_chunk[sequence + 1] - plan.first_chunk[sequence]};
  }
  __device__ static const Type* key(const BatchInput<Type>& input, const Type* cache, const Item& item, int key) {
    const int block = __ldg(input.block_tables + (size_t)item.sequence * input.table_width + key / BLOCK_SIZE);
    return cache + (((size_t)block * 2 * KV_HEADS + item.kv_head) * BLOCK_SIZE + key % BLOCK_SIZE) * D;
  }
  static constexpr int VALUES = KV_HEADS * BLOCK_SIZE * D;  // from a key to its value

  // By one warp: what earlier steps wrote is on its way into the L2 while q is computed.
  __device__ static void prefetch(const BatchInput<Type>& input, const Plan& plan, const Type* cache) {
    const int lane = threadIdx.x % LANES;
    for (int index = blockIdx.x; index < items(plan); index += BLOCKS) {
      const Item one = item(plan, index);
      for (int i = lane; i < min(one.end - one.begin, MIN_CHUNK) * 4; i += LANES)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(key(input, cache, one, one.begin + i / 4) + i / 2 % 2 * VALUES + i % 2 * 64));
    }
  }

  __device__ static void attend(const BatchInput<Type>& input, const Plan& plan, const Item& item, const Type* cache, Shared& shared) {
    const int thread = threadIdx.x % (TEAM * LANES), warp = thread / LANES, lane = thread % LANES, g = lane / 4, t = lane % 4;
    auto sync_team = [] { asm volatile("bar.sync %0, %1;" ::"r"(2 + (int)threadIdx.x / (TEAM * LANES)), "n"(TEAM * LANES) : "memory"); };
    for (int i = thread; i < ROWS * D / 8; i += TEAM * LANES)
      reinterpret_cast<uint4*>(shared.q)[i] =
          __ldcg(reinterpret_cast<const uint4*>(input.q + ((size_t)item.sequence * HEADS + item.kv_head * ROWS) * D) + i);
    AttentionTile<Type> tile;
    const int first = item.begin + warp * TILE;
    if (first < item.end) {
      const Type* keys = key(input, cache, item, first);
      tile.load(keys, keys + VALUES, lane);
    }
    sync_team();
    for (int at = first; at < item.end; at += TEAM * TILE) {
      if (at > first) {
        const Type* keys = key(input, cache, item, at);
        tile.load(keys, keys + VALUES, lane);
      }
      tile.template multiply<ROWS>(shared.q, 0, item.end - at, input.scale, lane);
    }
    tile.finish(lane);
    if (t == 0 && g < ROWS) shared.highest[warp][g] = tile.high, shared.totals[warp][g] = tile.total;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (2 * t + i % 2 < ROWS) shared.outputs[warp][2 * t + i % 2][tile.dimension(j, i / 2, g)] = tile.o[j][i];
    sync_team();

    const int pair = item.sequence * KV_HEADS + item.kv_head;
    auto part_of = [&](int chunk, int head) {
      return input.attention_parts + (((size_t)(plan.first_chunk[item.sequence] + chunk) * KV_HEADS + item.kv_head) * ROWS + head) * (D + 2);
    };
    auto write = [&](int head, int d, float a, float b) {
      const int k = (item.kv_head * ROWS + head) * D + d;
      *reinterpret_cast<u32*>(input.attended + core_index(item.sequence, k, N)) = tw::pack<Type>(a, b);
    };
    for (int i = thread; i < ROWS * D / 2; i += TEAM * LANES) {
      const int head = i / (D / 2), d = i % (D / 2) * 2;
      float top = LOWEST, sum = 0.f, a = 0.f, b = 0.f;
#pragma unroll
      for (int w = 0; w < TEAM; w++) top = fmaxf(top, shared.highest[w][head]);
#pragma unroll
      for (int w = 0; w < TEAM; w++) {
        const float weight = exp2f(shared.highest[w][head] - top);
        const float2 two = *reinterpret_cast<const float2*>(&shared.outputs[w][head][d]);
        sum += shared.totals[w][head] * weight, a += two.x * weight, b += two.y * weight;
      }
      if (item.chunks == 1) {
        write(head, d, a / sum, b / sum);
      } else {
        float* part = part_of(item.chunk, head);
        __stcg(reinterpret_cast<float2*>(part + d), make_float2(a, b));
        if (d == 0) __stcg(reinterpret_cast<float2*>(part + D), make_float2(top, sum));
      }
    }
    sync_team();
    if (item.chunks == 1) return;
    if (thread == 0) {
      int* arrivals = input.attention_arrivals + pair;
      shared.is_last = add_acquire_release(arrivals, 1) == item.chunks - 1;
      if (shared.is_last) *arrivals = 0;
    }
    sync_team();
    if (!shared.is_last) return;
    for (int i = thread; i < ROWS * D / 2; i += TEAM * LANES) {
      const int head = i / (D / 2), d = i % (D / 2) * 2;
      float top = LOWEST, sum = 0.f, a = 0.f, b = 0.f;
      for (int c = 0; c < item.chunks; c++) top = fmaxf(top, __ldcg(part_of(c, head) + D));
#pragma unroll 4
      for (int c = 0; c < item.chunks; c++) {
        const float2 two = __ldcg(reinterpret_cast<const float2*>(part_of(c, head) + d)), last = __ldcg(reinterpret_cast<const float2*>(part_of(c, head) + D));
        const float weight = exp2f(last.x - top);
        sum += last.y * weight, a += two.x * weight, b += two.y * weight;
      }
      write(head, d, a / sum, b / sum);
    }
  }
};

}  // namespace tw

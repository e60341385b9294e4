// All layers of a decode step for one or two tokens, in one launch: BLOCKS thread blocks, one per multiprocessor, which
// must all be resident (a cooperative launch, or nothing else on the device).
//
// Weights: a block's share of a linear (neighbouring row tiles) is one contiguous range of memory, read in stages of 4 KB of
// codes. The stages of all linears of all layers are one sequence through one ring in shared memory; whoever has consumed a
// slot asks for the stage that comes SLOTS later, whatever linear or layer that is. So memory is read while activations
// are exchanged and attention runs.
// Activations: each linear needs all of its input, which all blocks write. A writer stores (two numbers, epoch) as one
// 8-byte word, a reader polls until the epoch is this layer's: one trip through the L2, no barrier and no fence.
// A buffer is written again only after every block has gone through an operation that needed all of what is in it.
#pragma once
#include "decode_exchange.cuh"

namespace tw {

template <class Weights, int TOKENS, int HIDDEN, int HEADS, int KV_HEADS, int FFN, int BLOCK_SIZE, int SLOTS, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(WARPS * LANES, 1) decode_layers(const LayersInput<typename Weights::Number> input) {
  using L = Layers<Weights, TOKENS, HIDDEN, HEADS, KV_HEADS, FFN, BLOCK_SIZE, SLOTS, WARPS, BLOCKS>;
  using Type = typename L::Type;
  constexpr int THREADS = L::THREADS, ROWS = L::ROWS, D = 128;
  extern __shared__ __align__(128) char memory[];
  __shared__ typename L::Shared shared;
  char* x_shared = memory + SLOTS * L::STAGE_BYTES;
  float* sums = reinterpret_cast<float*>(x_shared + L::X_BYTES);  // [stage][token][16]
  float* bias = sums + L::SUM_BYTES / 4;                          // [unit][group][8 tokens]
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  const u64 policy = evict_first_policy();

  for (int i = threadIdx.x; i < input.num_layers * (int)(sizeof(LayerPointers<Type>) / 8); i += THREADS)
    reinterpret_cast<u64*>(shared.layers)[i] = reinterpret_cast<const u64*>(input.layers)[i];
  if (threadIdx.x < 4) {
    const int linear = threadIdx.x;
    const int tiles = (linear == 0 ? L::QKV_ROWS : linear == 2 ? 2 * FFN : HIDDEN) / 16;
    const int per_tile = (linear == 1 ? L::ATTENDED : linear == 3 ? FFN : HIDDEN) / 128 / L::STAGE_UNITS;
    const int first = tiles * blockIdx.x / gridDim.x, last = tiles * (blockIdx.x + 1) / gridDim.x;
    shared.first_tile[linear] = first;
    shared.count[linear] = (last - first) * per_tile;
  }
  if (threadIdx.x < SLOTS) {
    barrier_init_for_copy(&shared.filled[threadIdx.x]);
    shared.asked[threadIdx.x] = -1;
  }
  barriers_ready();
  __syncthreads();

  Cursor cursor;
  auto fill = [&](int stage, int slot) {  // stage of the sequence; called with growing stages by each warp
    while (cursor.layer < input.num_layers && stage >= cursor.base + shared.count[cursor.linear]) {
      cursor.base += shared.count[cursor.linear];
      if (++cursor.linear == 4) cursor.linear = 0, cursor.layer++;
    }
    if (cursor.layer >= input.num_layers) return;
    const int linear = cursor.linear;
    const int units_of_tile = (linear == 1 ? L::ATTENDED : linear == 3 ? FFN : HIDDEN) / 128;
    const char* from = shared.layers[cursor.layer].weights[linear] + (size_t)shared.first_tile[linear] * units_of_tile * Weights::BYTES +
                       (size_t)(stage - cursor.base) * L::STAGE_BYTES;
    if (lane == 0) *const_cast<volatile int*>(&shared.asked[slot]) = stage;
    copy_async<true>(memory + slot * L::STAGE_BYTES, from, L::STAGE_BYTES, &shared.filled[slot], lane, policy);
  };
  for (int stage = warp; stage < SLOTS; stage += WARPS) fill(stage, stage);

  wait_for_previous_kernel();
  const u32 epoch_base = *input.step * 64 + 1;
  for (int i = threadIdx.x; i < TOKENS * 64; i += THREADS) {
    // In double until the whole turns are off: a float32 angle is wrong by thousandths at position 50,000.
    const double turns = (double)input.positions[i / 64] * (double)input.inverse_frequencies[i % 64] * 0.15915494309189535;
    float sine, cosine;
    sincospif(2.f * (float)(turns - rint(turns)), &sine, &cosine);
    shared.rotation[i / 64][i % 64] = make_float2(cosine, sine);
  }

  // Called by a warp with the new values of rows g and g + 8 of one of this block's tiles of the stream, in lanes 0..7.
  auto publish_stream = [&](int tile, int token, float lower, float upper, int norm, u64* to, u64* squares_to, u32 epoch) {
    const int own = tile - shared.first_tile[1], row = tile * 16 + lane % 8;
    const float* weights = shared.norms[norm][own];
    if (lane < 8) shared.stream[own][token][lane] = lower, shared.stream[own][token][lane + 8] = upper;
    const float x_lower = finite<Type>(lower * weights[lane % 8]), x_upper = finite<Type>(upper * weights[lane % 8 + 8]);
    const float lower_pair = __shfl_xor_sync(~0u, x_lower, 1), upper_pair = __shfl_xor_sync(~0u, x_upper, 1);
    if (lane < 8) {
      if (lane % 2 == 0) publish(to + input_index<TOKENS>(token, row) / 2, tw::pack<Type>(x_lower, lower_pair), epoch);
      else publish(to + input_index<TOKENS>(token, row + 7) / 2, tw::pack<Type>(upper_pair, x_upper), epoch);
    }
    float squares = lower * lower + upper * upper;
    for (int o = 1; o < 8; o *= 2) squares += __shfl_xor_sync(~0u, squares, o);
    if (lane == 0) publish(squares_to + tile * TOKENS + token, __float_as_uint(squares), epoch);
    return squares;
  };

  const int own_first = shared.first_tile[1] * 16;
  // 16 bytes of a norm's weights a thread; whoever needs them waits in `linear`.
  auto copy_norm = [&](int which, const float* from, int thread) {
    if ((unsigned)thread < L::OWN_TILES * 4 && own_first + thread * 4 < HIDDEN)
      asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared_address(&shared.norms[which][0][0] + thread * 4)), "l"(from + own_first + thread * 4) : "memory");
  };
  copy_norm(1, shared.layers[0].attention_norm, threadIdx.x);
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  const int own_tiles = shared.count[1] / (L::ATTENDED / 128 / L::STAGE_UNITS);
  for (int item = warp; item < own_tiles * TOKENS; item += WARPS) {
    const int tile = shared.first_tile[1] + item / TOKENS, token = item % TOKENS;
    const Type* row = input.table + (size_t)input.token_ids[token] * HIDDEN + tile * 16 + lane % 8;
    publish_stream(tile, token, to_float(row[0]), to_float(row[8]), 1, input.x, input.square_sums, epoch_base);
  }

  int base = 0;        // of this linear's stages in the sequence
  u32 squares_at = 0;  // which copy of shared.squares is in use

  // One linear: takes its input as it comes, multiplies, and calls finish(tile, token, lower, upper) in whole warps, with the
  // sums of rows lane % 8 and lane % 8 + 8 of the tile.
  auto linear = [&](auto index, auto inputs, const char* weights, const u64* x, const u64* squares, u32 epoch, auto finish) {
    constexpr int INDEX = decltype(index)::value, K = decltype(inputs)::value;
    constexpr size_t UNITS_BYTES = (size_t)(INDEX == 0 ? L::QKV_ROWS : INDEX == 2 ? 2 * FFN : HIDDEN) / 16 * (K / 128) * Weights::BYTES;
    constexpr int PIECES = K * TOKENS / 8, LOADS = (PIECES + THREADS - 1) / THREADS, PER_TILE = K / 128 / L::STAGE_UNITS;
    if (lane == 0) poll_words(x + (size_t)min(warp * LANES, PIECES - 1) * 4, epoch);
    __syncwarp();
    uint4 words[LOADS][2], two = make_uint4(0, epoch, 0, epoch);
#pragma unroll
    for (int i = 0; i < LOADS; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) words[i][j] = make_uint4(0, i * THREADS + (int)threadIdx.x < PIECES ? ~epoch : epoch, 0, epoch);
    const bool has_squares = squares != nullptr && threadIdx.x < HIDDEN / 16 * TOKENS / 2;
    static_assert(HIDDEN / 16 * TOKENS / 2 <= THREADS && HIDDEN / 16 * TOKENS / 2 % LANES == 0, "one word pair a thread, whole warps");
    if (has_squares) two.y = ~epoch;
    bool is_ready;
    u32 polls = 0;
    do {  // rarely twice: who polled above saw words that were written at about the same time
#pragma unroll
      for (int i = 0; i < LOADS; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          if (words[i][j].y != epoch || words[i][j].w != epoch) words[i][j] = read_words(x + (size_t)(i * THREADS + threadIdx.x) * 4 + j * 2);
      if (two.y != epoch || two.w != epoch) two = read_words(squares + threadIdx.x * 2);
      is_ready = two.y == epoch && two.w == epoch;
#pragma unroll
      for (int i = 0; i < LOADS; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) is_ready = is_ready && words[i][j].y == epoch && words[i][j].w == epoch;
      if (++polls == MAX_POLLS) __trap();
    } while (!is_ready);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const int piece = i * THREADS + threadIdx.x;
      if (piece >= PIECES) continue;  // whole warps
      const uint4 data = make_uint4(words[i][0].x, words[i][0].z, words[i][1].x, words[i][1].z);
      reinterpret_cast<uint4*>(x_shared)[piece] = data;
      if (Weights::RAW_BIAS != 0.f) {
        float total = 0.f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const u32 two = word(data, j);
          const float2 numbers = to_float(reinterpret_cast<const typename Pair<Type>::type&>(two));
          total += numbers.x + numbers.y;
        }
        // Pieces are [unit][quarter][token][t]: over t, then over the quarters of a group.
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        for (int o = 1; o < Weights::GROUP_QUARTERS; o *= 2) total += __shfl_xor_sync(~0u, total, o * 4 * TOKENS);
        const int quarter = piece / (4 * TOKENS), token = piece / 4 % TOKENS;
        if (t == 0 && quarter % Weights::GROUP_QUARTERS == 0)
          bias[quarter / Weights::GROUP_QUARTERS * 8 + token] = -Weights::RAW_BIAS * total;
      }
    }
    const bool is_normed = squares != nullptr;
    if (is_normed) {
      squares_at ^= 1;
      float first = __uint_as_float(two.x), second = __uint_as_float(two.z);  // zeros where has_squares is not
      if (TOKENS == 1) first += second;
      for (int o = 16; o; o /= 2) {
        first += __shfl_xor_sync(~0u, first, o);
        if (TOKENS > 1) second += __shfl_xor_sync(~0u, second, o);
      }
      if (lane == 0) shared.squares[squares_at][warp][0] = first, shared.squares[squares_at][warp][TOKENS - 1] = TOKENS == 1 ? first : second;
    }
    __syncthreads();

    const int count = shared.count[INDEX];
    if (Weights::ROW_SCALES && threadIdx.x < count / PER_TILE * 2)  // they follow the units: 32 bytes a tile
      asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared.row_scales) + threadIdx.x * 16), "l"(weights + UNITS_BYTES + shared.first_tile[INDEX] * 32 + threadIdx.x * 16) : "memory");
    const char* my_x = x_shared + g * 64 + t * 16;
    int slot = (base + warp) % SLOTS;
    u32 parity = (base + warp) / SLOTS & 1;
    for (int stage = warp; stage < count; stage += WARPS) {
      const int part = stage % PER_TILE;
      // A parity alone cannot tell a filled slot from one whose stage before last a slower warp has yet to consume.
      while (*const_cast<volatile int*>(&shared.asked[slot]) != base + stage) {}
      barrier_wait(&shared.filled[slot], parity);
      float sum[4] = {};
#pragma unroll
      for (int u = 0; u < L::STAGE_UNITS; u++)
        multiply_unit_raw<Weights, TOKENS * 64>(memory + slot * L::STAGE_BYTES + u * Weights::BYTES,
                                                my_x + (part * L::STAGE_UNITS + u) * TOKENS * 256,
                                                bias + (part * L::STAGE_UNITS + u) * L::GROUPS * 8 + 2 * t, g < TOKENS, lane, sum);
      __syncwarp();
      fill(base + stage + SLOTS, slot);
      slot += WARPS;
      if (slot >= SLOTS) slot -= SLOTS, parity ^= 1;
      float* mine = sums + stage * TOKENS * 16 + g;
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (2 * t + i < TOKENS) mine[(2 * t + i) * 16] = sum[i], mine[(2 * t + i) * 16 + 8] = sum[2 + i];
    }
    base += count;
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();

    for (int item = warp; item < count / PER_TILE * TOKENS; item += WARPS) {
      const int tile = item / TOKENS, token = item % TOKENS;
      const float* from = sums + (tile * PER_TILE * TOKENS + token) * 16 + lane % 8;
      float lower = 0.f, upper = 0.f;
      for (int i = lane / 8; i < PER_TILE; i += 4) lower += from[i * TOKENS * 16], upper += from[i * TOKENS * 16 + 8];
      lower += __shfl_xor_sync(~0u, lower, 8), upper += __shfl_xor_sync(~0u, upper, 8);
      lower += __shfl_xor_sync(~0u, lower, 16), upper += __shfl_xor_sync(~0u, upper, 16);
      if (is_normed) {
        float total = 0.f;
        for (int w = 0; w < WARPS; w++) total += shared.squares[squares_at][w][token];
        const float inverse_rms = rsqrtf(total / HIDDEN + input.epsilon);
        lower *= inverse_rms, upper *= inverse_rms;
      }
      if (Weights::ROW_SCALES) {
        const Type* scales = shared.row_scales[tile];
        lower *= to_float(scales[lane % 8]), upper *= to_float(scales[lane % 8 + 8]);
      }
      finish(shared.first_tile[INDEX] + tile, token, lower, upper);
    }
  };

  // This block's part of attention, the same in every layer: a chunk of the keys of one sequence for one kv head.
  const int pair = blockIdx.x % (TOKENS * KV_HEADS), chunk_index = blockIdx.x / (TOKENS * KV_HEADS), max_chunks = gridDim.x / (TOKENS * KV_HEADS);
  const int sequence = pair / KV_HEADS, kv_head = pair % KV_HEADS, length = input.lengths[sequence];
  const int first_seen = input.window > 0 ? max(0, length - input.window) : 0, first_tile = first_seen / 16 * 16;
  const int even = (length - first_tile + max_chunks - 1) / max_chunks;
  const int chunk = max(L::KEY_CHUNK, (even + L::KEY_CHUNK - 1) / L::KEY_CHUNK * L::KEY_CHUNK), chunks = (length - first_tile + chunk - 1) / chunk;
  const int first_key = first_tile + chunk_index * chunk, end = chunk_index < max_chunks ? min(length, first_key + chunk) : 0, num_keys = max(0, end - first_key);
  static_assert(BLOCK_SIZE % 16 == 0, "16 keys lie in one block of the cache");
  const int first_block = first_key / BLOCK_SIZE;
  for (int i = threadIdx.x; i < min(L::TABLE, (end + BLOCK_SIZE - 1) / BLOCK_SIZE - first_block); i += THREADS)
    shared.table[i] = input.block_tables[sequence * input.table_width + first_block + i];
  __syncthreads();
  auto cache_row = [&](int layer, int key) {  // of its keys; the values are KV_HEADS * BLOCK_SIZE rows later
    const int at = key / BLOCK_SIZE - first_block;
    const int block = at < L::TABLE ? shared.table[at] : input.block_tables[sequence * input.table_width + key / BLOCK_SIZE];
    return shared.layers[layer].cache + (((size_t)block * 2 * KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE) * D;
  };

  for (int layer = 0; layer < input.num_layers; layer++) {
    const LayerPointers<Type>& pointers = shared.layers[layer];
    const u32 epoch = epoch_base + layer;
    const bool is_final = layer + 1 == input.num_layers;

    copy_norm(0, pointers.mlp_norm, threadIdx.x - LANES);
#if TW_BULK_COPY
    // Keys and values of earlier steps, on their way into the L2 while q is computed.
    for (int i = threadIdx.x; i < num_keys * 4; i += THREADS)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(cache_row(layer, first_key + i / 4) + i / 2 % 2 * KV_HEADS * BLOCK_SIZE * D + i % 2 * 64));
#endif
    linear(Constant<0>{}, Constant<HIDDEN>{}, pointers.weights[0], input.x, input.square_sums, epoch, [&](int tile, int token, float lower, float upper) {
      const int head = tile / 8, d = tile % 8 * 8 + lane % 8;
      if (head < HEADS + KV_HEADS) {
        const float2 turn = shared.rotation[token][d];
        const float a = lower, b = upper;
        lower = a * turn.x - b * turn.y;
        upper = b * turn.x + a * turn.y;
      }
      const float lower_pair = __shfl_xor_sync(~0u, lower, 1), upper_pair = __shfl_xor_sync(~0u, upper, 1);
      if (lane >= 8) return;
      u64* to = head < HEADS ? input.q + (token * HEADS + head) * 64 : input.kv + (token * 2 * KV_HEADS + head - HEADS) * 64;
      const bool is_even = lane % 2 == 0;
      const u32 two = is_even ? tw::pack<Type>(lower, lower_pair) : tw::pack<Type>(upper_pair, upper);
      const int at = is_even ? d : d + 63;
      publish(to + at / 2, two, epoch);
      const int slot = input.slots[token];
      if (head < HEADS || slot < 0) return;
      const int value = head >= HEADS + KV_HEADS, kv_head = (head - HEADS) % KV_HEADS;
      const size_t row = ((size_t)(slot / BLOCK_SIZE) * 2 + value) * KV_HEADS + kv_head;
      reinterpret_cast<u32*>(pointers.cache + (row * BLOCK_SIZE + slot % BLOCK_SIZE) * D)[at / 2] = two;
    });

    // Attention: block = (chunk, sequence, kv head). The newest key and value come as words, the others from the cache.
    {
      if (num_keys > 0) {
        float* outputs = reinterpret_cast<float*>(x_shared);  // [WARPS][ROWS][128]
        static_assert(WARPS * ROWS * D * 4 <= L::X_BYTES + L::SUM_BYTES, "attention's sums lie where x and the linears' sums were");
        AttentionTile<Type> tile;
        bool is_ready = false;
        for (int key = first_key + warp * 16; key < end || !is_ready; key += WARPS * 16) {
          if (key < end) {
            const Type* rows = cache_row(layer, key);
            tile.load(rows, rows + KV_HEADS * BLOCK_SIZE * D, lane);
          }
          if (!is_ready) {  // the first keys are on their way while the newest are computed
            __syncthreads();
            for (int i = threadIdx.x; i < (ROWS + 2) * 32; i += THREADS) {
              const int row = i / 32;
              const u64* from = row < ROWS ? input.q + (sequence * HEADS + kv_head * ROWS + row) * 64
                                           : input.kv + (sequence * 2 * KV_HEADS + (row - ROWS) * KV_HEADS + kv_head) * 64;
              const uint4 words = poll_words(from + i % 32 * 2, epoch);
              reinterpret_cast<uint2*>(row < ROWS ? shared.q[row] : shared.kv[row - ROWS])[i % 32] = make_uint2(words.x, words.z);
            }
            __syncthreads();
            is_ready = true;
          }
          if (key < end) {
            tile.replace(length - 1 - key, shared.kv[0], shared.kv[1], lane);
            tile.template multiply<ROWS>(&shared.q[0][0], first_seen - key, end - key, input.scale, lane);
          }
        }
        tile.finish(lane);
        if (t == 0 && g < ROWS) shared.highest[warp][g] = tile.high, shared.totals[warp][g] = tile.total;
        if (2 * t < ROWS)
#pragma unroll
          for (int j = 0; j < 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
              if (2 * t + i % 2 < ROWS) outputs[(warp * ROWS + 2 * t + i % 2) * D + tile.dimension(j, i / 2, g)] = tile.o[j][i];
        __syncthreads();
        float* parts = input.parts + (size_t)pair * max_chunks * ROWS * (D + 2);
        for (int i = threadIdx.x; i < ROWS * 64; i += THREADS) {
          const int head = i / 64, d = i % 64 * 2;
          float top = LOWEST, sum = 0.f, a = 0.f, b = 0.f;
          for (int w = 0; w < WARPS; w++) top = fmaxf(top, shared.highest[w][head]);
#pragma unroll 4
          for (int w = 0; w < WARPS; w++) {
            const float weight = exp2f(shared.highest[w][head] - top);
            const float2 two = *reinterpret_cast<const float2*>(outputs + (w * ROWS + head) * D + d);
            sum += shared.totals[w][head] * weight, a += two.x * weight, b += two.y * weight;
          }
          if (chunks == 1) {
            publish(input.attended + input_index<TOKENS>(sequence, (kv_head * ROWS + head) * D + d) / 2, tw::pack<Type>(a / sum, b / sum), epoch);
          } else {
            float* part = parts + (chunk_index * ROWS + head) * (D + 2);
            __stcg(reinterpret_cast<float2*>(part + d), make_float2(a, b));
            if (d == 0) __stcg(reinterpret_cast<float2*>(part + D), make_float2(top, sum));
          }
        }
        if (chunks > 1) {
          __threadfence();
          __syncthreads();
          if (threadIdx.x == 0) {
            shared.is_last = atomicAdd(input.arrivals + pair, 1) == chunks - 1;
            if (shared.is_last) input.arrivals[pair] = 0;
            __threadfence();
          }
          __syncthreads();
          if (shared.is_last)
            for (int i = threadIdx.x; i < ROWS * 64; i += THREADS) {
              const int head = i / 64, d = i % 64 * 2;
              float top = LOWEST, sum = 0.f, a = 0.f, b = 0.f;
              for (int c = 0; c < chunks; c++) top = fmaxf(top, __ldcg(parts + (c * ROWS + head) * (D + 2) + D));
#pragma unroll 4
              for (int c = 0; c < chunks; c++) {
                const float* part = parts + (c * ROWS + head) * (D + 2);
                const float2 two = __ldcg(reinterpret_cast<const float2*>(part + d)), last = __ldcg(reinterpret_cast<const float2*>(part + D));
                const float weight = exp2f(last.x - top);
                sum += last.y * weight, a += two.x * weight, b += two.y * weight;
              }
              publish(input.attended + input_index<TOKENS>(sequence, (kv_head * ROWS + head) * D + d) / 2, tw::pack<Type>(a / sum, b / sum), epoch);
            }
        }
        __syncthreads();
      }
    }

    linear(Constant<1>{}, Constant<L::ATTENDED>{}, pointers.weights[1], input.attended, (const u64*)nullptr, epoch, [&](int tile, int token, float lower, float upper) {
      const float* at = &shared.stream[tile - shared.first_tile[1]][token][lane % 8];
      lower += at[0], upper += at[8];
      __syncwarp();
      publish_stream(tile, token, lower, upper, 0, input.x_mlp, input.square_sums_mlp, epoch);
    });

    linear(Constant<2>{}, Constant<HIDDEN>{}, pointers.weights[2], input.x_mlp, input.square_sums_mlp, epoch, [&](int tile, int token, float lower, float upper) {
      const float y = finite<Type>(lower / (1.f + __expf(-lower)) * upper), pair = __shfl_xor_sync(~0u, y, 1);
      if (lane < 8 && lane % 2 == 0) publish(input.gated + input_index<TOKENS>(token, tile * 8 + lane) / 2, tw::pack<Type>(y, pair), epoch);
    });

    copy_norm(1, is_final ? input.final_norm : shared.layers[layer + 1].attention_norm, threadIdx.x - LANES);
    linear(Constant<3>{}, Constant<FFN>{}, pointers.weights[3], input.gated, (const u64*)nullptr, epoch, [&](int tile, int token, float lower, float upper) {
      const float* at = &shared.stream[tile - shared.first_tile[1]][token][lane % 8];
      lower += at[0], upper += at[8];
      __syncwarp();
      const float squares = publish_stream(tile, token, lower, upper, 1, input.x, input.square_sums, epoch + 1);
      if (is_final && lane < 8) {
        const int row = tile * 16 + lane;
        const float* norm = shared.norms[1][tile - shared.first_tile[1]];
        input.x_out[input_index<TOKENS>(token, row)] = to_finite<Type>(lower * norm[lane]);
        input.x_out[input_index<TOKENS>(token, row + 8)] = to_finite<Type>(upper * norm[lane + 8]);
        input.stream_out[(size_t)token * HIDDEN + row] = lower, input.stream_out[(size_t)token * HIDDEN + row + 8] = upper;
        if (lane == 0) input.square_sums_out[tile * TOKENS + token] = squares;
      }
    });
  }
  launch_next_kernel();
}

}  // namespace tw

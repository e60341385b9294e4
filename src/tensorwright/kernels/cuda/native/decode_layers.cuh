// All layers of a decode step for one or two tokens, in one launch: BLOCKS thread blocks, one per multiprocessor, which
// must all be resident (a cooperative launch).
//
// Weights: a block's share of a linear (neighbouring row tiles) is one contiguous range of memory, read in stages of 4 KB
// and more. Each warp takes every WARPS-th stage through a ring of its own, and asks for the stage that comes DEPTH later
// when it has consumed one, whatever linear or layer that is. So memory is read while activations are exchanged and
// attention runs, and no warp waits for another one's stages.
// Activations: each linear needs all of its input, which all blocks write. A writer stores words that are not 0, a reader
// reads until none is 0 (decode_exchange.cuh): one trip through the L2, no barrier.
// Writers take their words back once all blocks have read them, twice a layer: while qkv runs, what the MLP exchanged (all of
// x is there, so every block has ended it), and while gate and up run, what attention exchanged. A fence and the block's next
// words follow, and nobody waits for a word anew without having seen, through any number of blocks, what its writer wrote after
// that fence.
#pragma once
#include "decode_exchange.cuh"

namespace tw {

template <class Weights, int TOKENS, int HIDDEN, int HEADS, int KV_HEADS, int FFN, int BLOCK_SIZE, int DEPTH, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(WARPS * LANES, 1) decode_layers(const LayersInput<typename Weights::Number> input) {
  using L = Layers<Weights, TOKENS, HIDDEN, HEADS, KV_HEADS, FFN, BLOCK_SIZE, DEPTH, WARPS, BLOCKS>;
  using Type = typename L::Type;
  constexpr int THREADS = L::THREADS, ROWS = L::ROWS, D = 128;
  extern __shared__ __align__(128) char memory[];
  __shared__ typename L::Shared shared;
  char* x_shared = memory + L::RING_BYTES;
  float* sums = reinterpret_cast<float*>(x_shared + L::X_BYTES);  // [stage][token][16]
  float* bias = sums + L::SUM_BYTES / 4;                          // [unit][group][8 tokens]
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
  const u64 policy = evict_first_policy();

  for (int i = threadIdx.x; i < input.num_layers * (int)(sizeof(LayerPointers<Type>) / 8); i += THREADS)
    reinterpret_cast<u64*>(shared.layers)[i] = reinterpret_cast<const u64*>(input.layers)[i];
  if (threadIdx.x < 4) {
    const int linear = threadIdx.x, tiles = L::rows(linear) / 16;
    const int first = tiles * blockIdx.x / BLOCKS, last = tiles * (blockIdx.x + 1) / BLOCKS;
    shared.first_tile[linear] = first, shared.tiles[linear] = last - first;
    shared.offset[linear] = (size_t)first * L::per_tile(linear) * L::STAGE_BYTES;
  }
  if (threadIdx.x < WARPS * DEPTH) barrier_init_for_copy(&shared.filled[threadIdx.x / DEPTH][threadIdx.x % DEPTH]);
  barriers_ready();
  __syncthreads();

  // This warp's stages to ask for: of a linear every WARPS-th, from its own number on.
  char* ring = memory + warp * DEPTH * L::STAGE_BYTES;
  const char* next = nullptr;
  int next_layer = 0, next_linear = -1, left = 0;
  auto fill = [&](int slot) {
    while (left == 0) {
      if (++next_linear == 4) next_linear = 0, next_layer++;
      if (next_layer >= input.num_layers) return;
      left = max(0, shared.tiles[next_linear] * L::per_tile(next_linear) - warp + WARPS - 1) / WARPS;
      next = shared.layers[next_layer].weights[next_linear] + shared.offset[next_linear] + warp * L::STAGE_BYTES;
    }
    copy_async<true>(ring + slot * L::STAGE_BYTES, next, L::STAGE_BYTES, &shared.filled[warp][slot], lane, policy);
    next += WARPS * L::STAGE_BYTES;
    left--;
  };
  for (int slot = 0; slot < DEPTH; slot++) fill(slot);

  wait_for_previous_kernel();
  for (int i = threadIdx.x; i < TOKENS * 64; i += THREADS) {
    // In double until the whole turns are off: a float32 angle is wrong by thousandths at position 50,000.
    const double turns = (double)input.positions[i / 64] * (double)input.inverse_frequencies[i % 64] * 0.15915494309189535;
    float sine, cosine;
    sincospif(2.f * (float)(turns - rint(turns)), &sine, &cosine);
    shared.rotation[i / 64][i % 64] = make_float2(cosine, sine);
  }

  // Called by a warp with the new values of rows lane % 8 and lane % 8 + 8 of one of this block's tiles of the stream; lanes that
  // are no `writer` have them too. Gives the sum of their squares.
  auto publish_stream = [&](int tile, int token, float lower, float upper, bool is_writer, int norm, u32* to, u32* squares_to) {
    const int own = tile - shared.first_tile[1], row = tile * 16 + lane % 8;
    const float* weights = shared.norms[norm][own];
    if (is_writer) shared.stream[own][token][lane % 8] = lower, shared.stream[own][token][lane % 8 + 8] = upper;
    const float x_lower = finite<Type>(lower * weights[lane % 8]), x_upper = finite<Type>(upper * weights[lane % 8 + 8]);
    const float lower_pair = __shfl_xor_sync(~0u, x_lower, 1), upper_pair = __shfl_xor_sync(~0u, x_upper, 1);
    float squares = lower * lower + upper * upper;
    for (int o = 1; o < 8; o *= 2) squares += __shfl_xor_sync(~0u, squares, o);
    if (is_writer && to != nullptr) {
      const bool is_even = lane % 2 == 0;
      publish(to + input_index<TOKENS>(token, is_even ? row : row + 7) / 2,
              is_even ? tw::pack<Type>(x_lower, lower_pair) : tw::pack<Type>(upper_pair, x_upper));
      if (lane % 8 == 0) publish(squares_to + tile * TOKENS + token, __float_as_uint(squares));
    }
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
  for (int item = warp; item < shared.tiles[1] * TOKENS; item += WARPS) {
    const int tile = shared.first_tile[1] + item / TOKENS, token = item % TOKENS;
    const Type* row = input.table + (size_t)input.token_ids[token] * HIDDEN + tile * 16 + lane % 8;
    publish_stream(tile, token, to_float(row[0]), to_float(row[8]), lane < 8, 1, input.x, input.square_sums);
  }

  // This block's part of attention, the same in every layer: a chunk of the keys of one sequence for one kv head.
  const int pair = blockIdx.x % (TOKENS * KV_HEADS), chunk_index = blockIdx.x / (TOKENS * KV_HEADS);
  constexpr int MAX_CHUNKS = BLOCKS / (TOKENS * KV_HEADS);
  const int sequence = pair / KV_HEADS, kv_head = pair % KV_HEADS, length = input.lengths[sequence];
  const int first_seen = input.window > 0 ? max(0, length - input.window) : 0, first_tile = first_seen / 16 * 16;
  const int even = (length - first_tile + MAX_CHUNKS - 1) / MAX_CHUNKS;
  const int chunk = max(L::LEAST_KEYS, (even + 15) / 16 * 16), chunks = (length - first_tile + chunk - 1) / chunk;
  const int first_key = first_tile + chunk_index * chunk, end = chunk_index < MAX_CHUNKS ? min(length, first_key + chunk) : 0, num_keys = max(0, end - first_key);
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
  auto attended_word = [&](int head, int d) { return input.attended + input_index<TOKENS>(sequence, (kv_head * ROWS + head) * D + d) / 2; };
  auto qkv_word = [&](int token, int head, int d) {
    return (head < HEADS ? input.q + (token * HEADS + head) * 64 : input.kv + (token * 2 * KV_HEADS + head - HEADS) * 64) + d / 2;
  };

  // By one warp: what this block's tiles of the stream were published as, and then what other tiles were.
  auto take_back_stream = [&](u32* words, u32* squares) {
    for (int i = lane; i < shared.tiles[1] * TOKENS * 8; i += LANES)
      take_back(words + input_index<TOKENS>(i / 8 % TOKENS, (shared.first_tile[1] + i / 8 / TOKENS) * 16 + i % 8 * 2) / 2);
    for (int i = lane; i < shared.tiles[1] * TOKENS; i += LANES) take_back(squares + shared.first_tile[1] * TOKENS + i);
  };
  auto take_back_mlp = [&] {
    take_back_stream(input.x_mlp, input.square_sums_mlp);
    for (int i = lane; i < shared.tiles[2] * TOKENS * 4; i += LANES)
      take_back(input.gated + input_index<TOKENS>(i / 4 % TOKENS, (shared.first_tile[2] + i / 4 / TOKENS) * 8 + i % 4 * 2) / 2);
  };
  auto take_back_attention = [&] {
    take_back_stream(input.x, input.square_sums);
    for (int i = lane; i < shared.tiles[0] * TOKENS * 8; i += LANES) {
      const int tile = shared.first_tile[0] + i / 8 / TOKENS;
      take_back(qkv_word(i / 8 % TOKENS, tile / 8, tile % 8 * 8 + i % 4 * 2 + i / 4 % 2 * 64));
    }
    if (chunk_index == 0)
      for (int i = lane; i < ROWS * 64; i += LANES) take_back(attended_word(i / 64, i % 64 * 2));
  };

  RingPosition<DEPTH> at;
  uint4 b[QUARTERS] = {};
  const Flags has_x(g < TOKENS);

  // One linear: takes its input as it comes, multiplies, and calls finish(tile, token, lower, upper, is_writer) in whole warps
  // with the sums of rows lane % 8 and lane % 8 + 8 of the tile. Meanwhile one warp does `aside`.
  auto linear = [&](auto index, const char* weights, const u32* x, const u32* squares, auto aside, auto finish) {
    constexpr int INDEX = decltype(index)::value, K = L::inputs(INDEX), PER_TILE = L::per_tile(INDEX);
    constexpr bool IS_NORMED = L::is_normed(INDEX);
    if (Weights::ROW_SCALES && (int)threadIdx.x < shared.tiles[INDEX] * 2) {
      const char* from = weights + (size_t)L::rows(INDEX) / 16 * (K / 128) * Weights::BYTES + (shared.first_tile[INDEX] * 2 + threadIdx.x) * 16;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared_address(&shared.row_scales[INDEX % 2][0][0]) + threadIdx.x * 16), "l"(from) : "memory");
    }
    take_input<L, INDEX>(x, squares, x_shared, bias, shared.squares);
    __syncthreads();

    if (warp == WARPS - 1) {  // which has a stage less to do than others, mostly
      if (IS_NORMED && lane < TOKENS) {
        float total = 0.f;
        for (int w = 0; w < WARPS; w++) total += shared.squares[w][lane];
        shared.inverse_rms[lane] = rsqrtf(total / HIDDEN + input.epsilon);
      }
      aside();
    }
    const int count = shared.tiles[INDEX] * PER_TILE;
    const u32 my_x = shared_address(x_shared) + g * 64 + t * 16;
    for (int stage = warp; stage < count; stage += WARPS) {
      const int part = stage % PER_TILE;
      barrier_wait(&shared.filled[warp][at.stage], at.parity);
      const char* units = ring + at.stage * L::STAGE_BYTES;
      float sum[4] = {};
#pragma unroll
      for (int u = 0; u < L::STAGE_UNITS; u++)
        multiply_unit_raw<Weights, TOKENS * 64>(units + u * Weights::BYTES, my_x + (part * L::STAGE_UNITS + u) * TOKENS * 256,
                                                bias + (part * L::STAGE_UNITS + u) * L::GROUPS * 8 + 2 * t, has_x, lane, b, sum);
      __syncwarp();
      fill(at.stage);
      at.advance();
      float* mine = sums + stage * TOKENS * 16 + g;
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (2 * t + i < TOKENS) mine[(2 * t + i) * 16] = sum[i], mine[(2 * t + i) * 16 + 8] = sum[2 + i];
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();

    // A warp finishes one tile with four lanes a row pair, or two with two where there are many.
    constexpr int SPLIT = L::tiles(INDEX) * TOKENS <= WARPS ? 4 : 2, AT_ONCE = 4 / SPLIT;
    const int items = shared.tiles[INDEX] * TOKENS;
    for (int first = warp * AT_ONCE; first < items; first += WARPS * AT_ONCE) {
      const int asked = first + lane / (8 * SPLIT), item = min(asked, items - 1), tile = item / TOKENS, token = item % TOKENS;
      const float* from = sums + (tile * PER_TILE * TOKENS + token) * 16 + lane % 8;
      float lower = 0.f, upper = 0.f;
#pragma unroll
      for (int i = 0; i < (PER_TILE + SPLIT - 1) / SPLIT; i++) {
        const int part = i * SPLIT + lane / 8 % SPLIT;
        if (part < PER_TILE) lower += from[part * TOKENS * 16], upper += from[part * TOKENS * 16 + 8];
      }
#pragma unroll
      for (int o = 8; o < 8 * SPLIT; o *= 2) lower += __shfl_xor_sync(~0u, lower, o), upper += __shfl_xor_sync(~0u, upper, o);
      if (IS_NORMED) lower *= shared.inverse_rms[token], upper *= shared.inverse_rms[token];
      if (Weights::ROW_SCALES) {
        const Type* scales = shared.row_scales[INDEX % 2][tile];
        lower *= to_float(scales[lane % 8]), upper *= to_float(scales[lane % 8 + 8]);
      }
      finish(shared.first_tile[INDEX] + tile, token, lower, upper, asked < items && lane % (8 * SPLIT) < 8);
    }
  };
  auto nothing = [] {};

  for (int layer = 0; layer < input.num_layers; layer++) {
    const LayerPointers<Type>& pointers = shared.layers[layer];
    const bool is_final = layer + 1 == input.num_layers;

    copy_norm(0, pointers.mlp_norm, threadIdx.x - LANES);
#if TW_BULK_COPY
    // Keys and values of earlier steps, on their way into the L2 while q is computed.
    for (int i = threadIdx.x; i < num_keys * 4; i += THREADS)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(cache_row(layer, first_key + i / 4) + i / 2 % 2 * KV_HEADS * BLOCK_SIZE * D + i % 2 * 64));
#endif
    linear(Constant<0>{}, pointers.weights[0], input.x, input.square_sums, [&] { take_back_mlp(); make_visible(); },
           [&](int tile, int token, float lower, float upper, bool is_writer) {
      const int head = tile / 8, d = tile % 8 * 8 + lane % 8;
      if (head < HEADS + KV_HEADS) {
        const float2 turn = shared.rotation[token][d];
        const float a = lower, b = upper;
        lower = a * turn.x - b * turn.y;
        upper = b * turn.x + a * turn.y;
      }
      const float lower_pair = __shfl_xor_sync(~0u, lower, 1), upper_pair = __shfl_xor_sync(~0u, upper, 1);
      if (!is_writer) return;
      const bool is_even = lane % 2 == 0;
      const u32 two = is_even ? tw::pack<Type>(lower, lower_pair) : tw::pack<Type>(upper_pair, upper);
      const int at = is_even ? d : d + 63;
      publish(qkv_word(token, head, at), two);
      const int slot = input.slots[token];
      if (head < HEADS || slot < 0) return;
      const int value = head >= HEADS + KV_HEADS, kv_head = (head - HEADS) % KV_HEADS;
      const size_t row = ((size_t)(slot / BLOCK_SIZE) * 2 + value) * KV_HEADS + kv_head;
      reinterpret_cast<u32*>(pointers.cache + (row * BLOCK_SIZE + slot % BLOCK_SIZE) * D)[at / 2] = two;
    });

    // Attention: block = (chunk, sequence, kv head). The newest key and value come as words, the others from the cache.
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
          for (int i = threadIdx.x; i < (ROWS + 2) * 16; i += THREADS) {
            const int row = i / 16, head = row < ROWS ? kv_head * ROWS + row : HEADS + (row - ROWS) * KV_HEADS + kv_head;
            const uint4 eight = poll_words(qkv_word(sequence, head, i % 16 * 8));
            reinterpret_cast<uint4*>(row < ROWS ? shared.q[row] : shared.kv[row - ROWS])[i % 16] = eight;
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
      float* parts = input.parts + (size_t)pair * MAX_CHUNKS * ROWS * (D + 2);
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
          publish(attended_word(head, d), tw::pack<Type>(a / sum, b / sum));
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
            publish(attended_word(head, d), tw::pack<Type>(a / sum, b / sum));
          }
      }
      __syncthreads();
    }

    // Adds what the linear found to this block's part of the stream, whose next reader has its own norm.
    auto add = [&](int tile, int token, float& lower, float& upper) {
      const float* at = &shared.stream[tile - shared.first_tile[1]][token][lane % 8];
      lower += at[0], upper += at[8];
      __syncwarp();
    };
    linear(Constant<1>{}, pointers.weights[1], input.attended, nullptr, nothing,
           [&](int tile, int token, float lower, float upper, bool is_writer) {
      add(tile, token, lower, upper);
      publish_stream(tile, token, lower, upper, is_writer, 0, input.x_mlp, input.square_sums_mlp);
    });

    linear(Constant<2>{}, pointers.weights[2], input.x_mlp, input.square_sums_mlp, [&] { take_back_attention(); make_visible(); },
           [&](int tile, int token, float lower, float upper, bool is_writer) {
      const float y = finite<Type>(__fdividef(lower, 1.f + __expf(-lower)) * upper), pair = __shfl_xor_sync(~0u, y, 1);
      if (is_writer && lane % 2 == 0) publish(input.gated + input_index<TOKENS>(token, tile * 8 + lane % 8) / 2, tw::pack<Type>(y, pair));
    });

    copy_norm(1, is_final ? input.final_norm : shared.layers[layer + 1].attention_norm, threadIdx.x - LANES);
    linear(Constant<3>{}, pointers.weights[3], input.gated, nullptr, nothing,
           [&](int tile, int token, float lower, float upper, bool is_writer) {
      add(tile, token, lower, upper);
      const float squares = publish_stream(tile, token, lower, upper, is_writer, 1, is_final ? nullptr : input.x, input.square_sums);
      if (is_final && is_writer) {
        const int row = tile * 16 + lane % 8;
        const float* norm = shared.norms[1][tile - shared.first_tile[1]];
        input.x_out[input_index<TOKENS>(token, row)] = to_finite<Type>(lower * norm[lane % 8]);
        input.x_out[input_index<TOKENS>(token, row + 8)] = to_finite<Type>(upper * norm[lane % 8 + 8]);
        input.stream_out[(size_t)token * HIDDEN + row] = lower, input.stream_out[(size_t)token * HIDDEN + row + 8] = upper;
        if (lane % 8 == 0) input.square_sums_out[tile * TOKENS + token] = squares;
      }
    });
  }
  launch_next_kernel();
}

}  // namespace tw

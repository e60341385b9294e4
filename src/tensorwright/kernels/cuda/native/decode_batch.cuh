// All layers of a decode step of 8 to 64 sequences in one kernel, on sm_90a, one block on each multiprocessor. Between
// operations, blocks wait for each other (batch_exchange.cuh) while the copying warps already fetch the weights to come.
//
// Three copying warps run ahead through the weights of all linears; the fourth follows with the tokens, which it may only ask
// for when the operation before is done. The multiplying warps make sums as linear_wgmma.cuh does. A row block of gate and up
// is finished by the block that begins it: the others have begun with it. In the other linears, which have few rows, many
// blocks have a part of each row block, and every block finishes a few rows.
#pragma once
#include "batch_attention.cuh"

namespace tw {

template <class Weights, int N, int HIDDEN, int HEADS, int KV_HEADS, int FFN, int BLOCK_SIZE, int WARPGROUPS, int TILES, int UNITS, int STAGES, int BLOCKS_>
struct Batch {
  using Type = typename Weights::Number;
  using Shape = WgmmaShape<Weights, N, WARPGROUPS, TILES, UNITS, STAGES>;
  using Attention = BatchAttention<Type, N, HEADS, KV_HEADS, BLOCK_SIZE, Shape::WARPS, BLOCKS_>;
  static constexpr int BLOCKS = BLOCKS_, WARPS = Shape::WARPS, OCTETS = N / 8, BLOCK_ROWS = Shape::ROW_TILES * UNIT_ROWS;
  static constexpr int larger(int a, int b) { return a > b ? a : b; }
  static constexpr int rows(int linear) { return linear == QKV ? (HEADS + 2 * KV_HEADS) * 128 : linear == GATE_UP ? 2 * FFN : HIDDEN; }
  static constexpr int inputs(int linear) { return linear == OUTPUT ? HEADS * 128 : linear == DOWN ? FFN : HIDDEN; }
  static constexpr int steps(int linear) { return inputs(linear) / UNIT_INPUTS / UNITS; }
  static constexpr int total(int linear) { return rows(linear) / BLOCK_ROWS * steps(linear); }
  static constexpr bool fits(int linear) {
    return rows(linear) % BLOCK_ROWS == 0 && inputs(linear) % (UNIT_INPUTS * UNITS) == 0 && total(linear) >= BLOCKS;
  }
  static_assert(fits(QKV) && fits(OUTPUT) && fits(GATE_UP) && fits(DOWN), "whole steps, and one for each block: what no block makes is waited for");
  static constexpr int of_shared(int (*f)(int, int)) {
    return larger(f(steps(QKV), total(QKV)), larger(f(steps(OUTPUT), total(OUTPUT)), f(steps(DOWN), total(DOWN))));
  }
  static constexpr int SLOTS = of_shared(Cut<BLOCKS>::slots), MOST_PARTS = of_shared(Cut<BLOCKS>::most_parts);
  static constexpr int PART = WARPS * TILES * OCTETS * LANES;  // float4 of a part
  static constexpr int OWN_TILES = (larger(rows(QKV), rows(OUTPUT)) / UNIT_ROWS + BLOCKS - 1) / BLOCKS;

  __device__ static Cut<BLOCKS> cut(int linear) {
    return linear == QKV ? Cut<BLOCKS>{steps(QKV), total(QKV)} : linear == OUTPUT ? Cut<BLOCKS>{steps(OUTPUT), total(OUTPUT)}
           : linear == GATE_UP ? Cut<BLOCKS>{steps(GATE_UP), total(GATE_UP)} : Cut<BLOCKS>{steps(DOWN), total(DOWN)};
  }

  struct Shared {
    u64 filled[STAGES], emptied[STAGES], norm_ready, norm_used;
    alignas(16) float inverse_rms[N];
    float squares[OWN_TILES][N];
    typename Attention::Plan plan;
    typename Attention::Shared attention[Attention::TEAMS];
  };
};

// By the whole warp: 1 / rms of all tokens, from the sums of squares of all blocks.
template <int N, int BLOCKS> __device__ inline void make_norms(const float* square_sums, float scale, float epsilon, float* inverse_rms) {
  constexpr int QUADS = N / 4, SHARERS = LANES / QUADS;  // lanes that share four tokens
  const int lane = threadIdx.x % LANES, quad = lane % QUADS;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
  for (int i = lane / QUADS; i < BLOCKS; i += SHARERS) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(square_sums + i * N) + quad);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  for (int o = QUADS; o < LANES; o *= 2) {
    sum.x += __shfl_xor_sync(~0u, sum.x, o), sum.y += __shfl_xor_sync(~0u, sum.y, o);
    sum.z += __shfl_xor_sync(~0u, sum.z, o), sum.w += __shfl_xor_sync(~0u, sum.w, o);
  }
  if (lane < QUADS)
    reinterpret_cast<float4*>(inverse_rms)[quad] = make_float4(rsqrtf(sum.x * scale + epsilon), rsqrtf(sum.y * scale + epsilon),
                                                               rsqrtf(sum.z * scale + epsilon), rsqrtf(sum.w * scale + epsilon));
  __syncwarp();
}

template <class Weights, int N, int HIDDEN, int HEADS, int KV_HEADS, int FFN, int BLOCK_SIZE, int WARPGROUPS, int TILES, int UNITS, int STAGES, int BLOCKS>
__global__ void __launch_bounds__((WARPGROUPS + 1) * 128, 1)
decode_batch(const BatchInput<typename Weights::Number> input) {
  using B = Batch<Weights, N, HIDDEN, HEADS, KV_HEADS, FFN, BLOCK_SIZE, WARPGROUPS, TILES, UNITS, STAGES, BLOCKS>;
  using Shape = typename B::Shape;
  using Type = typename Weights::Number;
  using Attention = typename B::Attention;
  constexpr int WARPS = B::WARPS, OCTETS = B::OCTETS;
  extern __shared__ __align__(1024) char memory[];
  __shared__ typename B::Shared shared;
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, block = blockIdx.x;

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(&shared.filled[s], 1);
      barrier_init(&shared.emptied[s], WARPS);
    }
    barrier_init(&shared.norm_ready, 1);
    barrier_init(&shared.norm_used, WARPS);
    barriers_ready();
  }
  __syncthreads();
  u32 arrivals;  // at a counter, when all blocks have arrived in this step
  auto begin_step = [&] {
    wait_for_previous_kernel();
    arrivals = (*input.step + 1) * BLOCKS;
    if (warp == 0) Attention::make_plan(shared.plan, input.lengths);
    asm volatile("bar.sync 4, %0;" ::"n"((WARPS + 1) * LANES) : "memory");
  };
  auto done = [&](int layer, int operation) { return input.done + layer * OPERATIONS + operation; };
  RingPosition<STAGES> at;

  if (warp >= WARPS) {
    leave_registers<Shape::COPYING>();
    const int copier = warp - WARPS;
    int asked = 0;
    auto next_stage = [&] {  // is free, or waited for
      if (asked++ >= STAGES) barrier_wait(&shared.emptied[at.stage], at.parity ^ 1);
    };
    if (copier < 3) {
      const u64 policy = evict_first_policy();
      for (int layer = 0; layer < input.num_layers; layer++)
        for (int linear = QKV; linear <= DOWN; linear++) {
          const Cut<BLOCKS> cut = B::cut(linear);
          const char* weights = input.layers[layer].weights[linear];
          const int end = cut.first(block + 1);
          for (int step = cut.first(block); step < end; step++, at.advance()) {
            next_stage();
            if (copier == 0 && lane == 0) expect_bytes(&shared.filled[at.stage], Shape::STAGE_BYTES);
            const int i = copier + 3 * lane;
            if (i < Shape::ROW_TILES) {
              const size_t tile = (size_t)(step / cut.steps) * Shape::ROW_TILES + i;
              copy_bulk(memory + at.stage * Shape::STAGE_BYTES + i * Shape::PIECE_BYTES,
                        weights + (tile * cut.steps + step % cut.steps) * Shape::PIECE_BYTES, Shape::PIECE_BYTES, &shared.filled[at.stage], policy);
            }
            __syncwarp();
          }
        }
    } else {
      begin_step();
      for (int layer = 0; layer < input.num_layers; layer++)
        for (int linear = QKV; linear <= DOWN; linear++) {
          const Cut<BLOCKS> cut = B::cut(linear);
          const Type* x = linear == QKV ? input.x : linear == OUTPUT ? input.attended : linear == GATE_UP ? input.x_mlp : input.gated;
          const int begin = cut.first(block), end = cut.first(block + 1), at_once = min(begin + STAGES, end);
          if (linear != QKV) wait_for(done(layer, linear == OUTPUT ? ATTENTION : linear - 1), arrivals);
          else if (layer > 0) wait_for(done(layer - 1, DOWN), arrivals);
          __syncwarp();
          for (int step = begin; step < end; step++, at.advance()) {
            next_stage();
            if (lane == 0)
              copy_bulk(memory + at.stage * Shape::STAGE_BYTES + Shape::WEIGHT_BYTES,
                        reinterpret_cast<const char*>(x) + (size_t)(step % cut.steps) * UNITS * Shape::CHUNK_BYTES, UNITS * Shape::CHUNK_BYTES,
                        &shared.filled[at.stage]);
            __syncwarp();
            if (step + 1 != at_once) continue;
            if (linear == QKV || linear == GATE_UP) {
              if (layer > 0 || linear == GATE_UP) barrier_wait(&shared.norm_used, linear == QKV);  // twice a layer
              make_norms<N, BLOCKS>(linear == QKV ? input.square_sums : input.square_sums_mlp, 1.f / HIDDEN, input.epsilon, shared.inverse_rms);
              if (lane == 0) barrier_arrive(&shared.norm_ready);
            }
            if (linear == QKV) Attention::prefetch(input, shared.plan, input.layers[layer].cache);
          }
        }
    }
  } else {
    take_registers<Shape::MULTIPLYING>();
    const int g = lane / 4, t = lane % 4;
    auto sync_multiplying = [] { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * LANES) : "memory"); };
    auto release = [&](int stage) {
      __syncwarp();
      if (lane == 0) barrier_arrive(&shared.emptied[stage]);
    };
    // Of a row block: where a block keeps its part.
    auto part = [&](int of_block, int slot, int of_warp, int r, int octet) {
      return input.parts + ((size_t)of_block * B::SLOTS + slot) * B::PART + ((of_warp * TILES + r) * OCTETS + octet) * LANES + lane;
    };
    // Eight tokens of COUNT row tiles: their sums, normed and scaled.
    auto finish = [&](auto tiles, int linear, const char* weights, int row_tile, int octet, float(&values)[decltype(tiles)::value][4]) {
      const int token = octet * 8 + 2 * t;
      const bool is_normed = linear == QKV || linear == GATE_UP;
      const float scale[2] = {is_normed ? shared.inverse_rms[token] : 1.f, is_normed ? shared.inverse_rms[token + 1] : 1.f};
      const Type* row_scales = reinterpret_cast<const Type*>(weights + (size_t)B::cut(linear).total * B::BLOCK_ROWS / UNIT_ROWS * UNITS * Weights::BYTES);
#pragma unroll
      for (int r = 0; r < decltype(tiles)::value; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          values[r][i] *= scale[i % 2];
          if (Weights::ROW_SCALES) values[r][i] *= to_float(row_scales[(row_tile + r) * UNIT_ROWS + g + i / 2 * 8]);
        }
    };
    // This block's rows of a linear whose row blocks are in parts.
    auto finish_rows = [&](auto rows, int linear, const char* weights, const auto& output) {
      using Output = typename Bare<decltype(output)>::type;
      constexpr int ROW_TILES = decltype(rows)::value / UNIT_ROWS, WIDTH = OCTETS < 4 ? 1 : 2;  // octets at once
      int here = block;  // its multiples are made here, not kept from layer to layer
      asm volatile("" : "+r"(here));
      const Cut<BLOCKS> cut = B::cut(linear);
      const int first = ROW_TILES * here / BLOCKS, own = ROW_TILES * (here + 1) / BLOCKS - first;
      for (int i = warp; i < own * (OCTETS / WIDTH); i += WARPS) {
        const int row_tile = first + i / (OCTETS / WIDTH), octet = i % (OCTETS / WIDTH) * WIDTH;
        const int row_block = row_tile / Shape::ROW_TILES, within = row_tile % Shape::ROW_TILES;
        const int from = cut.owner(row_block * cut.steps), parts_count = cut.owner(row_block * cut.steps + cut.steps - 1) - from + 1;
        typename Output::Loaded loaded[WIDTH][1];
#pragma unroll
        for (int n = 0; n < WIDTH; n++) output.template load<1>(row_tile, g, t, (octet + n) * 8, loaded[n]);
        float4 parts[B::MOST_PARTS * WIDTH];
        const int first_slot = cut.slot(from, row_block);  // the others begin in this row block
        take_parts(parts, parts_count * WIDTH, [&](int p) {
          return part(from + p / WIDTH, p < WIDTH ? first_slot : 0, within / TILES, within % TILES, octet + p % WIDTH);
        });
#pragma unroll
        for (int n = 0; n < WIDTH; n++) {
          float values[1][4] = {}, squares[2] = {};
#pragma unroll
          for (int p = n; p < B::MOST_PARTS * WIDTH; p += WIDTH)
            values[0][0] += parts[p].x, values[0][1] += parts[p].y, values[0][2] += parts[p].z, values[0][3] += parts[p].w;
          finish(Constant<1>(), linear, weights, row_tile, octet + n, values);
          output.template store<1>(row_tile, g, t, (octet + n) * 8, values, loaded[n], squares);
          if constexpr (Output::SQUARES) {
#pragma unroll
            for (int k = 0; k < 2; k++) {
              for (int o = 4; o < LANES; o *= 2) squares[k] += __shfl_xor_sync(~0u, squares[k], o);
              if (g == 0) shared.squares[row_tile - first][(octet + n) * 8 + 2 * t + k] = squares[k];
            }
          }
        }
      }
      sync_multiplying();
      if constexpr (Output::SQUARES) {
        if (warp == 0)
          for (int token = lane; token < N; token += LANES) {
            float sum = 0.f;
            for (int r = 0; r < own; r++) sum += shared.squares[r][token];
            output.square_sums[here * N + token] = sum;
          }
        __syncwarp();
      }
    };

    begin_step();
    for (int layer = 0; layer < input.num_layers; layer++)
      for (int linear = QKV; linear <= DOWN; linear++) {
        const LayerPointers<Type>& pointers = input.layers[layer];
        const char* weights = pointers.weights[linear];
        const Cut<BLOCKS> cut = B::cut(linear);
        const int begin = cut.first(block), end = cut.first(block + 1);
        bool has_norms = linear == OUTPUT || linear == DOWN;
        auto wait_for_norms = [&] {
          if (!has_norms) {
            barrier_wait(&shared.norm_ready, linear == GATE_UP);
            has_norms = true;
          }
        };
        for (int step = begin; step < end;) {
          const int row_block = step / cut.steps, piece_end = min(end, (row_block + 1) * cut.steps);
          const bool finishes = linear == GATE_UP && step == row_block * cut.steps;
          WgmmaTile<Weights, N, TILES> tile;
          tile.begin();
          int to_release = -1;
          for (; step < piece_end; step++) {
            barrier_wait(&shared.filled[at.stage], at.parity);
            const char* stage = memory + at.stage * Shape::STAGE_BYTES;
            tile.template multiply<UNITS>(stage + warp * TILES * Shape::PIECE_BYTES, stage + Shape::WEIGHT_BYTES, lane,
                                          [&] { if (to_release >= 0) release(to_release); });
            to_release = at.stage;
            at.advance();
          }
          tile.finish();
          release(to_release);
          if (!finishes) {
            float4* to = part(block, linear == GATE_UP ? 0 : cut.slot(block, row_block), warp, 0, 0);
#pragma unroll
            for (int i = 0; i < TILES * OCTETS; i++) put_part(to + i * LANES, tile.sums[i / OCTETS] + i % OCTETS * 4);
            continue;
          }
          const int row_tile = row_block * Shape::ROW_TILES + warp * TILES, last = cut.owner(row_block * cut.steps + cut.steps - 1);
          for (int b = block + 1; b <= last; b++) {
            constexpr int AT_ONCE = TILES * OCTETS < 8 ? TILES * OCTETS : 8;
#pragma unroll
            for (int first = 0; first < TILES * OCTETS; first += AT_ONCE) {
              float4 parts[AT_ONCE];
              take_parts(parts, AT_ONCE, [&](int i) { return part(b, 0, warp, 0, 0) + (first + i) * LANES; });
#pragma unroll
              for (int i = 0; i < AT_ONCE; i++) {
                float* sums = tile.sums[(first + i) / OCTETS] + (first + i) % OCTETS * 4;
                sums[0] += parts[i].x, sums[1] += parts[i].y, sums[2] += parts[i].z, sums[3] += parts[i].w;
              }
            }
          }
          wait_for_norms();
#pragma unroll
          for (int n = 0; n < OCTETS; n++) {
            float values[TILES][4], squares[2];
            Nothing nothing[TILES];
#pragma unroll
            for (int i = 0; i < TILES * 4; i++) values[i / 4][i % 4] = tile.sums[i / 4][4 * n + i % 4];
            finish(Constant<TILES>(), linear, weights, row_tile, n, values);
            GatedBlock<Type, N>{input.gated}.template store<TILES>(row_tile, g, t, n * 8, values, nothing, squares);
          }
        }
        wait_for_norms();
        if (linear == QKV) {
          finish_rows(Constant<B::rows(QKV)>(), linear, weights,
                      RopeAndCacheBlock<Type, Type, HEADS, KV_HEADS, BLOCK_SIZE>{input.q, pointers.cache, input.slots, input.rotation});
        } else if (linear == GATE_UP) {
          sync_multiplying();
        } else {
          const bool is_down = linear == DOWN, is_final = is_down && layer + 1 == input.num_layers;
          const float* next_norm = !is_down ? pointers.mlp_norm : is_final ? input.final_norm : input.layers[layer + 1].attention_norm;
          finish_rows(Constant<HIDDEN>(), linear, weights,
                      ResidualBlock<Type, N, HIDDEN>{input.stream, is_down ? input.x : input.x_mlp, next_norm,
                                                     is_down ? input.square_sums : input.square_sums_mlp});
        }
        if (threadIdx.x == 0) arrive_at(done(layer, linear));
        if (lane == 0 && (linear == QKV || linear == GATE_UP)) barrier_arrive(&shared.norm_used);
        if (linear != QKV) continue;

        if (lane == 0) wait_for(done(layer, QKV), arrivals);
        __syncwarp();
        const int team = warp / Attention::TEAM;
        for (int i = team * BLOCKS + block; i < Attention::items(shared.plan); i += Attention::TEAMS * BLOCKS)
          Attention::attend(input, shared.plan, Attention::item(shared.plan, i), pointers.cache, shared.attention[team]);
        sync_multiplying();
        if (threadIdx.x == 0) arrive_at(done(layer, ATTENTION));
      }
  }
  launch_next_kernel();
}

}  // namespace tw

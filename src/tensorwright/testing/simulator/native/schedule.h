// Runs a kernel: blocks side by side, their warps in random turns, lanes of a warp together where they are together.
//
// Of a warp's groups of lanes the one that is furthest behind runs, so that lanes which parted meet again. An instruction of
// a whole warp waits for all lanes that it names.
#pragma once
#include "convert.h"
#include "tensor.h"

namespace sim {

constexpr int SPECIALS = 14;  // tid, ntid, ctaid, nctaid (x, y, z), laneid, warpid
constexpr int SLICE = 3000;   // instructions, at most, before another warp's turn

inline void start_warp(Warp& warp, Block& block, Machine& machine, int number, const i32* grid, const i32* shape, const i32* place) {
  const Kernel& kernel = *machine.kernel;
  warp.block = &block, warp.machine = &machine, warp.number = number;
  warp.rows = kernel.first_rows;
  warp.predicates.assign(kernel.num_predicates, 0);
  warp.predicates[1] = ~0u;  // 0: never, 1: always
  warp.local.assign(size_t(kernel.local_bytes) * LANES, POISON);
  const i32 threads = shape[0] * shape[1] * shape[2], count = std::min(LANES, threads - number * LANES);
  warp.present = count == LANES ? ~0u : (1u << count) - 1;
  for (int lane = 0; lane < LANES; lane++) {
    const i32 thread = number * LANES + lane;
    const i32 values[SPECIALS] = {thread % shape[0], thread / shape[0] % shape[1], thread / shape[0] / shape[1], shape[0], shape[1], shape[2],
                                  place[0], place[1], place[2], grid[0], grid[1], grid[2], lane, number};
    for (int i = 0; i < SPECIALS; i++) warp.row<i32>(kernel.special_row + i * LANES * 4)[lane] = values[i];
  }
  warp.copies.clear();
  std::fill(warp.copy_group, warp.copy_group + LANES, 0);
  warp.groups = {{0, warp.present, false, -1}};
}

inline void release_barrier(Block& block, int barrier) {
  block.arrived[barrier] = 0;
  for (Warp& warp : block.warps)
    for (Group& group : warp.groups)
      if (group.barrier == barrier) {
        group.barrier = -1, group.pc++;
        if (block.races) block.races->acquire(warp.number, barrier);
      }
}
// Threads that have ended count as arrived at barriers of the whole block.
inline void check_barriers(Block& block) {
  for (int i = 0; i < 16; i++)
    if (block.arrived[i] > 0 && block.arrived[i] >= (block.expected[i] ? block.expected[i] : block.live_threads)) release_barrier(block, i);
}

inline void merge(Warp& warp) {
  auto& groups = warp.groups;
  for (size_t i = 0; i < groups.size(); i++)
    for (size_t j = groups.size() - 1; j > i; j--)
      if (groups[i].pc == groups[j].pc && groups[i].barrier == groups[j].barrier && groups[i].barrier < 0) {
        groups[i].mask |= groups[j].mask, groups[i].is_waiting = false;
        groups.erase(groups.begin() + j);
      }
}

// Runs one warp for a while; whether it did anything.
inline bool run_slice(Warp& warp, u64& left) {
  Machine& machine = *warp.machine;
  Block& block = *warp.block;
  const Kernel& kernel = *machine.kernel;
  bool did = false;
  warp.has_polled = false;
  const int slice = 1 + int(machine.next_random() % SLICE);
  for (int turn = 0; turn < slice && left > 0 && !warp.has_polled; turn++) {
    int chosen = -1;
    for (size_t i = 0; i < warp.groups.size(); i++) {
      const Group& group = warp.groups[i];
      if (!group.is_waiting && group.barrier < 0 && (chosen < 0 || group.pc < warp.groups[chosen].pc)) chosen = int(i);
    }
    if (chosen < 0) return did;
    Group& group = warp.groups[chosen];
    const Instruction& in = kernel.code[group.pc];
    warp.pc = group.pc;
    u32 mask = group.mask;
    if (in.guard >= 0) mask &= in.is_guard_negated ? ~warp.predicates[in.guard] : warp.predicates[in.guard];
    left--, did = true;
    if (in.flow == PLAIN) {
      if (mask) in.run(warp, in, mask);
      if (!machine.error.empty()) return true;
      group.pc++;
    } else if (in.flow == BRANCH) {
      const u32 others = group.mask & ~mask;
      if (!others) group.pc = i32(in.immediate);
      else if (!mask) group.pc++;
      else {
        group.mask = others, group.pc++;
        warp.groups.push_back({i32(in.immediate), mask, false, -1});
      }
      if (in.immediate <= warp.pc && warp.groups.size() > 1) merge(warp);
    } else if (in.flow == EXIT) {
      block.live_threads -= __builtin_popcount(mask);
      warp.present &= ~mask;
      group.mask &= ~mask, group.pc++;
      if (!group.mask) warp.groups.erase(warp.groups.begin() + chosen);
      for (Group& each : warp.groups) each.is_waiting = false;
      check_barriers(block);
    } else if (in.flow == TOGETHER) {
      const u32 wanted = in.space < 0 ? ~0u : warp.row<u32>(in.space)[__builtin_ctz(group.mask)];  // `space`: the row of the member mask
      if ((wanted & warp.present) & ~group.mask) {
        group.is_waiting = true;
      } else {
        if (in.space < 0 && group.mask != ~0u) return machine.fail(warp, "not all lanes take part"), true;
        if (mask) in.run(warp, in, mask);
        if (!machine.error.empty()) return true;
        group.pc++;
      }
    } else {
      const i32* operands = kernel.operands.data() + in.first;
      const int lane = __builtin_ctz(group.mask), id = warp.row<i32>(operands[0])[lane] & 15;
      block.expected[id] = in.count > 1 ? warp.row<i32>(operands[1])[lane] : 0;
      block.arrived[id] += __builtin_popcount(group.mask);
      if (block.races) block.races->release(warp.number, id);
      if (in.flow == BARRIER) group.barrier = id;
      else group.pc++;
      check_barriers(block);
    }
    if (warp.groups.size() > 1) merge(warp);
  }
  return did;
}

inline std::string deadlock(Block& block, const Kernel& kernel) {
  for (Warp& warp : block.warps)
    for (const Group& group : warp.groups) {
      char text[80];
      std::snprintf(text, sizeof text, "nothing can go on: lanes %08x are at instruction %d: ", group.mask, group.pc);
      return text + kernel.text[group.pc];
    }
  return "nothing can go on";
}

inline void start_block(Block& block, Machine& machine, i64 index, const i32* grid, const i32* shape, i32 dynamic_bytes) {
  const i32 threads = shape[0] * shape[1] * shape[2];
  const i32 place[3] = {i32(index % grid[0]), i32(index / grid[0] % grid[1]), i32(index / grid[0] / grid[1])};
  block.shared.assign(machine.kernel->shared_bytes + dynamic_bytes, POISON);
  block.live_threads = threads;
  block.warps.resize((threads + LANES - 1) / LANES);
  if (machine.finds_races) block.races = std::make_shared<Races>(block.shared.size(), block.warps.size());
  for (size_t w = 0; w < block.warps.size(); w++) start_warp(block.warps[w], block, machine, int(w), grid, shape, place);
}

// Runs all blocks, at most `resident` of them side by side: one that has ended makes room for the next.
inline void run_blocks(Machine& machine, i64 resident, const i32* grid, const i32* shape, i32 dynamic_bytes, u64& left) {
  const i64 count = i64(grid[0]) * grid[1] * grid[2];
  std::deque<Block> blocks(std::min(count, resident));
  std::vector<std::pair<Block*, Warp*>> order;
  i64 next = 0;
  for (Block& block : blocks) {
    start_block(block, machine, next++, grid, shape, dynamic_bytes);
    for (Warp& warp : block.warps) order.push_back({&block, &warp});
  }
  while (machine.error.empty()) {
    bool did = false, is_over = true;
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[machine.next_random() % i]);
    for (auto& [block, warp] : order) {
      did |= run_slice(*warp, left);
      if (!machine.error.empty()) return;
      if (!block->bulk.empty() && machine.next_random() % 2) land_bulk(*block, machine.next_random() % block->bulk.size()), did = true;
    }
    for (Block& block : blocks) {
      if (block.live_threads == 0 && next < count) start_block(block, machine, next++, grid, shape, dynamic_bytes), did = true;
      if (block.live_threads > 0) is_over = false;
      while (!did && !block.bulk.empty()) land_bulk(block, 0), did = true;
    }
    if (is_over) return;
    for (Block& block : blocks) {
      if (!machine.error.empty() || block.live_threads == 0) continue;
      if (!did) machine.error = deadlock(block, *machine.kernel);
      else if (left == 0) machine.error = "the kernel did not end within its number of instructions; " + deadlock(block, *machine.kernel);
    }
  }
}

}  // namespace sim

// Loads, stores, atomics, asynchronous copies and the barriers in shared memory that count them.
//
// Copies land as late as they may: those of cp.async when they are waited for, bulk copies at a random later time. What
// reads too early reads what was there before.
#pragma once
#include "races.h"
#include "scalar.h"

namespace sim {

// An address as a place to meet at: barriers have numbers, which are smaller.
inline u64 place_of(u64 address) { return address + 16; }

inline bool note_access(Warp& warp, u64 address, u32 bytes, Access access) {
  Races& races = *warp.block->races;
  if (access == SYNCHRONISE) {
    races.acquire(warp.number, place_of(address));
    races.release(warp.number, place_of(address));
    return true;
  }
  const std::string wrong = access == READ ? races.read(warp.number, address, bytes, warp.pc) : races.write(warp.number, address, bytes, warp.pc);
  if (!wrong.empty()) warp.machine->fail(warp, wrong);
  return wrong.empty();
}

inline u64 address_of(Warp& warp, const Instruction& in, int index, int lane, bool with_offset = true) {
  // Operand: the row, then 1 where addresses are rows of 64 bits. The offset belongs to the first address.
  const i32 row = operand(warp, in, index), is_wide = operand(warp, in, index + 1);
  const u64 base = is_wide ? warp.row<u64>(row)[lane] : u64(warp.row<u32>(row)[lane]);
  return base + (with_offset ? in.immediate : 0);
}

// Operands: address (2), then registers. `width`: bytes of a number; registers of 8 bytes hold 8, others up to 4.
inline void load(Warp& warp, const Instruction& in, u32 mask) {
  FOR_LANES(mask) {
    const u64 address = address_of(warp, in, 0, lane);
    u8* from = locate(warp, in.space, address, in.width * in.vector, lane, in.mode & 2 ? SYNCHRONISE : READ);
    if (from == nullptr) return;
    for (int v = 0; v < in.vector; v++, from += in.width) {
      const i32 row = operand(warp, in, 2 + v);
      if (row < 0) continue;
      if (in.width == 8) {
        std::memcpy(warp.row<u64>(row) + lane, from, 8);
      } else {
        u32 value = 0;
        std::memcpy(&value, from, in.width);
        if (in.mode & 1) value = in.width == 1 ? u32(i32(i8_t(value))) : in.width == 2 ? u32(i32(i16(value))) : value;  // signed
        if (in.mode & 4) warp.row<u64>(row)[lane] = in.mode & 1 ? u64(i64(i32(value))) : value;  // into a 64-bit register
        else warp.row<u32>(row)[lane] = value;
      }
    }
  }
  if (in.mode & 2) warp.has_polled = true;  // volatile, relaxed, acquire
}
inline void store(Warp& warp, const Instruction& in, u32 mask) {
  FOR_LANES(mask) {
    u8* to = locate(warp, in.space, address_of(warp, in, 0, lane), in.width * in.vector, lane, in.mode & 2 ? SYNCHRONISE : WRITE);
    if (to == nullptr) return;
    for (int v = 0; v < in.vector; v++, to += in.width) {
      const i32 row = operand(warp, in, 2 + v);
      if (in.width == 8) std::memcpy(to, warp.row<u64>(row) + lane, 8);
      else std::memcpy(to, warp.row<u32>(row) + lane, in.width);
    }
  }
}

// Operands: d (or -1), address (2), b, c (cas).
template <class T, class Function> void atomic(Warp& warp, const Instruction& in, u32 mask, Function result) {
  const i32 d = operand(warp, in, 0);
  auto* b = row_of<T>(warp, in, 3);
  auto* c = in.count > 4 ? row_of<T>(warp, in, 4) : b;
  FOR_LANES(mask) {
    u8* at = locate(warp, in.space, address_of(warp, in, 1, lane), sizeof(T), lane, SYNCHRONISE);
    if (at == nullptr) return;
    T old;
    std::memcpy(&old, at, sizeof(T));
    const T now = result(old, get<T>(b, lane), get<T>(c, lane));
    std::memcpy(at, &now, sizeof(T));
    if (d >= 0) put<T>(warp.row<Stored<T>>(d), lane, old);
  }
  warp.has_polled = true;
}
#define ATOMIC(name, T, value) \
  SIM_HANDLER("atom." name "." + type) { \
    atomic<T>(warp, in, mask, [](T old, T b, T c) { (void)old, (void)b, (void)c; return T(value); }); \
  }
template <class T> void atomics(Table& table, const std::string& type) {
  ATOMIC("add", T, old + b);
  ATOMIC("min", T, std::min(old, b));
  ATOMIC("max", T, std::max(old, b));
  ATOMIC("exch", T, b);
  ATOMIC("cas", T, old == b ? c : old);
  if constexpr (std::is_integral_v<T>) {
    ATOMIC("and", T, old & b);
    ATOMIC("or", T, old | b);
    ATOMIC("xor", T, old ^ b);
    ATOMIC("inc", T, old >= b ? 0 : old + 1);
    ATOMIC("dec", T, old == 0 || old > b ? b : old - 1);
  }
}

// An mbarrier's 8 bytes: arrivals yet to come, arrivals of a phase, the phase, bytes yet to come (biased).
struct Mbarrier {
  static constexpr u64 BIAS = 1u << 20;
  u64 pending, count, phase, bytes;
  explicit Mbarrier(u64 word) : pending(word & 0xfffff), count(word >> 20 & 0xfffff), phase(word >> 40 & 1), bytes(word >> 41 & 0x3fffff) {}
  Mbarrier(u64 count, int) : pending(count), count(count), phase(0), bytes(BIAS) {}
  u64 word() {
    if (pending == 0 && bytes == BIAS) phase ^= 1, pending = count;
    return pending | count << 20 | phase << 40 | bytes << 41 | 1ull << 63;
  }
};
// Everything that a thread did before it arrives is known to whoever sees the phase end.
inline void arrive(Warp& warp, u64 address) {
  if (warp.block->races) warp.block->races->release(warp.number, place_of(address));
}
template <class Change> bool change_mbarrier(Warp& warp, u64 address, int lane, Change change) {
  u8* at = locate(warp, SHARED, address, 8, lane, COPY);
  if (at == nullptr) return false;
  u64 word;
  std::memcpy(&word, at, 8);
  if (!(word >> 63) || word == ~0ull) {
    warp.machine->fail(warp, "an mbarrier that was not initialised");
    return false;
  }
  Mbarrier barrier(word);
  change(barrier);
  const u64 phase = barrier.phase;
  word = barrier.word();
  std::memcpy(at, &word, 8);
  if (warp.block->races && barrier.phase != phase) warp.block->races->phase_ended(place_of(address));
  return true;
}

inline void finish_copies(Warp& warp, u32 mask, int keep) {
  auto& copies = warp.copies;
  size_t left = 0;
  for (size_t i = 0; i < copies.size(); i++) {
    const PendingCopy& copy = copies[i];
    if (!(mask >> copy.lane & 1) || copy.group > warp.copy_group[copy.lane] - 1 - keep) {
      copies[left++] = copy;
      continue;
    }
    u8* to = locate(warp, SHARED, copy.to, copy.bytes + copy.zeros, copy.lane, WRITE);
    u8* from = copy.bytes ? locate(warp, GLOBAL, copy.from, copy.bytes, copy.lane, READ) : to;
    if (to == nullptr || from == nullptr) return;
    std::memmove(to, from, copy.bytes);
    std::memset(to + copy.bytes, 0, copy.zeros);
  }
  copies.resize(left);
}

// One bulk copy of a block that is under way arrives.
inline void land_bulk(Block& block, size_t index) {
  const PendingBulk copy = block.bulk[index];
  block.bulk.erase(block.bulk.begin() + index);
  Warp& warp = block.warps[0];
  u8* to = locate(warp, SHARED, copy.to, 0, 0, COPY);
  if (to == nullptr || copy.to + copy.bytes > block.shared.size() || locate(warp, GLOBAL, copy.from, 0, 0, READ) == nullptr ||
      locate(warp, GLOBAL, copy.from + copy.bytes - 1, 1, 0, READ) == nullptr)
    return warp.machine->fail(warp, "a bulk copy outside memory (issued earlier)");
  std::memcpy(to, reinterpret_cast<const u8*>(copy.from), copy.bytes);
  change_mbarrier(warp, copy.barrier, 0, [&](Mbarrier& barrier) { barrier.bytes -= copy.bytes; });
}

inline void memory_table(Table& table) {
  table["ld"] = load;
  table["st"] = store;
  atomics<u32>(table, "u32"), atomics<i32>(table, "s32"), atomics<u64>(table, "u64"), atomics<float>(table, "f32");
  atomics<u32>(table, "b32"), atomics<u64>(table, "b64"), atomics<i64>(table, "s64"), atomics<double>(table, "f64");
  // cvta: between a window and generic addresses; mode 1 is towards the window.
  SIM_HANDLER("cvta") {
    u64 *d = row_of<u64>(warp, in, 0), *a = row_of<u64>(warp, in, 1);
    const u64 window = in.space == SHARED ? SHARED_WINDOW : in.space == LOCAL ? LOCAL_WINDOW : 0;
    FOR_LANES(mask) d[lane] = in.mode == 1 ? (a[lane] >= window ? a[lane] - window : a[lane]) : (a[lane] < window ? a[lane] + window : a[lane]);
  };
  SIM_HANDLER("mbarrier.init") {
    FOR_LANES(mask) {
      u8* at = locate(warp, SHARED, address_of(warp, in, 0, lane), 8, lane, WRITE);
      if (at == nullptr) return;
      const u64 word = Mbarrier(row_of<u32>(warp, in, 2)[lane], 0).word();
      std::memcpy(at, &word, 8);
    }
  };
  SIM_HANDLER("mbarrier.arrive") {  // count: 1
    FOR_LANES(mask) {
      arrive(warp, address_of(warp, in, 0, lane));
      if (!change_mbarrier(warp, address_of(warp, in, 0, lane), lane, [](Mbarrier& b) { b.pending--; })) return;
    }
  };
  SIM_HANDLER("mbarrier.arrive.expect_tx") {
    FOR_LANES(mask) {
      arrive(warp, address_of(warp, in, 0, lane));
      const u32 bytes = row_of<u32>(warp, in, 2)[lane];
      if (!change_mbarrier(warp, address_of(warp, in, 0, lane), lane, [&](Mbarrier& b) { b.pending--, b.bytes += bytes; })) return;
    }
  };
  SIM_HANDLER("mbarrier.expect_tx") {
    FOR_LANES(mask) {
      const u32 bytes = row_of<u32>(warp, in, 2)[lane];
      if (!change_mbarrier(warp, address_of(warp, in, 0, lane), lane, [&](Mbarrier& b) { b.bytes += bytes; })) return;
    }
  };
  SIM_HANDLER("mbarrier.try_wait.parity") {  // operands: predicate, address (2), parity
    u32 found = 0;
    FOR_LANES(mask) {
      u64 phase = 0;
      if (!change_mbarrier(warp, address_of(warp, in, 1, lane), lane, [&](Mbarrier& b) { phase = b.phase; })) return;
      const bool has_ended = phase != (row_of<u32>(warp, in, 3)[lane] & 1);
      found |= u32(has_ended) << lane;
      if (has_ended && warp.block->races) warp.block->races->saw_phase(warp.number, place_of(address_of(warp, in, 1, lane)));
    }
    u32& d = predicate(warp, in, 0);
    d = (d & ~mask) | found;
    if (found != mask) warp.has_polled = true;
  };
  SIM_HANDLER("cp.async") {  // operands: to (2), from (2), bytes written, bytes read
    FOR_LANES(mask) {
      const u32 size = row_of<u32>(warp, in, 4)[lane], bytes = std::min(size, row_of<u32>(warp, in, 5)[lane]);
      const u64 to = address_of(warp, in, 0, lane), from = address_of(warp, in, 2, lane, false) + in.mode;
      if (to % size || (bytes && from % size)) return warp.machine->fail(warp, "a misaligned cp.async");
      if (locate(warp, SHARED, to, size, lane, COPY) == nullptr) return;
      if (warp.block->races) {
        const std::string wrong = warp.block->races->may_write(warp.number, to, size);
        if (!wrong.empty()) return warp.machine->fail(warp, wrong);
      }
      warp.copies.push_back({from, u32(to), bytes, size - bytes, lane, warp.copy_group[lane]});
    }
  };
  SIM_HANDLER("cp.async.commit_group") { FOR_LANES(mask) warp.copy_group[lane]++; };
  SIM_HANDLER("cp.async.wait_group") { finish_copies(warp, mask, int(in.immediate)); };
  SIM_HANDLER("cp.async.wait_all") {
    FOR_LANES(mask) warp.copy_group[lane]++;
    finish_copies(warp, mask, 0);
  };
  SIM_HANDLER("cp.async.mbarrier.arrive") {
    FOR_LANES(mask) warp.copy_group[lane]++;
    finish_copies(warp, mask, 0);
    FOR_LANES(mask) {
      arrive(warp, address_of(warp, in, 0, lane));
      if (!change_mbarrier(warp, address_of(warp, in, 0, lane), lane, [](Mbarrier& b) { b.pending--; })) return;
    }
  };
  SIM_HANDLER("cp.async.bulk") {  // operands: to (2), from (2), bytes, barrier (2)
    FOR_LANES(mask) {
      const u32 bytes = row_of<u32>(warp, in, 4)[lane];
      const u64 to = address_of(warp, in, 0, lane), from = address_of(warp, in, 2, lane, false) + in.mode;
      if (bytes % 16 || to % 16 || from % 16) return warp.machine->fail(warp, "a bulk copy that is not of whole 16 bytes");
      const u64 barrier = address_of(warp, in, 5, lane, false) + in.width;
      if (to + bytes > warp.block->shared.size()) return warp.machine->fail(warp, "a bulk copy outside shared memory");
      if (warp.block->races) {
        const std::string wrong = warp.block->races->copy(warp.number, to, bytes, place_of(barrier), warp.pc);
        if (!wrong.empty()) return warp.machine->fail(warp, wrong);
      }
      warp.block->bulk.push_back({from, u32(to), bytes, u32(barrier)});
    }
  };
  SIM_HANDLER("nothing") { (void)warp, (void)in, (void)mask; };
  SIM_HANDLER("poll") { (void)in, (void)mask, warp.has_polled = true; };
  SIM_HANDLER("trap") { if (mask) (void)in, warp.machine->fail(warp, "trap"); };
}

}  // namespace sim

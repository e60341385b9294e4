// The state of a simulated GPU while a kernel runs: blocks, warps, registers, memory. Knows no instruction.
//
// A register is a row of 32 lanes, 4 bytes each, or 8 for 64-bit registers; a predicate is a mask. Immediate operands are
// rows that never change. Global addresses are the host's own; shared and local memory have windows of their own among
// generic addresses.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <type_traits>
#include <string>
#include <vector>

namespace sim {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8_t = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

constexpr int LANES = 32;
constexpr u64 SHARED_WINDOW = 0x7e0000000000ull, LOCAL_WINDOW = 0x7d0000000000ull, WINDOW_BYTES = 1ull << 28;
constexpr u8 POISON = 0xff;  // what memory holds that nobody wrote: as floating-point numbers, NaN

enum Space { GENERIC, GLOBAL, SHARED, LOCAL, PARAM };

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, u32 mask);

// What an access does. COPY: the space is checked now, and what it means for others later.
enum Access { READ, WRITE, SYNCHRONISE, COPY };

// How the scheduler treats an instruction.
enum Flow { PLAIN, BRANCH, EXIT, TOGETHER, BARRIER, BARRIER_ARRIVE };

struct Instruction {
  Handler run;
  i32 flow, guard, is_guard_negated;  // guard: a predicate, or -1
  i32 first, count;                   // operands
  i32 space, vector, mode, width;     // of memory accesses; mode is the instruction's own
  i64 immediate;                      // address offset, branch target, table
};

struct Range {
  u64 begin, end;
};

struct Kernel {
  std::vector<Instruction> code;
  std::vector<std::string> text;
  std::vector<i32> operands;
  std::vector<u8> first_rows;  // registers as a warp begins with them: immediates
  i32 special_row = 0;         // tid, ntid, ctaid, nctaid (x, y, z each), laneid, warpid
  i32 num_predicates = 0;
  i32 shared_bytes = 0, local_bytes = 0;
};

// Lanes of a warp that are at the same instruction.
struct Group {
  i32 pc;
  u32 mask;
  bool is_waiting;  // for other lanes of the warp
  i32 barrier;      // of the block, that it waits at; -1: none
};

struct PendingCopy {  // cp.async of one lane
  u64 from;
  u32 to, bytes, zeros;
  i32 lane, group;
};

struct PendingBulk {  // cp.async.bulk into shared memory
  u64 from;
  u32 to, bytes, barrier;
};

struct Block;
struct Machine;
class Races;

struct Warp {
  Block* block;
  Machine* machine;
  std::vector<u8> rows;
  std::vector<u32> predicates;
  std::vector<u8> local;
  std::vector<Group> groups;
  std::vector<PendingCopy> copies;
  i32 copy_group[LANES] = {};
  u32 present = 0;        // lanes that exist
  bool has_polled = false;  // it looked at something that others change: let them run
  i32 pc = 0;             // of the instruction under way
  i32 number = 0;

  template <class T> T* row(i32 operand) { return reinterpret_cast<T*>(rows.data() + operand); }
};

struct Block {
  std::vector<u8> shared;
  std::vector<Warp> warps;
  std::deque<PendingBulk> bulk;
  i32 arrived[16] = {}, expected[16] = {};
  i32 live_threads = 0;
  std::shared_ptr<Races> races;  // null: they are not looked for
};

struct Machine {
  const Kernel* kernel = nullptr;
  std::vector<Range> ranges;  // global memory that may be touched; none: all
  std::vector<u8> parameters;
  std::string error;
  u64 random = 1;
  bool finds_races = false;

  u32 next_random() {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<u32>(random >> 33);
  }
  void fail(const Warp& warp, const std::string& message) {
    if (error.empty()) error = message + " at instruction " + std::to_string(warp.pc) + ": " + kernel->text[warp.pc];
  }
};

#define FOR_LANES(mask) for (int lane = 0; lane < LANES; lane++) if ((mask) >> lane & 1)

// Tells the finder of races of an access to shared memory; false after an error. Defined in memory.h.
inline bool note_access(Warp& warp, u64 address, u32 bytes, Access access);

// Where a lane's access of so many bytes lands; null after an error. Accesses must be aligned to their size.
inline u8* locate(Warp& warp, int space, u64 address, u32 bytes, int lane, Access access) {
  Machine& machine = *warp.machine;
  auto wrong = [&](const char* what) -> u8* {
    char text[160];
    std::snprintf(text, sizeof text, "%s of %u bytes at address 0x%llx, lane %d", what, bytes, (unsigned long long)address, lane);
    machine.fail(warp, text);
    return nullptr;
  };
  if (bytes && (bytes & (bytes - 1)) == 0 && address % bytes) return wrong("misaligned access");
  if (space == GENERIC) {
    if (address - SHARED_WINDOW < WINDOW_BYTES) space = SHARED, address -= SHARED_WINDOW;
    else if (address - LOCAL_WINDOW < WINDOW_BYTES) space = LOCAL, address -= LOCAL_WINDOW;
    else space = GLOBAL;
  } else if (space == SHARED && address >= SHARED_WINDOW) {
    address -= SHARED_WINDOW;
  } else if (space == LOCAL && address >= LOCAL_WINDOW) {
    address -= LOCAL_WINDOW;
  }
  if (space == SHARED) {
    std::vector<u8>& shared = warp.block->shared;
    if (address + bytes > shared.size()) return wrong("access outside shared memory");
    return access == COPY || !warp.block->races || note_access(warp, address, bytes, access) ? shared.data() + address : nullptr;
  }
  if (space == LOCAL) {
    const u64 size = machine.kernel->local_bytes;
    return address + bytes <= size ? warp.local.data() + lane * size + address : wrong("access outside local memory");
  }
  if (space == PARAM)
    return address + bytes <= machine.parameters.size() ? machine.parameters.data() + address : wrong("access outside parameters");
  if (!machine.ranges.empty()) {
    size_t low = 0, high = machine.ranges.size();
    while (low < high) {
      const size_t middle = (low + high) / 2;
      if (machine.ranges[middle].end <= address) low = middle + 1;
      else high = middle;
    }
    if (low == machine.ranges.size() || address < machine.ranges[low].begin || address + bytes > machine.ranges[low].end)
      return wrong("access outside global memory");
  }
  return reinterpret_cast<u8*>(address);
}

}  // namespace sim

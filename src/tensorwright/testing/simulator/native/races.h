// Finds races in shared memory: two warps touch the same bytes, one of them writes, and nothing between orders them.
//
// Vector clocks (Lamport, Mattern): every warp counts its own releases and knows the highest count of each other warp that
// it has waited for, and the last phase of each mbarrier that it has seen end. A bulk copy belongs to the phase that counts
// its bytes. Lanes of one warp are taken to be in order; global memory is not looked at.
#pragma once
#include <algorithm>
#include <unordered_map>

#include "machine.h"

namespace sim {

using Clock = std::vector<u32>;

inline void join(Clock& into, const Clock& other) {
  if (into.size() < other.size()) into.resize(other.size(), 0);
  for (size_t i = 0; i < other.size(); i++) into[i] = std::max(into[i], other[i]);
}

class Races {
 public:
  static constexpr u32 GRANULE = 2;  // bytes that are told apart

  Races(size_t shared_bytes, size_t warps) : warps_(warps), clocks_(warps, Clock(warps, 0)), words_(shared_bytes / GRANULE + 1), reads_(words_.size() * warps, 0) {
    for (size_t w = 0; w < warps; w++) clocks_[w][w] = 1;
  }

  // What is wrong with a warp's access, or nothing.
  std::string read(size_t warp, u64 address, u32 bytes, i32 pc) {
    for (u64 at = address / GRANULE; at < (address + bytes + GRANULE - 1) / GRANULE; at++) {
      if (!knows(warp, words_[at])) return conflict(warp, "reads", words_[at]);
      reads_[at * warps_ + warp] = clocks_[warp][warp];
      words_[at].reader_pc = pc;
    }
    return "";
  }
  std::string write(size_t warp, u64 address, u32 bytes, i32 pc) {
    std::string wrong = may_write(warp, address, bytes);
    for (u64 at = address / GRANULE; wrong.empty() && at < (address + bytes + GRANULE - 1) / GRANULE; at++)
      words_[at] = {u32(warp), clocks_[warp][warp], pc, words_[at].reader_pc};
    return wrong;
  }
  // A bulk copy that an mbarrier's current phase counts.
  std::string copy(size_t warp, u64 address, u32 bytes, u64 barrier, i32 pc) {
    std::string wrong = may_write(warp, address, bytes);
    const u32 index = u32(warps_ + index_of(barrier));
    for (u64 at = address / GRANULE; wrong.empty() && at < (address + bytes) / GRANULE; at++)
      words_[at] = {index, phases_[barrier] + 1, pc, words_[at].reader_pc};
    return wrong;
  }
  std::string may_write(size_t warp, u64 address, u32 bytes) {
    for (u64 at = address / GRANULE; at < (address + bytes + GRANULE - 1) / GRANULE; at++) {
      if (!knows(warp, words_[at])) return conflict(warp, "writes", words_[at]);
      for (size_t other = 0; other < warps_; other++)
        if (other != warp && reads_[at * warps_ + other] > clocks_[warp][other])
          return "a race: warp " + std::to_string(warp) + " writes what warp " + std::to_string(other) + " read at instruction " +
                 std::to_string(words_[at].reader_pc) + " or before, with nothing between";
    }
    return "";
  }

  // `place` names what warps meet at: a barrier's number, or an address above all numbers.
  void release(size_t warp, u64 place) {
    join(places_[place], clocks_[warp]);
    clocks_[warp][warp]++;
  }
  void acquire(size_t warp, u64 place) { join(clocks_[warp], places_[place]); }
  void phase_ended(u64 barrier) { phases_[barrier]++; }
  // After a wait for an mbarrier has succeeded.
  void saw_phase(size_t warp, u64 barrier) {
    acquire(warp, barrier);
    const size_t index = warps_ + index_of(barrier);
    if (clocks_[warp].size() <= index) clocks_[warp].resize(index + 1, 0);
    clocks_[warp][index] = std::max(clocks_[warp][index], phases_[barrier]);
  }

 private:
  struct Word {
    u32 writer = 0, clock = 0;  // a warp, or warps_ + an mbarrier
    i32 pc = -1, reader_pc = -1;
  };

  size_t index_of(u64 barrier) { return indexes_.emplace(barrier, indexes_.size()).first->second; }
  bool knows(size_t warp, const Word& word) const {
    if (word.clock == 0 || word.writer == warp) return true;
    return word.writer < clocks_[warp].size() && clocks_[warp][word.writer] >= word.clock;
  }
  std::string conflict(size_t warp, const char* what, const Word& word) const {
    const std::string by = word.writer < warps_ ? "warp " + std::to_string(word.writer) : "a bulk copy";
    return "a race: warp " + std::to_string(warp) + " " + what + " what " + by + " wrote at instruction " + std::to_string(word.pc) +
           ", with nothing between";
  }

  size_t warps_;
  std::vector<Clock> clocks_;
  std::vector<Word> words_;
  std::vector<u32> reads_;
  std::unordered_map<u64, Clock> places_;
  std::unordered_map<u64, u32> phases_;
  std::unordered_map<u64, size_t> indexes_;
};

}  // namespace sim

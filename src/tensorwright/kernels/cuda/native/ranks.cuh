// What ranks on several GPUs write into each other's memory, and how they wait for it. Knows no op.
//
// Each rank has a piece of memory that all others have mapped. Senders write into it and its owner reads it: a store over
// NVLink is on its way and forgotten, a load would wait for the way there and back. A number travels as a word of 8 bytes,
// (number, epoch), which has arrived when its epoch is that of this collective: no flag, no fence, and no order among words.
// Where there are many, they travel as they are: a row of 16-bit numbers, then a flag with its epoch.
//
// An epoch is the number of a collective since the start, the same on all ranks because they run the same plan. Even and odd
// epochs have words of their own. A rank may be ahead of another by one collective, never by two: it needs words of the one
// between, which the other sends after it has read those of the one before.
#pragma once
#include "numbers.cuh"

namespace tw {

constexpr int MAX_RANKS = 8;

struct Ranks {
  char* memory[MAX_RANKS];  // of each rank, as this one has it mapped; zero at first:
                            // words [2][ranks][capacity], flags [ranks][rows], parcels [2][ranks][parcel_bytes]
  u64 flags_at, parcels_at;  // in bytes
  u64 capacity, rows, parcel_bytes;
  volatile int* host;  // [0]: another rank has ended, says the host; [1]: this one has given up waiting
  u64 timeout_ns;
  int rank, ranks;
  u32 epoch;  // of the last collective that has ended
};

__device__ inline u64 nanoseconds() {
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// A wait that ends: after the timeout, or when the host says that another rank has ended. What was waited for is then void,
// and so is everything after it; the host finds out at the end of the step.
struct Patience {
  const Ranks* ranks;
  u64 since = 0;
  u32 polls = 0;

  __device__ bool is_over() {
    if (++polls % 4096) return false;
    const u64 now = nanoseconds();
    if (since == 0) since = now;
    if (now - since < ranks->timeout_ns && !ranks->host[0] && !ranks->host[1]) return false;
    ranks->host[1] = 1;
    return true;
  }
};

// A collective: the `number`th of an op or a stretch, which count_collectives ends.
struct Collective {
  const Ranks* ranks;
  u32 epoch;
  int rank, size;
  size_t half;

  __device__ Collective(const Ranks* ranks, int number)
      : ranks(ranks), epoch(*const_cast<const volatile u32*>(&ranks->epoch) + number), rank(ranks->rank), size(ranks->ranks),
        half((epoch & 1) * (size_t)ranks->ranks) {}

  // Where `at` keeps what comes from `from`.
  __device__ u64* words(int at, int from) const { return reinterpret_cast<u64*>(ranks->memory[at]) + (half + from) * ranks->capacity; }
  __device__ u32* flags(int at, int from) const { return reinterpret_cast<u32*>(ranks->memory[at] + ranks->flags_at) + from * ranks->rows; }
  template <class Type> __device__ Type* parcels(int at, int from) const {
    return reinterpret_cast<Type*>(ranks->memory[at] + ranks->parcels_at + (half + from) * ranks->parcel_bytes);
  }

  __device__ u64 word_of(float value) const {
    u64 word;
    asm("mov.b64 %0, {%1, %2};" : "=l"(word) : "r"(__float_as_uint(value)), "r"(epoch));
    return word;
  }
  __device__ bool has_arrived(u64 word) const { return (u32)(word >> 32) == epoch; }

  // Word `index` of this rank, to all others.
  __device__ void send(size_t index, float value) const {
    for (int to = 0; to < size; to++)
      if (to != rank) asm volatile("st.volatile.global.u64 [%0], %1;" ::"l"(words(to, rank) + index), "l"(word_of(value)) : "memory");
  }
  // Words 2 * index and 2 * index + 1.
  __device__ void send(size_t index, float2 values) const {
    for (int to = 0; to < size; to++)
      if (to != rank)
        asm volatile("st.volatile.global.v2.u64 [%0], {%1, %2};"
                     ::"l"(words(to, rank) + 2 * index), "l"(word_of(values.x)), "l"(word_of(values.y)) : "memory");
  }
  __device__ float receive(int from, size_t index) const {
    Patience patience{ranks};
    u64 word;
    do asm volatile("ld.volatile.global.u64 %0, [%1];" : "=l"(word) : "l"(words(rank, from) + index) : "memory");
    while (!has_arrived(word) && !patience.is_over());
    return __uint_as_float((u32)word);
  }
  __device__ float2 receive_pair(int from, size_t index) const {
    Patience patience{ranks};
    u64 first, second;
    do asm volatile("ld.volatile.global.v2.u64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(words(rank, from) + 2 * index) : "memory");
    while ((!has_arrived(first) || !has_arrived(second)) && !patience.is_over());
    return make_float2(__uint_as_float((u32)first), __uint_as_float((u32)second));
  }

  // After a barrier among the threads that have written row `row` of the parcels: they are complete at all others.
  __device__ void send_flag(size_t row) const {
    for (int to = 0; to < size; to++)
      if (to != rank) asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flags(to, rank) + row), "r"(epoch) : "memory");
  }
  // Before a barrier among the threads that will read it.
  __device__ void await_flag(int from, size_t row) const {
    Patience patience{ranks};
    u32 arrived;
    do asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(arrived) : "l"(flags(rank, from) + row) : "memory");
    while (arrived - epoch > 1 && !patience.is_over());  // the sender may be one ahead
  }

  // Over all ranks, `mine` being this one's, in rank order: the same bits everywhere. It was sent before.
  __device__ float sum(size_t index, float mine) const {
    float total = rank == 0 ? mine : receive(0, index);
    for (int from = 1; from < size; from++) total += from == rank ? mine : receive(from, index);
    return total;
  }
  __device__ float2 sum(size_t index, float2 mine) const {
    float2 total = rank == 0 ? mine : receive_pair(0, index);
    for (int from = 1; from < size; from++) {
      const float2 other = from == rank ? mine : receive_pair(from, index);
      total.x += other.x, total.y += other.y;
    }
    return total;
  }
};

}  // namespace tw

// Sums and gathers over the ranks of one engine. On one host through shared memory, between hosts through MPI functions
// whose addresses runtime/communicator.py hands in. It knows no launcher.
//
// Shared memory: one line per rank with the number of its last finished part, then slots [2][ranks][slot_floats]. Parts
// alternate between the two halves: a rank that writes part i + 2 knows that all have read part i, for all have since
// announced part i + 1.
#pragma once
#include "numbers.h"
#include "pool.h"

// Mirrored by runtime/communicator.py.
struct tw_comm {
  int32_t rank, size;
  int32_t failed;    // set when a rank did not arrive in time; the results since are void
  int32_t sequence;  // parts so far, the same on every rank
  double timeout_s;
  char* shared;      // null: MPI
  int64_t slot_floats;
  int (*mpi_all_reduce)(const void*, void*, int, intptr_t, intptr_t, intptr_t);
  int (*mpi_all_gather)(const void*, int, intptr_t, void*, int, intptr_t, intptr_t);
  intptr_t mpi_float, mpi_sum, mpi_comm;  // handles; ABIs with int handles read the low half
};

namespace tw {

constexpr int COMM_LINE = 128;

struct comm_line {
  int32_t arrived;
  int32_t sleepers;  // ranks asleep until this one arrives
};

TW_INLINE comm_line* line_of(tw_comm* comm, int rank) { return (comm_line*)(comm->shared + rank * COMM_LINE); }

TW_INLINE float* slot_of(tw_comm* comm, int32_t part, int rank) {
  float* slots = (float*)(comm->shared + (int64_t)comm->size * COMM_LINE);
  return slots + ((part & 1) * (int64_t)comm->size + rank) * comm->slot_floats;
}

// Futexes between processes: not the private kind.
inline bool wait_arrival(comm_line* line, int32_t part, double timeout_s) {
  for (int i = 0; i < 2000; ++i) {
    if ((int32_t)((uint32_t)__atomic_load_n(&line->arrived, __ATOMIC_ACQUIRE) - (uint32_t)part) >= 0) return true;
    spin(i);
  }
  const double end = now_s() + timeout_s;
  bool there = false;
  __atomic_add_fetch(&line->sleepers, 1, __ATOMIC_SEQ_CST);
  for (;;) {
    const int32_t seen = __atomic_load_n(&line->arrived, __ATOMIC_SEQ_CST);
    there = (int32_t)((uint32_t)seen - (uint32_t)part) >= 0;
    if (there || now_s() > end) break;
    const timespec nap{0, 50 * 1000 * 1000};
    syscall(SYS_futex, &line->arrived, FUTEX_WAIT, seen, &nap, nullptr, 0);
  }
  __atomic_sub_fetch(&line->sleepers, 1, __ATOMIC_SEQ_CST);
  return there;
}

// Worker 0 says that this rank's part is in its slot, and waits for the parts of all.
inline void meet(tw_comm* comm, int32_t part) {
  comm_line* own = line_of(comm, comm->rank);
  __atomic_store_n(&own->arrived, part, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&own->sleepers, __ATOMIC_SEQ_CST))
    syscall(SYS_futex, &own->arrived, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
  for (int rank = 0; rank < comm->size && !comm->failed; ++rank)
    if (rank != comm->rank && !wait_arrival(line_of(comm, rank), part, comm->timeout_s)) comm->failed = 1;
}

// Passes x [count] through the slots in parts; finish(part, begin, end, first) reads what all ranks gave for numbers
// [begin, end) of x, where the slot's number 0 is x's number `first`. All workers call it.
template <class Finish>
TW_INLINE void exchange(tw_comm* comm, const float* x, int64_t count, const tw_worker* worker, Finish&& finish) {
  int32_t part = comm->sequence;
  for (int64_t first = 0; first < count; first += comm->slot_floats) {
    const int64_t size = count - first < comm->slot_floats ? count - first : comm->slot_floats;
    part = (int32_t)((uint32_t)part + 1);
    int64_t begin, end;
    share(size, 64, worker, &begin, &end);
    memcpy(slot_of(comm, part, comm->rank) + begin, x + first + begin, (size_t)(end - begin) * sizeof(float));
    tw_barrier(worker);
    if (worker->rank == 0) meet(comm, part);
    tw_barrier(worker);
    if (!comm->failed) finish(part, first + begin, first + end, first);
  }
  tw_barrier(worker);
  if (worker->rank == 0) comm->sequence = part;
}

// buffers x, y [rows, COLUMNS]. Adds in rank order: every rank gets the same bits.
template <int COLUMNS>
struct all_reduce {
  static void run(const tw_step* step, const tw_run* run, const tw_worker* worker) {
    const float* x = (const float*)step->buffers[0];
    float* y = (float*)step->buffers[1];
    tw_comm* comm = run->comm;
    const int64_t count = (int64_t)tw_rows(step, run) * COLUMNS;
    if (comm && !comm->shared) {
      if (worker->rank) return;
      if (x == y) x = (const float*)memcpy(run->scratch, x, (size_t)count * sizeof(float));
      if (comm->mpi_all_reduce(x, y, (int)count, comm->mpi_float, comm->mpi_sum, comm->mpi_comm)) comm->failed = 1;
      return;
    }
    if (!comm) {
      if (worker->rank == 0 && x != y) memcpy(y, x, (size_t)count * sizeof(float));
      return;
    }
    exchange(comm, x, count, worker, [=](int32_t part, int64_t begin, int64_t end, int64_t first) {
      memcpy(y + begin, slot_of(comm, part, 0) + begin - first, (size_t)(end - begin) * sizeof(float));
      for (int rank = 1; rank < comm->size; ++rank) {
        const float* from = slot_of(comm, part, rank) - first;
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) y[i] += from[i];
      }
    });
  }
};

// buffers x [rows, COLUMNS], y [rows, ranks * COLUMNS]: columns side by side in rank order.
template <int COLUMNS>
struct all_gather {
  // Numbers [begin, end) of one rank's x go to their places in y.
  static void place(const float* from, float* y, int rank, int size, int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / COLUMNS, column = begin % COLUMNS;
      const int64_t count = COLUMNS - column < end - begin ? COLUMNS - column : end - begin;
      memcpy(y + (row * size + rank) * COLUMNS + column, from + begin, (size_t)count * sizeof(float));
      begin += count;
    }
  }

  static void run(const tw_step* step, const tw_run* run, const tw_worker* worker) {
    const float* x = (const float*)step->buffers[0];
    float* y = (float*)step->buffers[1];
    tw_comm* comm = run->comm;
    const int64_t count = (int64_t)tw_rows(step, run) * COLUMNS;
    if (comm && !comm->shared) {
      if (worker->rank) return;
      float* all = (float*)run->scratch;
      const intptr_t number = comm->mpi_float;
      if (comm->mpi_all_gather(x, (int)count, number, all, (int)count, number, comm->mpi_comm)) comm->failed = 1;
      for (int rank = 0; rank < comm->size; ++rank) place(all + rank * count, y, rank, comm->size, 0, count);
      return;
    }
    if (!comm) {
      if (worker->rank == 0 && x != y) memcpy(y, x, (size_t)count * sizeof(float));
      return;
    }
    exchange(comm, x, count, worker, [=](int32_t part, int64_t begin, int64_t end, int64_t first) {
      for (int rank = 0; rank < comm->size; ++rank)
        place(slot_of(comm, part, rank) - first, y, rank, comm->size, begin, end);
    });
  }
};

}  // namespace tw

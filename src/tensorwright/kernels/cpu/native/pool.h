// The team of threads that runs a plan: creation, a barrier that survives lost CPUs, and shared counters.
// It knows no kernel. Waiting spins for some microseconds, then sleeps in a futex, so that an idle team costs nothing
// and an oversubscribed machine gets slower instead of standing still.
#pragma once
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "abi.h"

#define TW_EXPORT __attribute__((visibility("default")))
#define TW_LINE 64

// One pool serves every engine of a process: its layout belongs to the ABI version.
struct tw_team {
  int32_t abi_version;
  int32_t size;
  int32_t spins;  // rounds before sleeping
  int32_t stopping;
  void (*function)(void* argument, const tw_worker* worker);
  void* argument;
  pthread_mutex_t lock;  // one job at a time, whichever of the process's threads asks
  pthread_t* threads;   // [size - 1]
  tw_worker* workers;   // [size]
  void** memory;        // [size] grown by tw_worker_memory
  size_t* memory_bytes;
  alignas(TW_LINE) int32_t job;      // raised for each new job
  alignas(TW_LINE) int32_t phase;    // raised by the last worker to arrive
  alignas(TW_LINE) int32_t arrived;
  alignas(TW_LINE) int32_t counter;  // of tw_take
  alignas(TW_LINE) int32_t sleepers;
};
typedef struct tw_team tw_pool;

namespace tw {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One round of waiting awake. Every few rounds the core is offered: the thread waited for may be queued on this very
// core, which on a busy machine is the usual case (a decode step took 1.6 times as long without this).
inline void spin(int32_t round) {
  relax();
  if (round % 64 == 63) sched_yield();
}

inline void futex(int32_t* word, int operation, int32_t value) {
  syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

// Returns when *word is no longer `old`.
inline void wait_change(tw_team* team, int32_t* word, int32_t old) {
  for (int32_t i = 0; i < team->spins; ++i) {
    if (__atomic_load_n(word, __ATOMIC_ACQUIRE) != old) return;
    spin(i);
  }
  // Counting sleepers before the kernel looks at the word again closes the race with `raise`.
  __atomic_add_fetch(&team->sleepers, 1, __ATOMIC_SEQ_CST);
  while (__atomic_load_n(word, __ATOMIC_SEQ_CST) == old) futex(word, FUTEX_WAIT, old);
  __atomic_sub_fetch(&team->sleepers, 1, __ATOMIC_SEQ_CST);
}

inline void raise(tw_team* team, int32_t* word) {
  __atomic_store_n(word, static_cast<int32_t>(static_cast<uint32_t>(*word) + 1), __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&team->sleepers, __ATOMIC_SEQ_CST)) futex(word, FUTEX_WAKE, INT32_MAX);
}

// [begin, end) of `count` items for this worker, cut at multiples of `grain`.
inline void share(int64_t count, int64_t grain, const tw_worker* worker, int64_t* begin, int64_t* end) {
  const int64_t grains = (count + grain - 1) / grain;
  *begin = grains * worker->rank / worker->size * grain;
  *end = grains * (worker->rank + 1) / worker->size * grain;
  if (*begin > count) *begin = count;
  if (*end > count) *end = count;
}

}  // namespace tw

// Every worker of the team must arrive. The counter of tw_take is 0 afterwards.
static inline void tw_barrier(const tw_worker* worker) {
  tw_team* team = worker->team;
  if (team->size == 1) {
    team->counter = 0;
    return;
  }
  const int32_t phase = __atomic_load_n(&team->phase, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL) == team->size) {
    team->arrived = 0;
    team->counter = 0;
    tw::raise(team, &team->phase);
  } else {
    tw::wait_change(team, &team->phase, phase);
  }
}

// The next of the items 0, 1, 2, ... since the last barrier: each goes to one worker. Suits work of uneven cost.
static inline int32_t tw_take(const tw_worker* worker) {
  return __atomic_fetch_add(&worker->team->counter, 1, __ATOMIC_RELAXED);
}

// Memory of this worker alone, kept until the pool ends; earlier contents are lost when it grows. Null: none left.
static inline void* tw_worker_memory(const tw_worker* worker, size_t bytes) {
  tw_team* team = worker->team;
  const int32_t rank = worker->rank;
  if (team->memory_bytes[rank] < bytes) {
    free(team->memory[rank]);
    team->memory[rank] = aligned_alloc(TW_LINE, (bytes + TW_LINE - 1) / TW_LINE * TW_LINE);
    team->memory_bytes[rank] = team->memory[rank] ? bytes : 0;
  }
  return team->memory[rank];
}

namespace tw {

inline void* worker_loop(void* argument) {
  const tw_worker* worker = static_cast<const tw_worker*>(argument);
  tw_team* team = worker->team;
  for (uint32_t job = 0;; ++job) {
    wait_change(team, &team->job, static_cast<int32_t>(job));
    if (team->stopping) return nullptr;
    team->function(team->argument, worker);
    tw_barrier(worker);
  }
}

// Runs function(argument, worker) on every worker; the caller is worker 0.
inline void run_job(tw_team* team, void (*function)(void*, const tw_worker*), void* argument) {
  pthread_mutex_lock(&team->lock);
  team->function = function;
  team->argument = argument;
  raise(team, &team->job);
  function(argument, &team->workers[0]);
  tw_barrier(&team->workers[0]);
  pthread_mutex_unlock(&team->lock);
}

inline int32_t usable_cpus() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

inline void pool_destroy(tw_pool* pool) {
  pool->stopping = 1;
  raise(pool, &pool->job);
  for (int32_t i = 1; i < pool->size; ++i) pthread_join(pool->threads[i - 1], nullptr);
  for (int32_t i = 0; pool->memory && i < pool->size; ++i) free(pool->memory[i]);
  free(pool->threads);
  free(pool->workers);
  free(pool->memory);
  free(pool->memory_bytes);
  free(pool);
}

inline tw_pool* pool_create(int32_t size) {
  if (size < 1) return nullptr;
  tw_pool* pool = static_cast<tw_pool*>(aligned_alloc(TW_LINE, sizeof(tw_pool)));
  if (!pool) return nullptr;
  memset(pool, 0, sizeof *pool);
  pool->abi_version = TW_ABI_VERSION;
  pthread_mutex_init(&pool->lock, nullptr);
  pool->spins = size <= usable_cpus() ? 2000 : 0;  // about 40 us where a pause takes 20 ns
  pool->threads = static_cast<pthread_t*>(calloc(size, sizeof(pthread_t)));
  pool->workers = static_cast<tw_worker*>(calloc(size, sizeof(tw_worker)));
  pool->memory = static_cast<void**>(calloc(size, sizeof(void*)));
  pool->memory_bytes = static_cast<size_t*>(calloc(size, sizeof(size_t)));
  pool->size = 1;
  bool good = pool->threads && pool->workers && pool->memory && pool->memory_bytes;
  for (int32_t i = 0; good && i < size; ++i) pool->workers[i] = tw_worker{i, size, pool};
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 8 << 20);  // kernels keep tiles on the stack
  for (int32_t i = 1; good && i < size; ++i) {
    good = pthread_create(&pool->threads[i - 1], &attributes, worker_loop, &pool->workers[i]) == 0;
    if (good) pool->size = i + 1;
  }
  pthread_attr_destroy(&attributes);
  if (good) return pool;
  pool_destroy(pool);
  return nullptr;
}

struct plan {
  const tw_step* steps;
  int32_t count;
  const tw_run* run;
  double* seconds;
};

inline double now_s() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

inline void run_plan(void* argument, const tw_worker* worker) {
  const plan* work = static_cast<const plan*>(argument);
  for (int32_t i = 0; i < work->count; ++i) {
    const bool timed = work->seconds && worker->rank == 0;
    const double start = timed ? now_s() : 0;
    work->steps[i].kernel(&work->steps[i], work->run, worker);
    tw_barrier(worker);
    if (timed) work->seconds[i] += now_s() - start;
  }
}

}  // namespace tw

// The binary interface between a CPU engine's shared object and the runtime. Version: TW_ABI_VERSION.
// Mirrored by kernels/cpu/abi.py with ctypes; change both together and raise the version.
#pragma once
#include <stdint.h>

#define TW_ABI_VERSION 1

// One forward step over a flat token axis. All arrays belong to the caller.
struct tw_run {
  int32_t num_tokens;      // T
  int32_t num_sequences;   // S
  int32_t num_outputs;     // R
  int32_t table_width;     // columns of block_tables
  const int32_t* token_ids;      // [T]
  const int32_t* positions;      // [T]
  const int32_t* slots;          // [T]
  const int32_t* query_starts;   // [S]
  const int32_t* query_lengths;  // [S]
  const int32_t* kv_lengths;     // [S]
  const int32_t* block_tables;   // [S, table_width]
  const int32_t* output_rows;    // [R]
  void* scratch;                 // shared by all workers, 64-byte aligned, at least the plan's scratch bytes
  struct tw_comm* comm;          // null when there is one rank
};

// A worker of the team that runs a step. All workers call every kernel; they share work by rank and may meet at
// tw_barrier (pool.h), the same number of times each.
struct tw_worker {
  int32_t rank;
  int32_t size;
  struct tw_team* team;
};

struct tw_step;
typedef void (*tw_kernel)(const struct tw_step*, const struct tw_run*, const struct tw_worker*);

// One op of the plan. `buffers`: activations and caches in the op's order, inputs then outputs, where the batch's own
// inputs (token_ids ... output_rows) are left out since tw_run has them, and an output that is also an input (a cache)
// appears once. `weights`: in the order of the op's specification, null where absent. `rows` says which symbol the
// op's rows are: 0 tokens, 1 outputs.
struct tw_step {
  tw_kernel kernel;
  void* const* buffers;
  const void* const* weights;
  int32_t rows;
  int32_t reserved;
};

static inline int32_t tw_rows(const struct tw_step* step, const struct tw_run* run) {
  return step->rows ? run->num_outputs : run->num_tokens;
}

// How one row of logits becomes a token (runtime/sampling.py is the reference).
struct tw_sampling {
  float temperature;           // 0: greedy
  float top_p;                 // >= 1: off
  float min_p;                 // 0: off
  int32_t top_k;               // 0: off
  float repetition_penalty;    // 1: off; every listed token: logit > 0 ? logit / p : logit * p
  float presence_penalty;      // subtracted once from tokens with count > 0
  float frequency_penalty;     // times count, subtracted
  float uniform;               // random number in [0, 1)
  int32_t num_seen;            // tokens of prompt and output, each once
  int32_t num_biased;
  const int32_t* seen;         // [num_seen] token ids
  const int32_t* counts;       // [num_seen] times generated (0: in the prompt only)
  const int32_t* biased;       // [num_biased] token ids
  const float* biases;         // [num_biased] added to their logits; -inf forbids
};

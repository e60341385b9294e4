// What every engine's shared object exports besides its kernels.
#pragma once
#include "arithmetic.h"
#include "bandwidth.h"
#include "pool.h"
#include "sample.h"

extern "C" {

TW_EXPORT int32_t tw_abi_version(void) { return TW_ABI_VERSION; }

// A pool of `threads` workers, the caller counted; null when the system gives no more threads.
TW_EXPORT tw_pool* tw_pool_create(int32_t threads) { return tw::pool_create(threads); }

TW_EXPORT void tw_pool_destroy(tw_pool* pool) { tw::pool_destroy(pool); }

// Runs the steps in order. `seconds` may be null; else each step's time is added to its entry.
TW_EXPORT void tw_execute(tw_pool* pool, const tw_step* steps, int32_t count, const tw_run* run, double* seconds) {
  tw::plan plan{steps, count, run, seconds};
  tw::run_job(pool, tw::run_plan, &plan);
}

// A token and its log probability under the unchanged logits for each row of logits [rows, vocab].
TW_EXPORT void tw_sample(tw_pool* pool, const float* logits, int32_t rows, int32_t vocab, const tw_sampling* requests,
                         int32_t* tokens, float* log_probs) {
  tw::sampling_job job{logits, rows, vocab, requests, tokens, log_probs};
  tw::run_job(pool, tw::sample_rows, &job);
}

// Every worker reads its share of `bytes` from `from` on.
TW_EXPORT void tw_read(tw_pool* pool, const void* from, int64_t bytes) {
  tw::reading_job job{static_cast<const uint8_t*>(from), bytes};
  tw::run_job(pool, tw::read_memory, &job);
}

// Every worker multiplies and adds: weights of 4 or 8 bits by int8, 16 bits by 16, or float32 (bits 32). Their operations.
// Newer than version 1's first engines; nothing that runs an engine asks for it.
TW_EXPORT int64_t tw_compute(tw_pool* pool, int32_t bits, int64_t rounds) {
  tw::arithmetic_job job{bits, rounds};
  tw::run_job(pool, tw::compute, &job);
  return rounds * tw::operations_of_round(bits, pool->size);
}

}

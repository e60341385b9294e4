// Asynchronous copies into shared memory, and the edges between kernels. Knows no weight format.
//
// sm_90 and later: one lane asks the copy engine for a whole stage (cp.async.bulk) and the barrier counts bytes.
// sm_80 to sm_89: the 32 lanes copy 16 bytes each (cp.async) and the barrier counts lanes. Waiting is the same.
#pragma once
#include "tensor_core.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define TW_BULK_COPY 1
#else
#define TW_BULK_COPY 0
#endif

namespace tw {

__device__ inline u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// What was launched before this kernel has finished, and its writes are visible.
__device__ inline void wait_for_previous_kernel() {
#if TW_BULK_COPY
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may start where there is room: it reads weights only until its own wait.
__device__ inline void launch_next_kernel() {
#if TW_BULK_COPY
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

constexpr int LANES = 32;

// A barrier that completes once per filled stage.
__device__ inline void barrier_init(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ inline void barrier_init_for_copy(u64* barrier) { barrier_init(barrier, TW_BULK_COPY ? 1 : LANES); }

// Makes initialised barriers visible to the copy engine; a barrier among the threads must follow.
__device__ inline void barriers_ready() {
#if TW_BULK_COPY
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ inline void barrier_arrive(u64* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void barrier_wait(u64* barrier, u32 parity) {
  u32 done;
  do {
#if TW_BULK_COPY
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#endif
  } while (!done);
}

// Weights are read once a step: they should leave the L2 first.
__device__ inline u64 evict_first_policy() {
  u64 policy = 0;
#if TW_BULK_COPY
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

// Called by a whole warp: `bytes` (a multiple of 16) from global to shared memory, then `barrier` completes.
template <bool STREAMED>
__device__ inline void copy_async(void* to, const void* from, u32 bytes, u64* barrier, int lane, u64 policy) {
#if TW_BULK_COPY
  if (lane == 0) {
    u32 address = shared_address(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
    if (STREAMED)
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                   ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(address), "l"(policy) : "memory");
    else
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                   ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(address) : "memory");
  }
#else
  for (u32 i = lane * 16; i < bytes; i += LANES * 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to) + i),
                 "l"(static_cast<const char*>(from) + i) : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// A position in a ring of stages: the stage's index, and the parity its barrier shows when it is filled.
template <int STAGES> struct RingPosition {
  int stage = 0;
  u32 parity = 0;
  __device__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace tw

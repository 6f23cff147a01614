// One wrapper for each PTX instruction of asynchronous copies by threads, which sm_80 and later
// have.
#pragma once

#include <cstdint>

namespace qoq::ptx {

// Copies 16 bytes into shared memory. The copy belongs to the group that the thread commits next.
//
// There is none with an L2 cache policy, since ptxas before CUDA 13.4 may leave out the
// instruction that makes the policy (IST-DASLab/marlin#44): the copy is then an illegal one.
__device__ inline void cp_async_16(uint32_t destination, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source)
               : "memory");
}

// The same where `is_there`; otherwise writes zeros and reads nothing, whatever the source is.
__device__ inline void cp_async_16_or_zeros(uint32_t destination, const void* source,
                                            bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "r"(is_there ? 16 : 0)
               : "memory");
}

__device__ inline void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the latest kPending groups of this thread have arrived.
template <int kPending>
__device__ inline void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Waits until all copies that this thread has begun have arrived.
__device__ inline void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Arrives at a barrier, which counts on it, when all copies that this thread has begun have
// arrived.
__device__ inline void cp_async_mbarrier_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

}  // namespace qoq::ptx

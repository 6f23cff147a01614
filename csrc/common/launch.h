// Launches a kernel so that it begins before the one ahead of it in the stream has ended.
#pragma once

#include <cuda_runtime.h>

#include <mutex>

#include "common/card.h"
#include "common/checks.h"
#include "common/target.h"

namespace qoq {

// Whether the code of a kernel that the current device runs waits for the kernel ahead of it. Code
// for less than sm_90 does not, whatever the device could do: PTX of sm_80 on a newer card is such
// code, and to launch it early would be a race.
template <auto* kKernel>
bool waits_for_previous() {
  int device = 0;
  CHECK_CUDA(cudaGetDevice(&device));
  static std::once_flag is_made[kMaxDevices];
  static bool waits[kMaxDevices];
  std::call_once(is_made[device], [&] {
    cudaFuncAttributes attributes;
    CHECK_CUDA(cudaFuncGetAttributes(&attributes, kKernel));
    waits[device] = has_copy_engine(attributes.ptxVersion);
  });
  return waits[device];
}

template <auto* kKernel, class... Arguments>
void launch_early(int blocks, int threads, int shared_bytes, cudaStream_t stream,
                  const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = waits_for_previous<kKernel>() ? 1 : 0;
  CHECK_CUDA(cudaLaunchKernelEx(&config, kKernel, arguments...));
}

}  // namespace qoq

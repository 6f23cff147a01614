// For which architectures the library was built, and what a failed call says where the GPU is none
// of them.
#pragma once

#include <cuda_runtime.h>

#include <string>

namespace qoq {

// What a CUDA call failed with, for a message.
std::string error_text(cudaError_t error);

}  // namespace qoq

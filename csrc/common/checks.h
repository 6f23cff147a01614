// What all host code shares: the current stream, checked CUDA calls and checks of tensors.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "common/built_for.h"

#define CHECK_CUDA(call)                                                          \
  do {                                                                            \
    const cudaError_t error_ = (call);                                            \
    STD_TORCH_CHECK(error_ == cudaSuccess, #call, ": ", qoq::error_text(error_)); \
  } while (0)

namespace qoq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int device_of(const Tensor& tensor) {
  int32_t index = -1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
  return index;
}

// The one place that asks torch for its stream: torch 2.13 has a cleaner way.
inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i)
    text += (i == 0 ? "" : ", ") + std::to_string(tensor.size(i));
  return text + "]";
}

// Refuses all but a contiguous CUDA tensor on `device` of this type and shape that begins at a
// multiple of `alignment` bytes: 16 for what kernels read in vectors.
inline void check_tensor(const char* op, const char* name, const Tensor& tensor, int device,
                         ScalarType type, std::initializer_list<int64_t> shape,
                         int alignment = 16) {
  bool is_right = tensor.scalar_type() == type &&
                  tensor.dim() == static_cast<int64_t>(shape.size()) && tensor.is_contiguous();
  int64_t i = 0;
  std::string expected;
  for (const int64_t size : shape) {
    is_right = is_right && tensor.size(i) == size;
    expected += (i++ == 0 ? "" : ", ") + std::to_string(size);
  }
  STD_TORCH_CHECK(is_right, op, ": ", name, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), " ", shape_text(tensor),
                  tensor.is_contiguous() ? "" : " (not contiguous)", ", expected ",
                  torch::headeronly::toString(type), " [", expected, "]");
  STD_TORCH_CHECK(tensor.is_cuda() && device_of(tensor) == device, op, ": ", name,
                  " is not on CUDA device ", device, ", where x is");
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(tensor.data_ptr()) % alignment == 0 || tensor.numel() == 0, op,
      ": ", name, " does not begin at a multiple of ", alignment, " bytes; clone it");
}

}  // namespace qoq

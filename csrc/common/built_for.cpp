// The record of the architectures. setup.py defines QOQ_BUILT_FOR as their names, as in
// sm_80:compute_80. A comma would be nvcc's.
#include "common/built_for.h"

#define QOQ_TEXT_OF(x) #x
#define QOQ_TEXT(x) QOQ_TEXT_OF(x)
// vllm_qoq/kernel_library.py finds it in the file.
#define QOQ_RECORD "qoq kernels are for "

namespace qoq {
namespace {

[[gnu::used]] constexpr char kRecord[] = QOQ_RECORD QOQ_TEXT(QOQ_BUILT_FOR);

// The same command as in vllm_qoq/kernel_library.py.
constexpr const char* kBuild =
    "VLLM_QOQ_CUDA=1 pip install --no-build-isolation --no-deps --force-reinstall .";

std::string codes() {
  std::string text;
  for (const char* c = kRecord + sizeof(QOQ_RECORD) - 1; *c != 0; ++c)
    *c == ':' ? text += ", " : text += *c;
  return text;
}

// Whether vllm_qoq/cards.py has a family for a GPU. Any other runs the PTX of a build for all.
bool has_family(int major, int minor) {
  return major == 8 || (major == 9 && minor == 0) || (major == 10 && minor < 4) ||
         (major == 12 && minor < 2);
}

std::string this_gpu_and_remedy() {
  int device = 0;
  cudaDeviceProp properties;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaGetDeviceProperties(&properties, device) != cudaSuccess)
    return "";
  const std::string capability =
      std::to_string(properties.major) + "." + std::to_string(properties.minor);
  return std::string("; ") + properties.name + " has compute capability " + capability +
         "; build them for it in a clone, with nvcc: VLLM_QOQ_CUDA_ARCHS=" +
         (has_family(properties.major, properties.minor) ? capability : "all") + " " + kBuild;
}

}  // namespace

std::string error_text(cudaError_t error) {
  std::string text = cudaGetErrorString(error);
  // The latter: the driver is older than the PTX, which it has to compile.
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion)
    text +=
        ": the CUDA kernels of this installation are built for " + codes() + this_gpu_and_remedy();
  return text;
}

}  // namespace qoq

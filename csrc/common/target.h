// What the code of a kernel may use, from the architecture that it was compiled for.
#pragma once

namespace qoq {

// Whether code for an architecture, as in sm_90, has the copy engine, its barriers, and the
// instructions of programmatic dependent launch. A build for tests (VLLM_QOQ_PORTABLE in setup.py)
// does on every GPU as code for sm_80 does.
constexpr bool has_copy_engine([[maybe_unused]] int architecture) {
#ifdef QOQ_PORTABLE
  return false;
#else
  return architecture >= 90;
#endif
}

// The architecture that is being compiled for; 0 in the host's part.
#ifdef __CUDA_ARCH__
inline constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#else
inline constexpr int kArchitecture = 0;
#endif

}  // namespace qoq

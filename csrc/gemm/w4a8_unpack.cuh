// From packed weights to the register operand of wgmma and mma, which have the same.
#pragma once

#include "common/ptx.cuh"
#include "gemm/w4a8_config.h"

namespace qoq::w4a8 {

// Reads kCount neighbouring words, 1, 2 or 4: the parameters of groups.
template <int kCount>
__device__ inline void load_params(uint32_t address, uint32_t (&params)[kCount]) {
  if constexpr (kCount == 1) {
    params[0] = ptx::load_shared_4(address);
  } else if constexpr (kCount == 2) {
    const uint2 v = ptx::load_shared_8(address);
    params[0] = v.x, params[1] = v.y;
  } else {
    static_assert(kCount == 4);
    const uint4 v = ptx::load_shared_16(address);
    params[0] = v.x, params[1] = v.y, params[2] = v.z, params[3] = v.w;
  }
}

// Turns the codes of one k32 step into its A registers. In a word, the low nibbles are inputs 0..15
// of the step and the high ones 16..31; the first word is of row r, the second of row r + 8.
// `params` are those of the step's group.
template <Weights kWeights>
__device__ inline void unpack_step(const uint32_t (&words)[2], const uint32_t (&more)[2],
                                   uint32_t params, uint32_t* a) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    uint32_t low = words[row] & 0x0F0F0F0F;
    uint32_t high = (words[row] >> 4) & 0x0F0F0F0F;
    const uint32_t scale = row == 0 ? params & 0xFF : (params >> 16) & 0xFF;
    const uint32_t offset = __byte_perm(params, 0, row == 0 ? 0x1111 : 0x3333);
    if constexpr (kIsNested<kWeights>) {
      const uint32_t zero = offset - 0x01010101u * kResidualZero;
      high = high * scale + (((more[row] >> 4) & 0x0F0F0F0F) + zero);
      // A byte of both planes is 16 high + low, so the low one needs no mask of its own.
      low = words[row] * scale + (more[row] + 17 * zero) - 16 * high;
    } else if constexpr (kHasGroups<kWeights>) {
      low = low * scale + offset;
      high = high * scale + offset;
    }
    a[row] = low;
    a[row + 2] = high;
  }
}

}  // namespace qoq::w4a8

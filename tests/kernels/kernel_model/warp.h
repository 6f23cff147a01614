// What the lanes of a warp do together, for the model of hopper.h: shuffles and votes, and the
// matrix units of csrc/common/mma.cuh, whose place it takes. Products are exact and added up in
// double, then rounded to float32; matrix units round otherwise.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <bit>
#include <cmath>

#include "ptx.cuh"  // hopper.h

namespace model {

// What each lane of a warp has brought to its latest instruction.
struct Exchange : Rendezvous {
  std::array<std::array<uint32_t, 6>, 32> brought, all;
};

inline std::map<std::pair<Block*, int>, Exchange> exchanges;

// Waits for the whole warp, then shows what every lane brought.
inline const std::array<std::array<uint32_t, 6>, 32>& exchange(std::array<uint32_t, 6> v) {
  Exchange& e = exchanges[{self->block, self->index / 32}];
  e.brought[self->index % 32] = v;
  meet(e, 32, [&] { e.all = e.brought; });
  return e.all;
}

inline int lane() { return self->index % 32; }

inline float half_of(uint32_t pair, int which) {
  __half_raw raw;
  raw.x = static_cast<uint16_t>(pair >> 16 * which);
  return __half2float(__half(raw));
}
inline uint32_t bits_of_half(float v) { return static_cast<__half_raw>(__float2half_rn(v)).x; }

}  // namespace model

template <class T>
T __shfl_sync(uint32_t, T v, int source) {
  return std::bit_cast<T>(model::exchange({std::bit_cast<uint32_t>(v)})[source][0]);
}
template <class T>
T __shfl_xor_sync(uint32_t, T v, int mask) {
  return std::bit_cast<T>(model::exchange({std::bit_cast<uint32_t>(v)})[model::lane() ^ mask][0]);
}
template <class T>
T __shfl_up_sync(uint32_t, T v, int delta) {
  const int source = model::lane() - delta;
  return std::bit_cast<T>(
      model::exchange({std::bit_cast<uint32_t>(v)})[source < 0 ? model::lane() : source][0]);
}
inline uint32_t __ballot_sync(uint32_t, bool v) {
  uint32_t lanes = 0;
  const auto& all = model::exchange({v});
  for (int i = 0; i < 32; ++i) lanes |= all[i][0] << i;
  return lanes;
}
inline bool __any_sync(uint32_t, bool v) { return __ballot_sync(0, v) != 0; }
inline int __ffs(uint32_t v) { return v == 0 ? 0 : std::countr_zero(v) + 1; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline float __uint_as_float(uint32_t v) { return std::bit_cast<float>(v); }
inline uint32_t __float_as_uint(float v) { return std::bit_cast<uint32_t>(v); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }

namespace qoq::ptx {

inline uint32_t convert_to_half2(float first, float second) {
  return bits_of_half(first) | bits_of_half(second) << 16;
}
inline uint32_t convert_to_bfloat162(float first, float second) {
  return static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(first)).x |
         static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(second)).x << 16;
}
inline uint32_t multiply_half2(uint32_t x, uint32_t y) {
  return convert_to_half2(half_of(x, 0) * half_of(y, 0), half_of(x, 1) * half_of(y, 1));
}
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
}
inline float reciprocal_approx(float x) { return 1 / x; }
inline uint32_t movmatrix_trans(uint32_t v) {
  const int g = lane() / 4, c = lane() % 4;
  const auto& all = exchange({v});
  auto element = [&](int row, int column) {
    return all[4 * row + column / 2][0] >> 16 * (column % 2) & 0xFFFF;
  };
  return element(2 * c, g) | element(2 * c + 1, g) << 16;
}
// Reads the rows of 8x8 matrices whose addresses the lanes bring, `kCount` of them.
template <int kCount>
void ldmatrix(uint32_t* r, uint32_t address) {
  check(lane() >= 8 * kCount || address % 16 == 0, "an unaligned row");
  const auto& all = exchange({address});
  for (int q = 0; q < kCount; ++q)
    std::memcpy(&r[q], shared_pointer(all[8 * q + lane() / 4][0], 16) + lane() % 4 * 4, 4);
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) { ldmatrix<4>(r, address); }
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) { ldmatrix<2>(r, address); }
inline void mma_m16n8k32_u8s8(int32_t (&d)[4], const uint32_t* a, const uint32_t (&b)[2]) {
  const int g = lane() / 4, c = lane() % 4;
  const auto& all = exchange({a[0], a[1], a[2], a[3], b[0], b[1]});
  for (int i = 0; i < 4; ++i) {
    const int lower = i / 2, column = 2 * c + i % 2;
    for (int k = 0; k < 8; ++k) {
      const uint32_t u = all[4 * g + k % 4][lower + 2 * (k / 4)];
      const uint32_t s = all[4 * column + k % 4][4 + k / 4];
      for (int byte = 0; byte < 32; byte += 8)
        d[i] += static_cast<int>(u >> byte & 255) * static_cast<int8_t>(s >> byte & 255);
    }
  }
}
inline void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         const uint32_t (&b)[2]) {
  const int g = lane() / 4, c = lane() % 4;
  const auto& all = exchange({a0, a1, a2, a3, b[0], b[1]});
  for (int i = 0; i < 4; ++i) {
    const int upper = i / 2, column = 2 * c + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t a = all[4 * g + k % 8 / 2][upper + 2 * (k / 8)];
      sum += double{half_of(a, k % 2)} * half_of(all[4 * column + k % 8 / 2][4 + k / 8], k % 2);
    }
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace qoq::ptx

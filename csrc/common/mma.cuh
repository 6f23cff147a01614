// One wrapper for each instruction of a warp's matrix units and of the fp16 arithmetic around them.
// All are in sm_80 and later. Halves are passed in pairs, as the 32 bits of a register: the lower
// half is the first.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace qoq::ptx {

// d += a b for a [16, 16] and b [16, 8] in fp16 and d in float32. Lane 4 g + c holds
//   a  rows g, g + 8, g, g + 8, the first two at columns 2 c.. and the last two at 2 c + 8..
//   b  column g at rows 2 c.. and 2 c + 8..
//   d  columns 2 c, 2 c + 1 of row g, then of row g + 8
__device__ inline void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[0]), "r"(b[1]));
}

// d += a b for a [16, 32] unsigned, b [32, 8] signed and d in int32. Lane 4 g + c holds
//   a  rows g, g + 8, g, g + 8, the first two at columns 4 c.. and the last two at 4 c + 16..
//   b  column g at rows 4 c.. and 4 c + 16..
//   d  columns 2 c, 2 c + 1 of row g, then of row g + 8
__device__ inline void mma_m16n8k32_u8s8(int32_t (&d)[4], const uint32_t* a,
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads 8x8 matrices of 16-bit elements: lane 8 q + i has the address of row i of matrix q, and
// lane 4 g + c receives columns 2 c, 2 c + 1 of row g of each.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same of two matrices, whose addresses are those of lanes 0 to 15.
__device__ inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

// Transposes an 8x8 matrix of halves, of which lane 4 g + c holds columns 2 c, 2 c + 1 of row g.
__device__ inline uint32_t movmatrix_trans(uint32_t v) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(v));
  return transposed;
}

__device__ inline uint32_t convert_to_half2(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

__device__ inline uint32_t convert_to_bfloat162(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

__device__ inline uint32_t multiply_half2(uint32_t x, uint32_t y) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(y));
  return product;
}

// 2^x, or 0 where float32 does not hold that as a normal number.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, off by at most 1 in the last place; 0 where x is infinite.
__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace qoq::ptx

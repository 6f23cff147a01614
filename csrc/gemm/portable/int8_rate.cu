// The rate of int8 mma on a GPU, which no kernel of the portable path exceeds: for `bench gemm`.
#include "common/card.h"
#include "common/checks.h"
#include "common/mma.cuh"
#include "ops.h"

namespace qoq {
namespace {

constexpr const char* kOp = "mma_int8_operations";
constexpr int kWarps = 8, kResident = 2, kOctets = 16;
constexpr int kSteps = 1 << 13;

// Multiplies random numbers that stay in registers. `steps` is an argument, and a sum that may be
// written needs them all, so that the compiler leaves nothing out.
__global__ void __launch_bounds__(32 * kWarps, kResident)
    multiply_in_registers(int steps, int32_t* out) {
  uint32_t state = blockIdx.x * blockDim.x + threadIdx.x + 1;
  const auto random = [&] {
    state ^= state << 13;
    state ^= state >> 17;
    return state ^= state << 5;
  };
  uint32_t a[4], b[kOctets][2];
  for (uint32_t& v : a) v = random();
  for (auto& pair : b) pair[0] = random(), pair[1] = random();
  int32_t sums[kOctets][4] = {};
  for (int step = 0; step < steps; ++step)
#pragma unroll
    for (int o = 0; o < kOctets; ++o) ptx::mma_m16n8k32_u8s8(sums[o], a, b[o]);
  int32_t all = 0;
  for (const auto& four : sums) all |= four[0] | four[1] | four[2] | four[3];
  if (all == 0x7A5B3C19) *out = all;
}

}  // namespace

int64_t mma_int8_operations(Tensor out) {
  const int device = device_of(out);
  check_tensor(kOp, "out", out, device, ScalarType::Int, {1});
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int blocks = kResident * card_of(device).multiprocessors;
  multiply_in_registers<<<blocks, 32 * kWarps, 0, current_stream(device)>>>(
      kSteps, static_cast<int32_t*>(out.data_ptr()));
  CHECK_CUDA(cudaGetLastError());
  return int64_t{kSteps} * blocks * kWarps * kOctets * (2 * 16 * 8 * 32);
}

}  // namespace qoq

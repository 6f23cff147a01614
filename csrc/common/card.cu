// Asks the CUDA runtime about a GPU.
#include <mutex>

#include "common/card.h"
#include "common/checks.h"

namespace qoq {
namespace {

Card make_card(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    CHECK_CUDA(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  constexpr float kUsualClock = 1.5f;  // GHz, where the driver does not say
  const float clock = attribute(cudaDevAttrClockRate) * 1e-6f;
  const float memory_clock = attribute(cudaDevAttrMemoryClockRate) * 1e-6f;
  return {
      .capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                    attribute(cudaDevAttrComputeCapabilityMinor),
      .multiprocessors = attribute(cudaDevAttrMultiProcessorCount),
      .shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
      .multiprocessor_shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
      .clock = clock > 0 ? clock : kUsualClock,
      // Both edges of the clock carry data.
      .bandwidth = memory_clock * 2 * attribute(cudaDevAttrGlobalMemoryBusWidth) / 8,
  };
}

}  // namespace

const Card& card_of(int device) {
  static std::once_flag is_made[kMaxDevices];
  static Card cards[kMaxDevices];
  std::call_once(is_made[device], [&] { cards[device] = make_card(device); });
  return cards[device];
}

}  // namespace qoq

// Launches the portable path.
#pragma once

#include <mutex>

#include "common/launch.h"
#include "gemm/portable/costs.h"
#include "gemm/portable/kernel.cuh"
#include "gemm/w4a8_launch.h"

namespace qoq::w4a8::portable {

// How one tile is launched.
template <class Tile, Weights kWeights, class Problem>
struct Launcher {
  static constexpr auto* kKernel = w4a8_gemm_portable<Tile, kWeights, Problem>;

  static int plan(Problem& p, const Card& card, int, int& blocks) {
    p.stages = stages_on<Tile, kWeights>(card);
    if (p.stages < Tile::kMinStages) return kImpossible;
    // A counter of the workspace for each tile that blocks share.
    const int slots = std::min(card.multiprocessors * Tile::kResident, kCounters);
    return schedule<Tile>(p, slots, cost_on<Tile, kWeights>(card), blocks);
  }

  static void launch(const Problem& p, int blocks, int device, cudaStream_t stream) {
    const int shared_bytes = Tile::template shared_bytes<kWeights>(p.stages);
    // Tiles without room are chosen only where none has it.
    STD_TORCH_CHECK(p.stages >= Tile::kMinStages, "w4a8_gemm: the kernel needs ",
                    Tile::template shared_bytes<kWeights>(Tile::kMinStages),
                    " bytes of shared memory, and a block on this GPU has less");
    static std::once_flag is_made[kMaxDevices];
    std::call_once(is_made[device], [&] {
      CHECK_CUDA(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      card_of(device).shared_bytes));
      CHECK_CUDA(cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared));
    });
    launch_early<kKernel>(blocks, Tile::kBlockThreads, shared_bytes, stream, p);
  }
};

template <Weights kWeights, class... Tiles>
void launch_fastest_of(const Params& p, const Card& card, int device, cudaStream_t stream) {
  launch_fastest<Launcher<Tiles, kWeights, Params>...>(p, card, device, stream);
}

// The experts' rows were laid out for a tile of so many tokens.
template <Weights kWeights>
void run_experts(const ExpertParams& p, int tokens, const Card& card, int device,
                 cudaStream_t stream) {
  launch_for_tokens<Launcher<Tile16, kWeights, ExpertParams>,
                    Launcher<Tile64, kWeights, ExpertParams>,
                    Launcher<Tile128, kWeights, ExpertParams>>(p, tokens, card, device, stream);
}

template <Weights kWeights>
void run(const Params& p, const Card& card, int device, cudaStream_t stream) {
  if (p.m <= 8) {
    launch_fastest_of<kWeights, Tile8>(p, card, device, stream);
  } else if (p.m <= 16) {
    // Where Tile16 has no room for the longest stages, Tile64 has.
    if constexpr (kIsNested<kWeights> && kKGroups<kWeights> > 1) {
      launch_fastest_of<kWeights, Tile16, Tile64>(p, card, device, stream);
    } else {
      launch_fastest_of<kWeights, Tile16>(p, card, device, stream);
    }
  } else if (p.m <= 32) {
    launch_fastest_of<kWeights, Tile32, Tile64>(p, card, device, stream);
  } else if (p.m <= 64) {
    launch_fastest_of<kWeights, Tile64>(p, card, device, stream);
  } else if constexpr (kIsNested<kWeights>) {
    launch_fastest_of<kWeights, Tile64, Tile128>(p, card, device, stream);
  } else {
    launch_fastest_of<kWeights, Tile64, Tile128, Tile256>(p, card, device, stream);
  }
}

}  // namespace qoq::w4a8::portable

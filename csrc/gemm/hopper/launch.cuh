// Launches the Hopper path.
#pragma once

#include <mutex>

#include "gemm/hopper/costs.h"
#include "gemm/hopper/kernel.cuh"
#include "gemm/hopper/tensor_maps.h"
#include "gemm/w4a8_launch.h"

namespace qoq::w4a8 {

// How one tile is launched on Hopper.
template <class Tile, Weights kWeights, class Problem>
struct HopperLauncher {
  static constexpr auto* kKernel = w4a8_gemm_hopper<Tile, kWeights, Problem>;
  static constexpr int kSharedBytes = Tile::template kSharedBytes<kWeights>;

  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  HopperLauncher(int blocks, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {Tile::kCluster, 1, 1};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(Tile::kThreads);
    config.dynamicSmemBytes = kSharedBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = Tile::kCluster > 1 ? 2 : 1;
  }

  // The clusters that run at a time. The driver is asked once for each device, since the answer
  // depends on how many multiprocessors each part of the chip has.
  static int slots(const Card& card, int device) {
    static std::once_flag is_made[kMaxDevices];
    static int counts[kMaxDevices];
    std::call_once(is_made[device], [&] {
      CHECK_CUDA(
          cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
      if constexpr (Tile::kCluster > 1) {
        HopperLauncher launcher(Tile::kCluster, nullptr);
        ++launcher.config.attrs;  // the cluster alone
        launcher.config.numAttrs = 1;
        CHECK_CUDA(cudaOccupancyMaxActiveClusters(&counts[device], kKernel, &launcher.config));
      } else {
        CHECK_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&counts[device], kKernel,
                                                                 Tile::kThreads, kSharedBytes));
        counts[device] *= card.multiprocessors;
      }
    });
    return counts[device];
  }

  static int plan(Problem& p, const Card& card, int device, int& clusters) {
    return schedule<Tile>(p, slots(card, device), kCost<Tile>, clusters);
  }

  static void launch(const Problem& p, int clusters, int, cudaStream_t stream) {
    const CUtensorMap x_map =
        x_tensor_map(p, Tile::kTokens / Tile::kClusterTiles, Tile::kStepBlocks);
    const CUtensorMap x_tail_map = x_tensor_map(p, p.tail_tokens, Tile::kStepBlocks);
    const CUtensorMap out_map = out_tensor_map(p, Tile::kUnitTokens);
    const HopperLauncher launcher(clusters * Tile::kCluster, stream);
    CHECK_CUDA(cudaLaunchKernelEx(&launcher.config, kKernel, x_map, x_tail_map, out_map, p));
  }
};

template <Weights kWeights, class... Tiles>
void launch_fastest_on_hopper(const Params& p, int device, cudaStream_t stream) {
  launch_fastest<HopperLauncher<Tiles, kWeights, Params>...>(p, card_of(device), device, stream);
}

// The experts' rows were laid out for a tile of so many tokens.
template <Weights kWeights>
void run_experts_on_hopper(const ExpertParams& p, int tokens, int device, cudaStream_t stream) {
  constexpr bool kNested = kIsNested<kWeights>;
  launch_for_tokens<
      HopperLauncher<std::conditional_t<kNested, Nested16, Tile16>, kWeights, ExpertParams>,
      HopperLauncher<std::conditional_t<kNested, Nested64, Tile64>, kWeights, ExpertParams>,
      HopperLauncher<std::conditional_t<kNested, Nested128, Tile128>, kWeights, ExpertParams>>(
      p, tokens, card_of(device), device, stream);
}

// Weights in one plane.
template <Weights kWeights>
void run_plane_on_hopper(const Params& p, int device, cudaStream_t stream) {
  if (p.m <= 8) {
    launch_fastest_on_hopper<kWeights, Tile8>(p, device, stream);
  } else if (p.m <= 16) {
    launch_fastest_on_hopper<kWeights, Tile16>(p, device, stream);
  } else if (p.m <= 32) {
    launch_fastest_on_hopper<kWeights, Tile32>(p, device, stream);
  } else if (p.m <= 64) {
    launch_fastest_on_hopper<kWeights, Tile64, Inputs64, Inputs64Deep>(p, device, stream);
  } else if (p.m <= 128) {
    launch_fastest_on_hopper<kWeights, Tile128, Tile128Wide, Inputs128, Inputs128Pair>(p, device,
                                                                                       stream);
  } else {
    launch_fastest_on_hopper<kWeights, Tile128, Tile192, Tile256>(p, device, stream);
  }
}

// Weights in two planes.
template <Weights kWeights>
void run_nested_on_hopper(const Params& p, int device, cudaStream_t stream) {
  if (p.m <= 16) {
    launch_fastest_on_hopper<kWeights, Nested16>(p, device, stream);
  } else if (p.m <= 64) {
    launch_fastest_on_hopper<kWeights, Nested64>(p, device, stream);
  } else if (p.m <= 128) {
    launch_fastest_on_hopper<kWeights, Nested128>(p, device, stream);
  } else {
    launch_fastest_on_hopper<kWeights, Nested128, Nested192, Nested256>(p, device, stream);
  }
}

}  // namespace qoq::w4a8

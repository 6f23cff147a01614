// The two paths of the W4A8 GEMM, and what their launches share.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>

#include "common/card.h"
#include "gemm/w4a8_config.h"

namespace qoq::w4a8 {

// Launches the kernel for one kind of weights: `hopper` for compute capability 9.0 alone,
// `portable` for all from 8.0. The portable path takes the sizes of the GPU from `card`.
template <Weights kWeights>
void run_hopper(const Params& p, int device, cudaStream_t stream);
template <Weights kWeights>
void run_portable(const Params& p, const Card& card, int device, cudaStream_t stream);

// The same for a mixture of experts, whose rows are laid out in tiles of `tokens`: one of
// kExpertTiles.
template <Weights kWeights>
void run_experts_hopper(const ExpertParams& p, int tokens, int device, cudaStream_t stream);
template <Weights kWeights>
void run_experts_portable(const ExpertParams& p, int tokens, const Card& card, int device,
                          cudaStream_t stream);

// Launches the one of `Launchers`, each of which is a tile, that takes the least time by its plan.
template <class... Launchers, class Problem>
void launch_fastest(const Problem& params, const Card& card, int device, cudaStream_t stream) {
  constexpr int kCount = sizeof...(Launchers);
  Problem work[kCount];
  int clusters[kCount], time[kCount], i = 0;
  ((work[i] = params, time[i] = Launchers::plan(work[i], card, device, clusters[i]), ++i), ...);
  const int best = std::min_element(time, time + kCount) - time;
  i = 0;
  ((i++ == best ? Launchers::launch(work[best], clusters[best], device, stream) : void()), ...);
}

// Launches the one of `Launchers` whose tile has so many tokens.
template <class... Launchers>
void launch_for_tokens(const ExpertParams& p, int tokens, const Card& card, int device,
                       cudaStream_t stream) {
  static_assert(sizeof...(Launchers) == std::size(kExpertTiles));
  int i = 0;
  ((kExpertTiles[i++] == tokens ? launch_fastest<Launchers>(p, card, device, stream) : void()),
   ...);
}

}  // namespace qoq::w4a8

// The launch of the decode attention: which kernel, and how many blocks.
#pragma once

#include <algorithm>
#include <mutex>

#include "common/card.h"
#include "common/launch.h"
#include "kv/decode_kernel.cuh"
#include "kv/decode_launch.h"
#include "kv/host.h"

namespace qoq::kv {

// What a block may have at least and at most on the GPUs that the kernels are for.
constexpr int kLeastSharedBytes = 99 << 10, kMostSharedBytes = 227 << 10;

template <class A>
void launch_decode(Params& p, const Tensor& workspace, int device, cudaStream_t stream) {
  const Card& card = card_of(device);
  const int processors = card.multiprocessors, shared_bytes = A::shared_bytes(p.group);
  STD_TORCH_CHECK(shared_bytes <= card.shared_bytes, kDecodeOp, ": these heads need ", shared_bytes,
                  " bytes of shared memory, and a block on this GPU has at most ",
                  card.shared_bytes);
  constexpr int kReserved = 1024;  // bytes of each block
  const int room = card.multiprocessor_shared_bytes / (shared_bytes + kReserved);
  const int resident = std::clamp(room, 1, blocks_of_processor<A>(p, processors));
  const int blocks = std::min(kMaxBlocks, processors * resident);
  const int64_t ints = kMaxBlocks + int64_t{blocks} * 2 * p.group * A::kPartial;
  STD_TORCH_CHECK(workspace.numel() >= ints, kDecodeOp, ": the workspace has ", workspace.numel(),
                  " integers, expected at least ", ints, " (kv_ops.workspace)");
  static std::once_flag is_set[kMaxDevices];
  std::call_once(is_set[device], [&] {
    CHECK_CUDA(cudaFuncSetAttribute(kv_decode_kernel<A>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    std::min(A::shared_bytes(kMaxGroup), card.shared_bytes)));
  });
  lay_out<A>(p, blocks, resident);
  launch_early<kv_decode_kernel<A>>(blocks, A::kThreads, shared_bytes, stream, p);
}

// Only what some GPU needs is compiled.
template <class P, int kHeadTiles, bool kHasManyQueries>
void dispatch_warps(Params& p, const Tensor& workspace, int device, cudaStream_t stream) {
  using Wide = Attention<P, kHeadTiles, kWideWarps, kHasManyQueries>;
  using Most = Attention<P, kHeadTiles, kMostWarps, kHasManyQueries>;
  using Fewest = Attention<P, kHeadTiles, kFewestWarps, kHasManyQueries>;
  if constexpr (kHasManyQueries && kHeadTiles > 1 && P::K::kBits == 4)
    if (Wide::shared_bytes(p.group) <= card_of(device).shared_bytes)
      return launch_decode<Wide>(p, workspace, device, stream);
  if constexpr (Most::shared_bytes(kHeadTiles * kHeadsOfTile) <= kLeastSharedBytes) {
    launch_decode<Most>(p, workspace, device, stream);
  } else if constexpr (Most::shared_bytes(1) > kMostSharedBytes) {
    launch_decode<Fewest>(p, workspace, device, stream);
  } else if (Most::shared_bytes(p.group) <= card_of(device).shared_bytes) {
    launch_decode<Most>(p, workspace, device, stream);
  } else {
    launch_decode<Fewest>(p, workspace, device, stream);
  }
}

template <class P, bool kHasManyQueries>
void dispatch_group(Params& p, const Tensor& workspace, int device, cudaStream_t stream) {
  if constexpr (has_one_tile(P::kHeadSize)) {
    dispatch_warps<P, 1, kHasManyQueries>(p, workspace, device, stream);
  } else if (p.group <= kHeadsOfTile) {
    dispatch_warps<P, 1, kHasManyQueries>(p, workspace, device, stream);
  } else {
    dispatch_warps<P, 2, kHasManyQueries>(p, workspace, device, stream);
  }
}

template <bool kHasManyQueries>
void launch_kernel(Params& p, const DecodePages& pages, const Tensor& workspace, int device,
                   cudaStream_t stream) {
  dispatch_page(pages.head_size, pages.k_bits, pages.v_bits, [&]<class P>() {
    dispatch_group<P, kHasManyQueries>(p, workspace, device, stream);
  });
}

}  // namespace qoq::kv

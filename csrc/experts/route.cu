// Gives every pair of a token and an expert a row, so that the rows of an expert are neighbours and
// begin a tile.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "gemm/w4a8_config.h"
#include "ops.h"

namespace qoq {
namespace {

constexpr const char* kOp = "route_to_experts";
constexpr int kMostThreads = 1024;
constexpr int kMostExperts = kMostThreads;  // a thread counts for one
constexpr int64_t kMostPairs = 1 << 26;

struct Pairs {
  const int32_t* ids;
  const int32_t* map;  // [globals] to the experts here, or -1; null where all are here
  int count, globals, experts;

  // The expert of a pair, -1 for one that is not here.
  __device__ int expert(int pair) const {
    const int id = ids[pair];
    if (id < 0 || id >= globals) return -1;
    const int expert = map == nullptr ? id : map[id];
    return expert < experts ? expert : -1;
  }
};

// One block. Which row of its expert a pair gets is left to the order of the atomics: nothing that
// is computed of a row depends on its place. A thread keeps its first pair in registers, so that
// few pairs, whose time counts, are read and written once.
__global__ void __launch_bounds__(kMostThreads, 1)
    route_kernel(const Pairs pairs, int tile, int32_t* rows, int32_t* tile_expert, int32_t* tiles) {
  __shared__ int32_t counts[kMostExperts], first_tile[kMostExperts], sums[32];
  const int thread = threadIdx.x, threads = blockDim.x, warp = thread / 32, lane = thread % 32;
  ptx::griddepcontrol_launch_dependents();
  counts[thread] = 0;
  __syncthreads();
  ptx::griddepcontrol_wait();
  const auto take_place = [&](int expert) {
    return expert < 0 ? -1 : atomicAdd(counts + expert, 1);
  };
  const int first_expert = thread < pairs.count ? pairs.expert(thread) : -1;
  const int first_place = take_place(first_expert);
  for (int i = thread + threads; i < pairs.count; i += threads)
    rows[i] = take_place(pairs.expert(i));
  __syncthreads();

  const int mine = (counts[thread] + tile - 1) / tile;
  int end = mine;  // of this expert's tiles
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xFFFFFFFF, end, step);
    if (lane >= step) end += before;
  }
  if (lane == 31) sums[warp] = end;
  __syncthreads();
  for (int w = 0; w < warp; ++w) end += sums[w];
  first_tile[thread] = end - mine;
  for (int t = end - mine; t < end; ++t) tile_expert[t] = thread;
  if (thread == threads - 1) *tiles = end;
  __syncthreads();
  if (thread < pairs.count)
    rows[thread] = first_expert < 0 ? -1 : first_place + first_tile[first_expert] * tile;
  for (int i = thread + threads; i < pairs.count; i += threads) {
    const int expert = pairs.expert(i);
    if (expert >= 0) rows[i] += first_tile[expert] * tile;
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> route_to_experts(const Tensor& topk_ids,
                                                    const std::optional<Tensor>& expert_map,
                                                    int64_t experts, int64_t tile) {
  STD_TORCH_CHECK(topk_ids.dim() == 2, kOp, ": topk_ids is ", shape_text(topk_ids),
                  ", expected [tokens, experts of a token]");
  const int64_t tokens = topk_ids.size(0), each = topk_ids.size(1), pairs = tokens * each;
  STD_TORCH_CHECK(experts > 0 && experts <= kMostExperts, kOp, ": ", experts,
                  " experts, expected 1 to ", kMostExperts);
  STD_TORCH_CHECK(std::ranges::count(w4a8::kExpertTiles, tile) == 1, kOp, ": tiles of ", tile,
                  " rows, expected 16, 64 or 128");
  STD_TORCH_CHECK(pairs <= kMostPairs, kOp, ": topk_ids is ", shape_text(topk_ids),
                  ", expected at most 2^26 pairs");
  const int device = device_of(topk_ids);
  check_tensor(kOp, "topk_ids", topk_ids, device, ScalarType::Int, {tokens, each}, 4);
  if (expert_map.has_value())
    check_tensor(kOp, "expert_map", *expert_map, device, ScalarType::Int, {expert_map->numel()}, 4);
  const int64_t used = std::min(pairs, experts);
  const int64_t most = std::min(pairs, (pairs + used * (tile - 1)) / tile);
  const auto ints = [&](std::vector<int64_t> shape) {
    return torch::stable::new_empty(topk_ids, shape, ScalarType::Int);
  };
  Tensor rows = ints({tokens, each}), tile_expert = ints({most}), tiles = ints({1});
  const Pairs all{
      .ids = static_cast<const int32_t*>(topk_ids.data_ptr()),
      .map = expert_map.has_value() ? static_cast<const int32_t*>(expert_map->data_ptr()) : nullptr,
      .count = static_cast<int>(pairs),
      .globals = static_cast<int>(expert_map.has_value() ? expert_map->numel() : experts),
      .experts = static_cast<int>(experts),
  };
  const int64_t useful = std::min<int64_t>(std::max(pairs, experts), kMostThreads);
  const int threads = static_cast<int>((useful + 31) / 32 * 32);
  const torch::stable::accelerator::DeviceGuard guard(device);
  launch_early<route_kernel>(1, threads, 0, current_stream(device), all, static_cast<int>(tile),
                             static_cast<int32_t*>(rows.data_ptr()),
                             static_cast<int32_t*>(tile_expert.data_ptr()),
                             static_cast<int32_t*>(tiles.data_ptr()));
  return {rows, tile_expert, tiles};
}

}  // namespace qoq

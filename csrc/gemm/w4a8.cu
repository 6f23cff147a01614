// Host side of the W4A8 GEMM: checks, schedule, launch.
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "common/checks.h"
#include "gemm/w4a8_kernel.cuh"
#include "gemm/w4a8_schedule.h"
#include "ops.h"

namespace qoq {
namespace {

using namespace w4a8;

constexpr const char* kOp = "w4a8_gemm";
constexpr int kMaxDevices = 64;

int multiprocessors(int device) {
  int count = 0;
  CHECK_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// libcuda is there when a kernel runs, but not where the library is built.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    CHECK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &result));
    STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess && function != nullptr, kOp,
                    ": the NVIDIA driver has no cuTensorMapEncodeTiled; install one for CUDA 12");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

// Describes a tensor of kRank dimensions, the first without gaps, to the copy engine, which moves
// boxes of it in its 128-byte swizzle. What lies outside reads as zero and is not written.
template <int kRank>
CUtensorMap tensor_map(const void* base, CUtensorMapDataType type, const cuuint64_t (&sizes)[kRank],
                       const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank]) {
  CUtensorMap map;
  cuuint32_t element_strides[kRank];
  std::fill(element_strides, element_strides + kRank, 1);
  const CUresult result = tensor_map_encoder()(
      &map, type, kRank, const_cast<void*>(base), sizes, strides, box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, kOp, ": cuTensorMapEncodeTiled returned ",
                  static_cast<int>(result));
  return map;
}

// The map of x, int8 [m, k], as [k_blocks][m][128].
CUtensorMap x_tensor_map(const void* x, const Params& p, int tokens, int k_blocks) {
  const uint64_t k = uint64_t{kBlockK} * p.k_blocks;
  return tensor_map<3>(
      x, CU_TENSOR_MAP_DATA_TYPE_UINT8,
      {kBlockK, static_cast<cuuint64_t>(p.m), static_cast<cuuint64_t>(p.k_blocks)}, {k, kBlockK},
      {kBlockK, static_cast<cuuint32_t>(tokens), static_cast<cuuint32_t>(k_blocks)});
}

// The map of the output [m, n]; its 16 bits are copied as they are.
CUtensorMap out_tensor_map(const Params& p, int tokens) {
  return tensor_map<2>(p.out, CU_TENSOR_MAP_DATA_TYPE_UINT16,
                       {static_cast<cuuint64_t>(p.n), static_cast<cuuint64_t>(p.m)},
                       {static_cast<cuuint64_t>(p.n) * 2},
                       {kBlockN, static_cast<cuuint32_t>(tokens)});
}

// How one tile is launched.
template <class Tile, Weights kWeights>
struct Launcher {
  static constexpr auto* kKernel = w4a8_gemm_kernel<Tile, kWeights>;
  static constexpr int kSharedBytes = Tile::template kSharedBytes<kWeights>;

  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  Launcher(int blocks, cudaStream_t stream) {
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
  static int slots(int device) {
    static std::once_flag is_made[kMaxDevices];
    static int counts[kMaxDevices];
    std::call_once(is_made[device], [&] {
      CHECK_CUDA(
          cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
      if constexpr (Tile::kCluster > 1) {
        Launcher launcher(Tile::kCluster, nullptr);
        ++launcher.config.attrs;  // the cluster alone
        launcher.config.numAttrs = 1;
        CHECK_CUDA(cudaOccupancyMaxActiveClusters(&counts[device], kKernel, &launcher.config));
      } else {
        CHECK_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&counts[device], kKernel,
                                                                 Tile::kThreads, kSharedBytes));
        counts[device] *= multiprocessors(device);
      }
    });
    return counts[device];
  }
};

template <class Tile, Weights kWeights>
void launch(const void* x, const Params& p, int clusters, cudaStream_t stream) {
  using Launch = Launcher<Tile, kWeights>;
  const CUtensorMap x_map =
      x_tensor_map(x, p, Tile::kTokens / Tile::kClusterTiles, Tile::kStepBlocks);
  const CUtensorMap x_tail_map = x_tensor_map(x, p, p.tail_tokens, Tile::kStepBlocks);
  const CUtensorMap out_map = out_tensor_map(p, Tile::kUnitTokens);
  const Launch launcher(clusters * Tile::kCluster, stream);
  CHECK_CUDA(cudaLaunchKernelEx(&launcher.config, Launch::kKernel, x_map, x_tail_map, out_map, p));
}

// Launches the tile that takes the least time by `schedule`.
template <Weights kWeights, class... Tiles>
void launch_fastest(const void* x, const Params& params, int device, cudaStream_t stream) {
  constexpr int kCount = sizeof...(Tiles);
  Params work[kCount];
  int clusters[kCount], time[kCount], i = 0;
  ((work[i] = params,
    time[i] = schedule<Tiles>(work[i], Launcher<Tiles, kWeights>::slots(device), clusters[i]), ++i),
   ...);
  const int best = std::min_element(time, time + kCount) - time;
  i = 0;
  ((i++ == best ? launch<Tiles, kWeights>(x, work[best], clusters[best], stream) : void()), ...);
}

template <Weights kWeights>
void dispatch(const void* x, const Params& p, int device, cudaStream_t stream) {
  if (p.m <= 8) {
    launch_fastest<kWeights, Tile8>(x, p, device, stream);
  } else if (p.m <= 16) {
    launch_fastest<kWeights, Tile16>(x, p, device, stream);
  } else if (p.m <= 32) {
    launch_fastest<kWeights, Tile32>(x, p, device, stream);
  } else if (p.m <= 64) {
    launch_fastest<kWeights, Tile64, Inputs64, Inputs64Deep>(x, p, device, stream);
  } else if (p.m <= 128) {
    launch_fastest<kWeights, Tile128, Tile128Wide, Inputs128, Inputs128Pair>(x, p, device, stream);
  } else {
    launch_fastest<kWeights, Tile128, Tile192, Tile256>(x, p, device, stream);
  }
}

template <>
void dispatch<Weights::kNested>(const void* x, const Params& p, int device, cudaStream_t stream) {
  if (p.m <= 16) {
    launch_fastest<Weights::kNested, Nested16>(x, p, device, stream);
  } else if (p.m <= 64) {
    launch_fastest<Weights::kNested, Nested64>(x, p, device, stream);
  } else if (p.m <= 128) {
    launch_fastest<Weights::kNested, Nested128>(x, p, device, stream);
  } else {
    launch_fastest<Weights::kNested, Nested128, Nested192, Nested256>(x, p, device, stream);
  }
}

Bias bias_type(const Tensor& bias) {
  switch (bias.scalar_type()) {
    case ScalarType::Float:
      return Bias::kFloat32;
    case ScalarType::BFloat16:
      return Bias::kBfloat16;
    case ScalarType::Half:
      return Bias::kFloat16;
    default:
      STD_TORCH_CHECK(false, kOp, ": bias is ", torch::headeronly::toString(bias.scalar_type()),
                      ", expected Float, BFloat16 or Half");
  }
}

}  // namespace

Tensor w4a8_gemm(const Tensor& x, const Tensor& x_scale, const Tensor& x_row_sum,
                 const Tensor& weight, const Tensor& channel_scale,
                 const std::optional<Tensor>& channel_zero,
                 const std::optional<Tensor>& group_scale,
                 const std::optional<Tensor>& group_offset, const std::optional<Tensor>& bias,
                 ScalarType out_dtype, const std::optional<Tensor>& workspace,
                 const std::optional<Tensor>& residual, const std::optional<Tensor>& use_residual) {
  STD_TORCH_CHECK(x.dim() == 2 && channel_scale.dim() == 1, kOp, ": x is ", shape_text(x),
                  " and channel_scale ", shape_text(channel_scale), ", expected [M, K] and [N]");
  STD_TORCH_CHECK(out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Half, kOp,
                  ": the output is bfloat16 or float16, not ",
                  torch::headeronly::toString(out_dtype));
  const int64_t m = x.size(0), k = x.size(1), n = channel_scale.size(0);
  const bool is_grouped = !channel_zero.has_value();
  STD_TORCH_CHECK(n % 8 == 0 && n > 0, kOp, ": N=", n, " must be a multiple of 8");
  STD_TORCH_CHECK(k % kBlockK == 0 && k > 0, kOp, ": K=", k, " must be a multiple of ", kBlockK);
  STD_TORCH_CHECK(k <= kMaxK, kOp, ": K=", k, " overflows int32; split the layer");
  STD_TORCH_CHECK(m <= kMaxRows && n <= kMaxRows, kOp, ": M=", m, ", N=", n, " are too large");
  STD_TORCH_CHECK(!group_scale.has_value() && !group_offset.has_value(), kOp,
                  ": on CUDA the groups are inside the packed weight (w4a8_layout.pack)");
  const int device = device_of(x);
  const int64_t weight_blocks = (n + kBlockN - 1) / kBlockN;
  check_tensor(kOp, "x", x, device, ScalarType::Char, {m, k});
  check_tensor(kOp, "x_scale", x_scale, device, ScalarType::Float, {m});
  check_tensor(kOp, "x_row_sum", x_row_sum, device, ScalarType::Int, {m});
  check_tensor(kOp, "weight", weight, device, ScalarType::Byte,
               {weight_blocks, k / kBlockK,
                is_grouped ? kBlockBytes<Weights::kGrouped> : kBlockBytes<Weights::kChannel>});
  STD_TORCH_CHECK(is_grouped || !residual.has_value(), kOp,
                  ": a residual belongs to a weight with groups");
  if (residual.has_value())
    check_tensor(kOp, "residual", *residual, device, ScalarType::Byte,
                 {weight_blocks, k / kBlockK, kCodeBytes});
  STD_TORCH_CHECK(residual.has_value() || !use_residual.has_value(), kOp,
                  ": use_residual is given, but no residual");
  // A flag may be a part of a larger tensor, since only its 4 bytes are read.
  if (use_residual.has_value())
    check_tensor(kOp, "use_residual", *use_residual, device, ScalarType::Int, {1}, 4);
  check_tensor(kOp, "channel_scale", channel_scale, device, ScalarType::Float, {n});
  if (!is_grouped) check_tensor(kOp, "channel_zero", *channel_zero, device, ScalarType::Float, {n});
  if (bias.has_value()) check_tensor(kOp, "bias", *bias, device, bias->scalar_type(), {n});
  STD_TORCH_CHECK(workspace.has_value(), kOp, ": on CUDA a workspace is needed (ops.workspace)");
  const int64_t ints = kCounters + int64_t{multiprocessors(device)} * kMaxTileInts;
  check_tensor(kOp, "workspace", *workspace, device, ScalarType::Int, {ints});

  const std::vector<int64_t> shape = {m, n};
  Tensor out = torch::stable::new_empty(x, shape, out_dtype);
  if (m == 0) return out;
  const Params params{
      .weight = static_cast<const uint8_t*>(weight.data_ptr()),
      .residual =
          residual.has_value() ? static_cast<const uint8_t*>(residual->data_ptr()) : nullptr,
      .use_residual = use_residual.has_value()
                          ? static_cast<const int32_t*>(use_residual->data_ptr())
                          : nullptr,
      .x_scale = static_cast<const float*>(x_scale.data_ptr()),
      .x_row_sum = static_cast<const int32_t*>(x_row_sum.data_ptr()),
      .channel_scale = static_cast<const float*>(channel_scale.data_ptr()),
      .channel_zero = is_grouped ? nullptr : static_cast<const float*>(channel_zero->data_ptr()),
      .bias = bias.has_value() ? bias->data_ptr() : nullptr,
      .out = out.data_ptr(),
      .workspace = static_cast<int32_t*>(workspace->data_ptr()),
      .m = static_cast<int>(m),
      .n = static_cast<int>(n),
      .k_blocks = static_cast<int>(k / kBlockK),
      .weight_blocks = static_cast<int>(weight_blocks),
      .bias_type = bias.has_value() ? bias_type(*bias) : Bias::kNone,
      .out_type = out_dtype == ScalarType::BFloat16 ? Output::kBfloat16 : Output::kFloat16,
  };
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  if (residual.has_value()) {
    dispatch<Weights::kNested>(x.data_ptr(), params, device, stream);
  } else if (is_grouped) {
    dispatch<Weights::kGrouped>(x.data_ptr(), params, device, stream);
  } else {
    dispatch<Weights::kChannel>(x.data_ptr(), params, device, stream);
  }
  return out;
}

}  // namespace qoq

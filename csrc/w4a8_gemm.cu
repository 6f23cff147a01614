// Host side of the W4A8 GEMM: checks, schedule, launch.
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "common/checks.h"
#include "ops.h"
#include "w4a8_gemm_kernel.cuh"
#include "w4a8_gemm_schedule.h"

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

// x int8 [m, k] in boxes of `tokens` x 128. Tokens past the last read as zero.
CUtensorMap x_tensor_map(const void* x, int m, int k, int tokens) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(m)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(k)};
  const cuuint32_t box[2] = {kBlockK, static_cast<cuuint32_t>(tokens)};
  const cuuint32_t element_strides[2] = {1, 1};
  const CUresult result = tensor_map_encoder()(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(x), sizes, strides, box,
      element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, kOp, ": cuTensorMapEncodeTiled returned ",
                  static_cast<int>(result), " for x [", m, ", ", k, "]");
  return map;
}

// How to launch one tile on one device.
struct Plan {
  int clusters[kMaxCluster + 1];  // that run at a time, by their size
};

template <class Tile, bool kGrouped>
struct Launcher {
  static constexpr auto* kKernel = w4a8_gemm_kernel<Tile, kGrouped>;
  static constexpr int kSharedBytes = Tile::template kSharedBytes<kGrouped>;

  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  Launcher(int blocks, int cluster, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kSharedBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
  }

  // Asked once: the answer depends on how many multiprocessors each part of the chip has.
  static const Plan& plan(int device) {
    static std::once_flag is_made[kMaxDevices];
    static Plan plans[kMaxDevices];
    std::call_once(is_made[device], [&] {
      CHECK_CUDA(
          cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
      for (int size = 1; size <= kMaxCluster; ++size) {
        Launcher launcher(size, size, nullptr);
        launcher.config.numAttrs = 1;  // the cluster alone
        CHECK_CUDA(cudaOccupancyMaxActiveClusters(&plans[device].clusters[size], kKernel,
                                                  &launcher.config));
      }
    });
    return plans[device];
  }
};

// The work of a launch with this tile.
struct Arrangement {
  Params params;
  int used;  // blocks over kShare
  int path;
};

template <class Tile, bool kGrouped>
Arrangement arrange(Params p, int device) {
  const Plan& plan = Launcher<Tile, kGrouped>::plan(device);
  p.tiles_m = divide_up(p.m, Tile::kTokens);
  p.tiles_n = divide_up(p.n, Tile::kChannels * Tile::kShare);
  const int used = schedule(p, Tile::kShare, plan.clusters);
  return {p, used, longest_path(p, Tile::kShare, plan.clusters)};
}

template <class Tile, bool kGrouped>
void launch(const void* x, const Arrangement& work, cudaStream_t stream) {
  using Launch = Launcher<Tile, kGrouped>;
  const Params& p = work.params;
  const CUtensorMap x_map =
      x_tensor_map(x, p.m, p.k_blocks * kBlockK, Tile::kTokens / Tile::kShare);
  const Launch launcher(work.used * Tile::kShare, p.split * Tile::kShare, stream);
  CHECK_CUDA(cudaLaunchKernelEx(&launcher.config, Launch::kKernel, x_map, p));
}

template <class Tile, bool kGrouped>
void launch(const void* x, const Params& p, int device, cudaStream_t stream) {
  launch<Tile, kGrouped>(x, arrange<Tile, kGrouped>(p, device), stream);
}

template <bool kGrouped>
void dispatch(const void* x, const Params& p, int device, cudaStream_t stream) {
  if (p.m <= 8) return launch<Tile8, kGrouped>(x, p, device, stream);
  if (p.m <= 16) return launch<Tile16, kGrouped>(x, p, device, stream);
  if (p.m <= 32) return launch<Tile32, kGrouped>(x, p, device, stream);
  if (p.m <= 64) return launch<Tile64, kGrouped>(x, p, device, stream);
  const Arrangement small = arrange<Tile128, kGrouped>(p, device);
  const Arrangement large = arrange<TileLarge, kGrouped>(p, device);
  if (small.path * kClocks128 < large.path * kClocksLarge)
    return launch<Tile128, kGrouped>(x, small, stream);
  return launch<TileLarge, kGrouped>(x, large, stream);
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
                 ScalarType out_dtype, const std::optional<Tensor>& workspace) {
  STD_TORCH_CHECK(x.dim() == 2 && channel_scale.dim() == 1, kOp, ": x is ", shape_text(x),
                  " and channel_scale ", shape_text(channel_scale), ", expected [M, K] and [N]");
  STD_TORCH_CHECK(out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Half, kOp,
                  ": the output is bfloat16 or float16, not ",
                  torch::headeronly::toString(out_dtype));
  const int64_t m = x.size(0), k = x.size(1), n = channel_scale.size(0);
  const bool is_grouped = !channel_zero.has_value();
  STD_TORCH_CHECK(n % 8 == 0 && n > 0, kOp, ": N=", n, " must be a multiple of 8");
  STD_TORCH_CHECK(k % kBlockK == 0 && k > 0, kOp, ": K=", k, " must be a multiple of ", kBlockK);
  // The sums are exact up to here: 255 * 128 * K < 2^31.
  STD_TORCH_CHECK(k <= 65536, kOp, ": K=", k, " overflows int32; split the layer");
  STD_TORCH_CHECK(m <= 1 << 24 && n <= 1 << 24, kOp, ": M=", m, ", N=", n, " are too large");
  STD_TORCH_CHECK(!group_scale.has_value() && !group_offset.has_value(), kOp,
                  ": on CUDA the groups are inside the packed weight (w4a8_layout.pack)");
  const int device = device_of(x);
  const int64_t weight_blocks = (n + kBlockN - 1) / kBlockN;
  check_tensor(kOp, "x", x, device, ScalarType::Char, {m, k});
  check_tensor(kOp, "x_scale", x_scale, device, ScalarType::Float, {m});
  check_tensor(kOp, "x_row_sum", x_row_sum, device, ScalarType::Int, {m});
  check_tensor(kOp, "weight", weight, device, ScalarType::Byte,
               {weight_blocks, k / kBlockK, is_grouped ? kBlockBytes<true> : kBlockBytes<false>});
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
  if (is_grouped) {
    dispatch<true>(x.data_ptr(), params, device, stream);
  } else {
    dispatch<false>(x.data_ptr(), params, device, stream);
  }
  return out;
}

}  // namespace qoq

// Host side of the W4A8 GEMM: checks, and the path that this GPU takes.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/card.h"
#include "common/checks.h"
#include "gemm/w4a8_launch.h"
#include "ops.h"

namespace qoq {
namespace {

using namespace w4a8;

constexpr const char *kOp = "w4a8_gemm", *kExpertsOp = "w4a8_gemm_experts";
constexpr int kOldest = 80, kHopper = 90;  // compute capabilities

// The arguments of the op.
struct Arguments {
  const Tensor &x, &x_scale, &x_row_sum, &weight, &channel_scale;
  const std::optional<Tensor>&channel_zero, &group_scale, &group_offset, &bias;
  ScalarType out_dtype;
  const std::optional<Tensor>&workspace, &residual, &use_residual;
};

// What the portable path is told of the GPU where it is taken whatever the GPU is.
struct Caps {
  int64_t shared_bytes, multiprocessors;
};

Bias bias_type(const char* op, const Tensor& bias) {
  switch (bias.scalar_type()) {
    case ScalarType::Float:
      return Bias::kFloat32;
    case ScalarType::BFloat16:
      return Bias::kBfloat16;
    case ScalarType::Half:
      return Bias::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": bias is ", torch::headeronly::toString(bias.scalar_type()),
                      ", expected Float, BFloat16 or Half");
  }
}

template <Weights kWeights>
void run(const Params& p, int device, const Caps* caps) {
  const cudaStream_t stream = current_stream(device);
  Card card = card_of(device);
  if (caps != nullptr) {
    constexpr int kReserved = 1024;  // of each block
    const auto cap = [](int& value, int64_t most) { value = std::min<int64_t>(value, most); };
    cap(card.shared_bytes, caps->shared_bytes);
    cap(card.multiprocessor_shared_bytes, caps->shared_bytes + kReserved);
    cap(card.multiprocessors, caps->multiprocessors);
  }
#ifdef QOQ_HOPPER
  if (card.capability == kHopper && caps == nullptr) {
    run_hopper<kWeights>(p, device, stream);
    return;
  }
#endif
  run_portable<kWeights>(p, card, device, stream);
}

template <Weights kWeights>
void run_experts(const ExpertParams& p, int tokens, int device) {
  const cudaStream_t stream = current_stream(device);
  const Card& card = card_of(device);
#ifdef QOQ_HOPPER
  if (card.capability == kHopper) {
    run_experts_hopper<kWeights>(p, tokens, device, stream);
    return;
  }
#endif
  run_experts_portable<kWeights>(p, tokens, card, device, stream);
}

template <Weights kPlane, Weights kNested>
void run_grouped(bool is_nested, const Params& p, int device, const Caps* caps) {
  static_assert(kFirstPlane<kNested> == kPlane);
  if (is_nested) {
    run<kNested>(p, device, caps);
  } else {
    run<kPlane>(p, device, caps);
  }
}

// The groups of a k_block that a weight with groups has by its last size: 1 where no number of them
// has it.
int groups_of_k_block_in(const Tensor& weight) {
  const int64_t bytes = weight.dim() > 0 ? weight.size(weight.dim() - 1) : 0;
  for (const int groups : {2, 4})
    if (bytes == kCodeBytes + groups * kParamBytes) return groups;
  return 1;
}

// Arguments that have been checked.
struct Checked {
  Params params;
  Tensor out;
  int device, k_groups;
  bool is_nested;
};

// Refuses what the kernels cannot do. Of so many experts, weights and constants lie one behind the
// other; a layer is one.
Checked checked(const char* op, const Arguments& arguments, int64_t experts) {
  const auto& [x, x_scale, x_row_sum, weight, channel_scale, channel_zero, group_scale,
               group_offset, bias, out_dtype, workspace, residual, use_residual] = arguments;
  STD_TORCH_CHECK(x.dim() == 2 && channel_scale.dim() == 1, op, ": x is ", shape_text(x),
                  " and channel_scale ", shape_text(channel_scale), ", expected [M, K] and [N]");
  STD_TORCH_CHECK(out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Half, op,
                  ": the output is bfloat16 or float16, not ",
                  torch::headeronly::toString(out_dtype));
  STD_TORCH_CHECK(experts > 0 && channel_scale.size(0) % experts == 0, op, ": channel_scale is ",
                  shape_text(channel_scale), ", expected as many channels of each of ", experts,
                  " experts");
  const int64_t m = x.size(0), k = x.size(1), n = channel_scale.size(0) / experts;
  const bool is_grouped = !channel_zero.has_value();
  const int k_groups = is_grouped ? groups_of_k_block_in(weight) : 0;
  STD_TORCH_CHECK(n % 8 == 0 && n > 0, op, ": N=", n, " must be a multiple of 8");
  STD_TORCH_CHECK(k % kBlockK == 0 && k > 0, op, ": K=", k, " must be a multiple of ", kBlockK);
  STD_TORCH_CHECK(k <= kMaxK, op, ": K=", k, " overflows int32; split the layer");
  STD_TORCH_CHECK(m <= kMaxRows && n <= kMaxRows, op, ": M=", m, ", N=", n, " are too large");
  STD_TORCH_CHECK(!group_scale.has_value() && !group_offset.has_value(), op,
                  ": on CUDA the groups are inside the packed weight (w4a8_layout.pack)");
  const int device = device_of(x);
  const int64_t weight_blocks = (n + kBlockN - 1) / kBlockN;
  check_tensor(op, "x", x, device, ScalarType::Char, {m, k});
  const Card& card = card_of(device);
  STD_TORCH_CHECK(card.capability >= kOldest, op,
                  ": the kernels need a GPU of compute capability 8.0 or later; this one has ",
                  card.capability / 10, ".", card.capability % 10);
  check_tensor(op, "x_scale", x_scale, device, ScalarType::Float, {m});
  check_tensor(op, "x_row_sum", x_row_sum, device, ScalarType::Int, {m});
  check_tensor(op, "weight", weight, device, ScalarType::Byte,
               {experts * weight_blocks, k / kBlockK, kCodeBytes + k_groups * kParamBytes});
  STD_TORCH_CHECK(is_grouped || !residual.has_value(), op,
                  ": a residual belongs to a weight with groups");
  if (residual.has_value())
    check_tensor(op, "residual", *residual, device, ScalarType::Byte,
                 {experts * weight_blocks, k / kBlockK, kCodeBytes});
  STD_TORCH_CHECK(residual.has_value() || !use_residual.has_value(), op,
                  ": use_residual is given, but no residual");
  // A flag may be a part of a larger tensor, since only its 4 bytes are read.
  if (use_residual.has_value())
    check_tensor(op, "use_residual", *use_residual, device, ScalarType::Int, {1}, 4);
  check_tensor(op, "channel_scale", channel_scale, device, ScalarType::Float, {experts * n});
  if (!is_grouped)
    check_tensor(op, "channel_zero", *channel_zero, device, ScalarType::Float, {experts * n});
  if (bias.has_value()) check_tensor(op, "bias", *bias, device, bias->scalar_type(), {experts * n});
  STD_TORCH_CHECK(workspace.has_value(), op, ": on CUDA a workspace is needed (ops.workspace)");
  const int64_t ints = kCounters + int64_t{card.multiprocessors} * kMaxTileInts;
  check_tensor(op, "workspace", *workspace, device, ScalarType::Int, {ints});

  const std::vector<int64_t> shape = {m, n};
  Tensor out = torch::stable::new_empty(x, shape, out_dtype);
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
      .bias_type = bias.has_value() ? bias_type(op, *bias) : Bias::kNone,
      .out_type = out_dtype == ScalarType::BFloat16 ? Output::kBfloat16 : Output::kFloat16,
      .x = static_cast<const int8_t*>(x.data_ptr()),
  };
  return {params, out, device, k_groups, residual.has_value()};
}

Tensor compute(const Arguments& arguments, const Caps* caps) {
  const auto [params, out, device, k_groups, is_nested] = checked(kOp, arguments, 1);
  if (params.m == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(device);
  switch (k_groups) {
    case 0:
      run<Weights::kChannel>(params, device, caps);
      break;
    case 1:
      run_grouped<Weights::kG128, Weights::kNestedG128>(is_nested, params, device, caps);
      break;
    case 2:
      run_grouped<Weights::kG64, Weights::kNestedG64>(is_nested, params, device, caps);
      break;
    default:
      run_grouped<Weights::kG32, Weights::kNestedG32>(is_nested, params, device, caps);
  }
  return out;
}

}  // namespace

Tensor w4a8_gemm(const Tensor& x, const Tensor& x_scale, const Tensor& x_row_sum,
                 const Tensor& weight, const Tensor& channel_scale,
                 const std::optional<Tensor>& channel_zero,
                 const std::optional<Tensor>& group_scale,
                 const std::optional<Tensor>& group_offset, const std::optional<Tensor>& bias,
                 ScalarType out_dtype, const std::optional<Tensor>& workspace,
                 const std::optional<Tensor>& residual, const std::optional<Tensor>& use_residual) {
  return compute({x, x_scale, x_row_sum, weight, channel_scale, channel_zero, group_scale,
                  group_offset, bias, out_dtype, workspace, residual, use_residual},
                 nullptr);
}

Tensor w4a8_gemm_portable(
    const Tensor& x, const Tensor& x_scale, const Tensor& x_row_sum, const Tensor& weight,
    const Tensor& channel_scale, const std::optional<Tensor>& channel_zero,
    const std::optional<Tensor>& group_scale, const std::optional<Tensor>& group_offset,
    const std::optional<Tensor>& bias, ScalarType out_dtype, const std::optional<Tensor>& workspace,
    const std::optional<Tensor>& residual, const std::optional<Tensor>& use_residual,
    int64_t shared_bytes, int64_t multiprocessors) {
  const Caps caps{shared_bytes, multiprocessors};
  return compute({x, x_scale, x_row_sum, weight, channel_scale, channel_zero, group_scale,
                  group_offset, bias, out_dtype, workspace, residual, use_residual},
                 &caps);
}

Tensor w4a8_gemm_experts(const Tensor& x, const Tensor& x_scale, const Tensor& x_row_sum,
                         const Tensor& tiles, const Tensor& tile_expert, int64_t experts,
                         const Tensor& weight, const Tensor& channel_scale,
                         const std::optional<Tensor>& channel_zero,
                         const std::optional<Tensor>& bias, ScalarType out_dtype,
                         const std::optional<Tensor>& workspace,
                         const std::optional<Tensor>& residual,
                         const std::optional<Tensor>& use_residual) {
  const std::optional<Tensor> none;
  const auto [params, out, device, k_groups, is_nested] =
      checked(kExpertsOp,
              {x, x_scale, x_row_sum, weight, channel_scale, channel_zero, none, none, bias,
               out_dtype, workspace, residual, use_residual},
              experts);
  const int64_t most = tile_expert.dim() == 1 ? tile_expert.size(0) : 0;
  const int64_t tokens = most > 0 ? params.m / most : 0;
  if (params.m == 0) return out;
  STD_TORCH_CHECK(std::ranges::count(kExpertTiles, tokens) == 1 && tokens * most == params.m,
                  kExpertsOp, ": x is ", shape_text(x), " and tile_expert ",
                  shape_text(tile_expert), ", expected 16, 64 or 128 rows for each tile");
  STD_TORCH_CHECK(k_groups <= 1, kExpertsOp, ": the weight is ", shape_text(weight),
                  ", expected no groups or groups of 128");
  check_tensor(kExpertsOp, "tiles", tiles, device, ScalarType::Int, {1}, 4);
  check_tensor(kExpertsOp, "tile_expert", tile_expert, device, ScalarType::Int, {most}, 4);
  const ExpertParams all{params, static_cast<const int32_t*>(tiles.data_ptr()),
                         static_cast<const int32_t*>(tile_expert.data_ptr()),
                         static_cast<int>(most)};
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (k_groups == 0) {
    run_experts<Weights::kChannel>(all, tokens, device);
  } else if (is_nested) {
    run_experts<Weights::kNestedG128>(all, tokens, device);
  } else {
    run_experts<Weights::kG128>(all, tokens, device);
  }
  return out;
}

}  // namespace qoq

"""Layers whose inputs, or whose slices of them, are no multiple of a group."""

import pytest
import torch
from plugin_units import qoq_config, tensor_parallel, vllm_config
from qoq_checkpoints import NESTED, nested
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.utils import AutoWeightsLoader

from vllm_qoq.numerics import GROUP_SIZES, reference
from vllm_qoq.ops import linear_ops, w4a8_layout
from vllm_qoq.serving.methods.input_slice import InputSlice

# 5.5 groups of 128, 11 of 64, 22 of 32; half of them are 2.75, 5.5, 11, a quarter 1.375, 2.75, 5.5
N, K = 48, 704
SIZES = pytest.mark.parametrize("group_size", GROUP_SIZES)
ROUTING = {"prefill": "w8a8", "decode": [{"set": "w4a8"}]}


def stored(group_size):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(3))
    return nested(weight + 3, group_size)  # zeros beside such a group would widen its range


class Model(torch.nn.Module):
    """A row-parallel layer, whose inputs the ranks share out."""

    def __init__(self, config):
        super().__init__()
        common = {"quant_config": config, "params_dtype": torch.bfloat16}
        self.row = RowParallelLinear(K, N, bias=False, prefix="row", **common)


def loaded(rank, size, group_size):
    base, residual = stored(group_size)
    tensors = {f"w4a8.row.{leaf}": t for leaf, t in base.items()}
    tensors |= {f"w8a8.row.{leaf}": t for leaf, t in residual.items()}
    sets = NESTED | {"w4a8": {"quant_method": "qoq_linear", "group_size": group_size}}
    config = qoq_config(sets=sets, routing=ROUTING)
    with tensor_parallel(rank, size, vllm_config()):
        model = Model(config)
        renamed = config.get_cache_scale_mapper().apply(tensors.items())
        AutoWeightsLoader(model).load_weights(renamed)
        return model.row


@SIZES
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_computes_with_its_own_inputs_of_groups_that_it_shares(size, group_size):
    base, residual = stored(group_size)
    whole = {"w4a8": reference.dequantize(base), "w8a8": reference.dequantize(base | residual)}
    assert base["group_scale"].shape == (N, -(-K // group_size))
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(4)).bfloat16()
    for rank in range(size):
        layer = loaded(rank, size, group_size)
        layer.quant_method.process_weights_after_loading(layer)
        quantized = reference.quantize_per_token(x.chunk(size, dim=1)[rank])
        codes, scale, _ = quantized
        for name, weight in whole.items():
            own = weight.chunk(size, dim=1)[rank]
            expected = (codes.double() * scale.double()[:, None]) @ own.double().t()
            y = getattr(layer, name).apply_int8(quantized, torch.bfloat16, False).double()
            assert (y - expected).abs().max() <= expected.abs().max() * 2**-8, (rank, name)


@SIZES
@pytest.mark.parametrize("use_residual", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_form_of_the_kernels_has_whole_blocks_and_gives_the_same(
    size, use_residual, group_size
):
    """The CPU op takes weights in the order of the CUDA kernel, too."""
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(4)).bfloat16()
    for rank in range(size):
        layer = loaded(rank, size, group_size)  # as loaded: its weights are not in their last form
        base, own = layer.w4a8, layer.w8a8
        method = own.linear_method
        assert isinstance(method.inputs, InputSlice)
        weight = base.linear_method._packed(base)
        assert weight.shape[2] == w4a8_layout.block_bytes(group_size)
        residual = w4a8_layout.pack(method._whole_blocks(own))
        codes, scale, row_sum = reference.quantize_per_token(x.chunk(size, dim=1)[rank])
        y = linear_ops.w4a8_gemm(
            method.inputs.whole_blocks_of_tokens(codes),
            scale,
            row_sum,
            weight,
            base.channel_scale.data,
            None,
            None,
            None,
            None,
            torch.bfloat16,
            None,
            residual,
            torch.tensor([use_residual], dtype=torch.int32),
        )
        layer.quant_method.process_weights_after_loading(layer)
        plain = layer.w8a8 if use_residual else layer.w4a8
        quantized = (codes, scale, row_sum)
        assert torch.equal(y, plain.apply_int8(quantized, torch.bfloat16, False))

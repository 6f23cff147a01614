"""A last group that has fewer inputs than the others."""

import pytest
import torch

from vllm_qoq.numerics import GROUP_SIZES, reference
from vllm_qoq.numerics.packing import pack_nibbles
from vllm_qoq.quantizer import gptq, hessian
from vllm_qoq.quantizer.grid import TwoLevel
from vllm_qoq.quantizer.strength import _rounded_weight

N, K = 16, 208
SIZES = pytest.mark.parametrize("size", GROUP_SIZES)


@SIZES
def test_a_smaller_last_group_means_what_the_first_columns_of_a_whole_one_mean(size):
    random = torch.Generator().manual_seed(0)
    whole_groups = -(-K // size)
    codes = torch.randint(16, (N, whole_groups * size), generator=random)
    scale = torch.randint(1, 14, (N, whole_groups), generator=random, dtype=torch.uint8)
    offset = (-8 * scale.int()).to(torch.int8)
    whole = reference.level1_int8(pack_nibbles(codes), scale, offset)
    assert torch.equal(
        reference.level1_int8(pack_nibbles(codes[:, :K]), scale, offset), whole[:, :K]
    )


@SIZES
@pytest.mark.parametrize("clip", [False, True])
def test_what_is_not_there_neither_widens_the_range_nor_costs(clip, size):
    """With a group of these weights and zeros, a step would be 9 / 15 in place of 2 / 15."""
    weight = 8 + 2 * torch.rand(N, K, generator=torch.Generator().manual_seed(1)) - 1
    last = K // size * size
    grid = TwoLevel(N, K, torch.device("cpu"), clip=clip, width=size)
    gptq.quantize(weight, hessian.factored(torch.eye(K), "layer"), grid)
    error = (grid.dequantized() - weight).abs()
    level1 = weight.abs().amax() / 119
    assert error[:, last:].max() <= 2 / 15 / 2 + level1
    assert grid.tensors(torch.bfloat16)["group_scale"].shape == (N, -(-K // size))
    stored = grid.tensors(torch.bfloat16)
    assert torch.equal(reference.dequantize(stored), grid.dequantized())
    # The search of a row's scale sees whole groups and the smaller one alike.
    alone = TwoLevel(N, K - last, torch.device("cpu"), clip=clip, width=size)
    gptq.quantize(weight[:, last:], hessian.factored(torch.eye(K - last), "layer"), alone)
    assert error[:, last:].square().mean() <= 2 * (
        (alone.dequantized() - weight[:, last:]).square().mean()
    )


@SIZES
def test_smoothing_rounds_a_smaller_last_group_by_its_own_range(size):
    weight = 8 + torch.rand(N, K, generator=torch.Generator().manual_seed(2))
    rounded = _rounded_weight(weight, 4, size)
    assert (rounded - weight).abs().max() <= 1 / 15 / 2 + 1e-5

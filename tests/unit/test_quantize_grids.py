"""Rounding: the integer grids, their stored form, and GPTQ on them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounded_layers import correlated_inputs, fill, output_error

from vllm_qoq.numerics import GROUP_SIZES, reference
from vllm_qoq.quantizer import QuantizeError, gptq
from vllm_qoq.quantizer.grid import PROTECTED
from vllm_qoq.quantizer.sets import SetKind, dequantize

KINDS = [SetKind("w4a8", 128), SetKind("w4a8", -1), SetKind("w4a16", 128), SetKind("w8a8", 128)]
KINDS += [SetKind("w4a16", -1), SetKind("w4a16", 32)]
FINE = [SetKind("w4a8", 64), SetKind("w4a8", 32)]
EVERY_KIND = pytest.mark.parametrize(
    "kind", [*KINDS, *FINE], ids=lambda k: f"{k.name} g{k.group_size}"
)


def weights(n=16, k=256, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def quantized(kind, weight, hessian=None, clip=True, passes=gptq.PASSES):
    grid = kind.grid(weight, torch.bfloat16, clip)
    fill(weight, hessian, grid, passes)
    return grid


@EVERY_KIND
@pytest.mark.parametrize("clip", [False, True])
def test_the_stored_tensors_stand_for_what_the_grid_says(kind, clip):
    grid = quantized(kind, weights(), clip=clip)
    stored = grid.tensors(torch.bfloat16)
    assert torch.equal(dequantize(stored), grid.dequantized())


@EVERY_KIND
def test_gptq_loses_less_of_the_output_than_rounding(kind):
    weight, x = weights(), correlated_inputs()
    hessian = x.t() @ x / len(x)
    errors = [
        output_error(weight, quantized(kind, weight, known).dequantized(), hessian)
        for known in (None, hessian)
    ]
    assert errors[1] < 0.8 * errors[0]
    y, lost = x @ weight.t(), x @ (weight - quantized(kind, weight, hessian).dequantized()).t()
    assert errors[1] == pytest.approx(float(lost.norm() / y.norm()), rel=1e-3)


@EVERY_KIND
def test_clipping_never_costs_weight_error(kind):
    weight = weights(32)
    weight[:, 7] *= 6
    errors = [
        (quantized(kind, weight, clip=clip).dequantized() - weight).square().sum()
        for clip in (False, True)
    ]
    # the scale of w4a8's level 1 is chosen for fewer candidates of level 2 than are tried later
    assert errors[1] <= errors[0] * 1.001


@pytest.mark.parametrize("kind", KINDS[2:], ids=lambda k: f"{k.name} g{k.group_size}")
def test_compressed_tensors_reads_what_we_pack(kind):
    from compressed_tensors.compressors import unpack_from_int32

    grid = quantized(kind, weights())
    stored = grid.tensors(torch.bfloat16)
    if kind.name == "w8a8":
        assert stored["weight"].dtype == torch.int8 and stored["weight_scale"].shape == (16, 1)
        codes = stored["weight"]
    else:
        shape = torch.Size(stored["weight_shape"].tolist())
        codes = unpack_from_int32(stored["weight_packed"], 4, shape)
    scale = stored["weight_scale"].float()
    theirs = codes.float() * scale.repeat_interleave(256 // scale.shape[1], 1)
    assert torch.equal(theirs, grid.dequantized())


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([1e-6, 1.0, 1e4]),
    kind=st.sampled_from(["normal", "one outlier", "all equal", "zeros", "positive", "two values"]),
    clip=st.booleans(),
    size=st.sampled_from(GROUP_SIZES),
)
def test_every_group_keeps_the_protective_range(rows, groups, seed, spread, kind, clip, size):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, size * groups, generator=random)
    if kind == "one outlier":
        weight[0, 5] = 1000
    elif kind == "all equal":
        weight[:] = weight[0, 0]
    elif kind == "zeros":
        weight[:] = 0
    elif kind == "positive":
        weight.abs_()
    elif kind == "two values":
        weight = weight.sign()
    weight *= spread
    grid = quantized(SetKind("w4a8", size), weight, clip=clip)
    stored = grid.tensors(torch.bfloat16)
    scale, offset = stored["group_scale"].int(), stored["group_offset"].int()
    assert scale.min() >= 1 and scale.max() <= 16
    # not only for the codes that occur: a kernel may compute with any
    assert offset.min() >= -128 and (offset + 15 * scale).max() <= 127
    assert stored["channel_scale"].min() > 0 and stored["channel_scale"].isfinite().all()
    result = reference.dequantize(stored)
    assert result.isfinite().all()
    if not clip:
        step = stored["channel_scale"].max() * scale.max()
        assert (result - weight).abs().max() <= step * 0.51 + stored["channel_scale"].max() * 0.51


@pytest.mark.parametrize("size", GROUP_SIZES)
def test_brute_force_finds_the_best_group(size):
    """Against every scale and offset there is, for one group with level 1 as it was chosen."""
    weight = weights(1, size, seed=3)
    weight[0, 9] = 5
    grid = quantized(SetKind("w4a8", size), weight)
    level1 = weight / grid.channel_scale[:, None]
    best = min(
        float(((((level1 - o) / s).round().clamp(0, 15) * s + o) - level1).square().sum())
        for s in range(1, 17)
        for o in range(-128, 128 - 15 * s)
    )
    found = float((grid.dequantized() / grid.channel_scale[:, None] - level1).square().sum())
    assert found <= best * 1.02


def test_smaller_groups_lose_less():
    weight, x = weights(64), correlated_inputs()
    hessian = x.t() @ x / len(x)
    errors = [
        output_error(weight, quantized(kind, weight, hessian).dequantized(), hessian)
        for kind in (KINDS[0], *FINE)
    ]
    assert errors[2] < 0.95 * errors[1] < 0.9 * errors[0]


def test_a_group_is_chosen_from_weights_that_carry_the_errors_before_it():
    """A grid that is chosen for a whole block of 128 columns at once would not see them."""
    weight, x = weights(64, 128), correlated_inputs(128)
    grid = SetKind("w4a8", 32).grid(weight, torch.bfloat16, True)
    seen, start = [], grid.start
    grid.start = lambda part, cost, first: seen.append(part.clone()) or start(part, cost, first)
    fill(weight, x.t() @ x / len(x), grid)
    assert [part.shape for part in seen] == [(64, 32)] * 4
    assert torch.equal(seen[0], weight[:, :32])
    assert not any(
        torch.equal(part, weight[:, 32 * i :][:, :32]) for i, part in enumerate(seen) if i
    )


def test_the_error_of_a_column_is_passed_on():
    """Of two equal input channels the second makes up for what the first lost."""
    weight, x = weights(64, 128), torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0]
    pairs = [
        (quantized(SetKind("w4a8", 128), weight, known).dequantized() - weight)[:, :2].sum(1)
        for known in (None, x.t() @ x / 256)
    ]
    # two errors of one step each, or one
    assert pairs[1].square().mean() < 0.65 * pairs[0].square().mean()


@EVERY_KIND
def test_descent_finds_what_gptq_left(kind):
    weight, x = weights(), correlated_inputs()
    hessian = x.t() @ x / len(x)
    errors = []
    for passes in (0, 1, 3):
        result = quantized(kind, weight, hessian, passes=passes).dequantized()
        errors.append(output_error(weight, result, hessian))
    assert errors[2] < errors[1] < 0.99 * errors[0]


def test_channels_that_are_never_used_do_not_break_it():
    weight, x = weights(), correlated_inputs()
    x[:, 10:40] = 0
    grid = quantized(KINDS[0], weight, x.t() @ x / len(x))
    assert grid.dequantized().isfinite().all()


def test_a_hessian_that_cannot_be_factored_is_refused_by_layer():
    hessian = torch.full((256, 256), float("nan"))
    with pytest.raises(QuantizeError, match=r"layer: the inputs.*more text"):
        quantized(KINDS[0], weights(), hessian)


def test_level1_stays_within_the_protected_range_without_clipping():
    grid = quantized(KINDS[0], weights(), clip=False)
    level1 = weights() / grid.channel_scale[:, None]
    assert level1.abs().max() <= PROTECTED * (1 + 1e-6)

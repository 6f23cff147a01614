"""The page of the quantized KV cache: what a vector becomes, and where its bytes are."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_qserve import from_qserve, to_qserve

from vllm_qoq.checkpoint.kv_config import Bits
from vllm_qoq.cli import arguments
from vllm_qoq.numerics import kv_layout
from vllm_qoq.numerics.kv_layout import (
    HEAD_SIZES,
    WIDTHS,
    dequantize,
    max_error,
    quantize,
    slot_bytes,
)

FP16_MAX = 65504.0
FORMATS = pytest.mark.parametrize(
    ("bits", "head_size"), [(bits, size) for bits in WIDTHS for size in HEAD_SIZES]
)
BITS = pytest.mark.parametrize("bits", [4, 8])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(bits, head_size, tokens=32, blocks=3, heads=2, dtype=torch.bfloat16):
    """Pages of random bytes in which every slot but the first and last was written."""
    head_bytes = tokens * slot_bytes(head_size, bits)
    generator = torch.Generator().manual_seed(1)
    pages = torch.randint(0, 256, (blocks, heads, head_bytes), generator=generator).byte()
    slots = torch.randperm(blocks * tokens - 2, generator=generator) + 1
    key, value = (random(len(slots), heads, head_size, seed=s).to(dtype) for s in (2, 3))
    kv_layout.write(pages, slots, key, value, bits)
    return pages, slots, key, value


@FORMATS
def test_a_token_takes_the_bytes_that_qserve_gives_it(bits, head_size):
    key, value = {4: (4, 4), 8: (8, 8), "k8v4": (8, 4)}[bits]
    assert slot_bytes(head_size, bits) == head_size * key // 8 + 4 + head_size * value // 8 + 4
    assert 2 * 2 * 128 / slot_bytes(128, 4) > 3.7  # bf16 over 4 bits


@FORMATS
def test_the_records_of_a_page_are_a_permutation_of_its_bytes(bits, head_size):
    for tokens in (16, 64, 80):
        positions = kv_layout.record_positions(tokens, head_size, bits).flatten()
        expected = torch.arange(tokens * slot_bytes(head_size, bits))
        assert torch.equal(positions.sort().values, expected)


@pytest.mark.parametrize(
    ("token", "byte", "expected"),
    # 4 bits, head 128, N = 64: V begins at 64 * 64, its rows have 128 bytes
    [
        (0, 0, 4096),
        (0, 1, 4097),
        (1, 0, 4098),  # alternating 16-bit units
        (1, 1, 4099),
        (0, 2, 4100),
        (0, 63, 4096 + 4 * 31 + 1),
        (2, 0, 4096 + 128 + 32),  # row 1 is rotated by 32
        (7, 0, 4096 + 3 * 128 + (2 + 96)),
        (6, 63, 4096 + 3 * 128 + (125 + 96) % 128),  # past the end of the row
        (8, 0, 4096 + 4 * 128),  # row 4 is not rotated
    ],
)
def test_the_bytes_of_v_are_where_the_kernels_expect_them(token, byte, expected):
    positions = kv_layout.record_positions(64, 128, 4)
    assert positions[token, 64 + 4 + byte] == expected


def test_k_and_the_numbers_are_row_after_row():
    positions = kv_layout.record_positions(64, 128, 4)
    assert positions[5, :64].tolist() == list(range(5 * 64, 6 * 64))
    k_numbers, v_numbers = positions[5, 64:68], positions[5, 132:136]
    assert k_numbers.tolist() == [2 * 64 * 64 + 5 * 4 + i for i in range(4)]
    assert v_numbers.tolist() == [2 * 64 * 64 + 64 * 4 + 5 * 4 + i for i in range(4)]


def test_rows_of_keys_and_values_have_their_own_sizes():
    """K of 8 bits and V of 4, head 128, N = 64: rows of 128 and, for a pair, of 128 bytes."""
    positions = kv_layout.record_positions(64, 128, "k8v4")
    assert positions.shape == (64, 128 + 4 + 64 + 4)
    assert positions[5, :128].tolist() == list(range(5 * 128, 6 * 128))
    values, numbers = 64 * 128, 64 * (128 + 64)
    assert positions[5, 128:132].tolist() == [numbers + 5 * 4 + i for i in range(4)]
    assert positions[7, 132].item() == values + 3 * 128 + (2 + 96)
    assert positions[6, 132 + 63].item() == values + 3 * 128 + (125 + 96) % 128
    assert positions[5, 196:].tolist() == [numbers + 64 * 4 + 5 * 4 + i for i in range(4)]


def test_a_checkpoint_may_ask_for_every_precision_of_the_page():
    assert set(get_args(Bits)) == {*WIDTHS, 16} == set(arguments.KV_BITS)
    assert set(get_args(kv_layout.QuantizedBits)) == set(WIDTHS)


@FORMATS
def test_what_is_written_is_read_back(bits, head_size):
    pages, slots, key, value = filled(bits, head_size)
    order = torch.tensor([2, 0, 1])
    keys, values = kv_layout.read(pages, order, 3 * 32 - 1, head_size, bits)
    at = {int(slot): i for i, slot in enumerate(slots)}
    for position in range(3 * 32 - 1):
        slot = int(order[position // 32]) * 32 + position % 32
        if slot in at:
            given = key[at[slot]], value[at[slot]]
            for read, vector, width in zip((keys, values), given, WIDTHS[bits], strict=True):
                assert torch.equal(read[position], dequantize(*quantize(vector, width)))


@FORMATS
def test_a_write_leaves_everything_else_alone(bits, head_size):
    pages, *_ = filled(bits, head_size)
    before = pages.clone()
    slots = torch.tensor([-1, 40, -1])
    new = random(3, 2, head_size, seed=9)
    kv_layout.write(pages, slots, new, new, bits)
    changed = kv_layout.record_positions(32, head_size, bits)[8]
    is_other = torch.ones_like(pages, dtype=torch.bool)
    is_other[1, :, changed] = False
    assert torch.equal(pages[is_other], before[is_other])
    for read, width in zip(
        kv_layout.read(pages, torch.tensor([1]), 9, head_size, bits), WIDTHS[bits], strict=True
    ):
        assert torch.equal(read[8], dequantize(*quantize(new[1], width)))


@FORMATS
def test_pages_hold_the_bytes_that_qserve_defines(bits, head_size):
    """From QServe's own definition, token by token: codes, then scales, then zeros."""
    pages, slots, key, value = filled(bits, head_size, tokens=64)
    pages_of_qserve = to_qserve(pages, head_size, bits)
    heads = 2
    for page, vectors, width in zip(pages_of_qserve, (key, value), WIDTHS[bits], strict=True):
        levels, row = 2**width - 1, head_size * width // 8
        for i in range(0, len(slots), 7):
            block, token = divmod(int(slots[i]), 64)
            for head in range(heads):
                x = vectors[i, head].float()
                span = x.max() - x.min()
                codes = (x * (levels / span) + -levels * x.min() / span).round().byte().tolist()
                if width == 4:
                    pairs = zip(codes[::2], codes[1::2], strict=True)
                    codes = [low | high << 4 for low, high in pairs]
                numbers = torch.stack([span / levels, -levels * x.min() / span]).half()
                scale, zero = numbers.view(torch.uint8).view(2, 2).tolist()
                at = head * 64 + token
                scales, zeros = heads * 64 * row, heads * 64 * (row + 2)
                assert page[block, at * row : (at + 1) * row].tolist() == codes
                assert page[block, scales + 2 * at :][:2].tolist() == scale
                assert page[block, zeros + 2 * at :][:2].tolist() == zero
    assert torch.equal(from_qserve(*pages_of_qserve, heads, head_size, bits), pages)


@given(
    bits=st.sampled_from([4, 8]),
    head_size=st.sampled_from(HEAD_SIZES),
    seed=st.integers(0, 2**32),
    spread=st.floats(-8, 5),
    offset=st.floats(-FP16_MAX, FP16_MAX, width=32),
    outlier=st.floats(-FP16_MAX, FP16_MAX, width=32),
)
@settings(max_examples=150, deadline=None)
def test_every_vector_comes_back_within_its_error(bits, head_size, seed, spread, offset, outlier):
    x = random(head_size, seed=seed) * 10**spread + offset
    x[seed % head_size] = outlier
    x.clamp_(-FP16_MAX, FP16_MAX)
    codes, scale, zero = quantize(x, bits)
    assert codes.max() <= 2**bits - 1 and scale > 0 and zero.isfinite()
    assert bool(((dequantize(codes, scale, zero) - x).abs() <= max_error(x, bits)).all())


@given(st.sampled_from([4, 8]), st.floats(1e-8, FP16_MAX), st.sampled_from([1, -1]))
@settings(max_examples=100, deadline=None)
def test_a_constant_keeps_its_value(bits, size, sign):
    x = torch.full((128,), sign * size)
    assert bool(((dequantize(*quantize(x, bits)) - x).abs() <= size / 1000).all())


@BITS
def test_zeros_stay_zeros(bits):
    assert torch.count_nonzero(dequantize(*quantize(torch.zeros(4, 128), bits))) == 0


@BITS
def test_infinities_are_clamped_and_others_survive(bits):
    x = random(2, 128)
    x[0, 3], x[0, 4] = float("inf"), float("-inf")
    back = dequantize(*quantize(x, bits))
    assert back.isfinite().all()
    assert back[0, 3] > 65000 and back[0, 4] < -65000
    assert bool(((back[1] - x[1]).abs() <= max_error(x[1], bits)).all())
    huge = torch.full((128,), 1e38)  # bf16 reaches further than fp16
    assert torch.allclose(dequantize(*quantize(huge, bits)), torch.tensor(FP16_MAX), rtol=1e-3)


@BITS
def test_a_nan_is_not_hidden(bits):
    x = random(2, 128)
    x[0, 7] = float("nan")
    back = dequantize(*quantize(x, bits))
    assert back[0].isnan().all() and back[1].isfinite().all()


@BITS
def test_the_step_is_a_part_of_the_range(bits):
    """The error that is allowed above is worth nothing if it is large."""
    x = random(64, 128)
    span = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    assert bool((max_error(x, bits) <= span / (2**bits - 1) * 0.8).all())


def test_sizes_that_are_not_served_are_refused():
    with pytest.raises(ValueError, match="head size 80"):
        slot_bytes(80, 4)
    with pytest.raises(ValueError, match="2 bits"):
        slot_bytes(128, 2)
    with pytest.raises(ValueError, match="'k4v8' bits; the page is defined for 4, 8 and 'k8v4'"):
        slot_bytes(128, "k4v8")
    with pytest.raises(ValueError, match="multiple of 16"):
        kv_layout.block_tokens(torch.zeros(1, 1, 8 * slot_bytes(64, 4)), 64, 4)
    with pytest.raises(ValueError, match="a block of 24 tokens"):
        kv_layout.record_positions(24, 64, 4)

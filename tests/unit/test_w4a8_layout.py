"""The packed weight of the CUDA GEMM, without a GPU."""

import pytest
import torch

from vllm_qoq.numerics import reference
from vllm_qoq.numerics.packing import pack_nibbles
from vllm_qoq.ops import linear_ops, w4a8_layout


def layer(n, k, grouped, seed=0):
    """Random codes and groups whose every W8 is an int8."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=generator)
    if not grouped:
        return pack_nibbles(codes), None, None
    scale = torch.randint(1, 17, (n, k // 128), generator=generator)
    low, high = -128, 127 - 15 * scale
    offset = low + (torch.rand(scale.shape, generator=generator) * (high - low + 1)).long()
    return pack_nibbles(codes), scale.to(torch.uint8), offset.to(torch.int8)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("n, k", [(64, 128), (8, 128), (200, 384), (128, 1024)])
def test_unpack_inverts_pack(n, k, grouped):
    stored = layer(n, k, grouped)
    packed = w4a8_layout.pack(*stored)
    assert packed.shape == (-(-n // 64), k // 128, 4224 if grouped else 4096)
    for got, expected in zip(w4a8_layout.unpack(packed, n), stored, strict=True):
        assert (got is None) == (expected is None)
        assert expected is None or torch.equal(got, expected)


def test_every_thread_finds_its_fragment():
    """Walks the block as csrc/gemm/hopper/kernel.cuh does, with wgmma's own fragment map."""
    qweight, scale, offset = layer(64, 256, True)
    packed = w4a8_layout.pack(qweight, scale, offset).numpy()
    weight = reference.level1_int8(qweight, scale, offset).numpy()
    for k_block in range(2):
        block = packed[0, k_block]
        for thread in range(128):
            warp, lane = divmod(thread, 32)
            params = block[4096 + thread // 4 * 4 :][:4]
            for half in range(2):
                codes = block[half * 2048 + thread * 16 :][:16].reshape(4, 4)
                for step in range(2):
                    for register in range(4):
                        row_half, k_half = register % 2, register // 2
                        word = codes[2 * step + row_half]
                        nibbles = word >> 4 if k_half else word & 15
                        got = nibbles.astype(int) * params[2 * row_half] + params[2 * row_half + 1]
                        row = 16 * warp + lane // 4 + 8 * row_half
                        k = 128 * k_block + 64 * half + 32 * step + 16 * k_half + 4 * (lane % 4)
                        assert (got - 128 == weight[row, k : k + 4]).all()
                        assert got.max() <= 255


@pytest.mark.parametrize("grouped", [True, False])
def test_the_cpu_op_reads_packed_weights(grouped):
    n, k, m = 72, 256, 3
    stored = layer(n, k, grouped)
    x, x_scale, x_row_sum = linear_ops.quantize_per_token(torch.randn(m, k))
    scale, zero = torch.rand(n) + 0.5, None if grouped else torch.randn(n)
    common = (x, x_scale, x_row_sum)
    expected = linear_ops.w4a8_gemm(
        *common, stored[0], scale, zero, *stored[1:], None, torch.bfloat16
    )
    packed = w4a8_layout.pack(*stored)
    got = torch.ops.qoq.w4a8_gemm(*common, packed, scale, zero, None, None, None, torch.bfloat16)
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="packed weight has its groups"):
        linear_ops.w4a8_gemm(*common, packed, scale, zero, stored[0], None, None, torch.bfloat16)


def test_pack_refuses_an_odd_k():
    with pytest.raises(ValueError, match="192 inputs are not a multiple of 128"):
        w4a8_layout.pack(torch.zeros(8, 96, dtype=torch.uint8))

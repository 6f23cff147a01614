"""The packed weight of the CUDA GEMM, without a GPU."""

import pytest
import torch

from vllm_qoq.numerics import GROUP_SIZES, reference
from vllm_qoq.numerics.packing import pack_nibbles
from vllm_qoq.ops import linear_ops, w4a8_layout

GROUPS = pytest.mark.parametrize("group_size", [0, *GROUP_SIZES])


def layer(n, k, group_size, seed=0):
    """Random codes and groups whose every W8 is an int8; no groups with a size of 0."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=generator)
    if not group_size:
        return pack_nibbles(codes), None, None
    scale = torch.randint(1, 17, (n, k // group_size), generator=generator)
    low, high = -128, 127 - 15 * scale
    offset = low + (torch.rand(scale.shape, generator=generator) * (high - low + 1)).long()
    return pack_nibbles(codes), scale.to(torch.uint8), offset.to(torch.int8)


@GROUPS
@pytest.mark.parametrize("n, k", [(64, 128), (8, 128), (200, 384), (128, 1024)])
def test_unpack_inverts_pack(n, k, group_size):
    stored = layer(n, k, group_size)
    packed = w4a8_layout.pack(*stored)
    size = {0: 4096, 128: 4224, 64: 4352, 32: 4608}[group_size]
    assert packed.shape == (-(-n // 64), k // 128, size)
    assert w4a8_layout.block_bytes(group_size) == size
    assert w4a8_layout.group_size_of_block(size) == group_size
    for got, expected in zip(w4a8_layout.unpack(packed, n), stored, strict=True):
        assert (got is None) == (expected is None)
        assert expected is None or torch.equal(got, expected)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_thread_finds_its_fragment(group_size):
    """Walks the block as csrc/gemm/hopper/kernel.cuh does, with wgmma's own fragment map."""
    qweight, scale, offset = layer(64, 256, group_size)
    groups = 128 // group_size
    packed = w4a8_layout.pack(qweight, scale, offset).numpy()
    weight = reference.level1_int8(qweight, scale, offset).numpy()
    for k_block in range(2):
        block = packed[0, k_block]
        for thread in range(128):
            warp, lane = divmod(thread, 32)
            params_of = block[4096 + thread // 4 * 4 * groups :][: 4 * groups].reshape(groups, 4)
            for half in range(2):
                codes = block[half * 2048 + thread * 16 :][:16].reshape(4, 4)
                for step in range(2):
                    params = params_of[(64 * half + 32 * step) // group_size]
                    for register in range(4):
                        row_half, k_half = register % 2, register // 2
                        word = codes[2 * step + row_half]
                        nibbles = word >> 4 if k_half else word & 15
                        got = nibbles.astype(int) * params[2 * row_half] + params[2 * row_half + 1]
                        row = 16 * warp + lane // 4 + 8 * row_half
                        k = 128 * k_block + 64 * half + 32 * step + 16 * k_half + 4 * (lane % 4)
                        assert (got - 128 == weight[row, k : k + 4]).all()
                        assert got.max() <= 255


@GROUPS
def test_the_cpu_op_reads_packed_weights(group_size):
    n, k, m = 72, 256, 3
    stored = layer(n, k, group_size)
    x, x_scale, x_row_sum = linear_ops.quantize_per_token(torch.randn(m, k))
    scale, zero = torch.rand(n) + 0.5, None if group_size else torch.randn(n)
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


def test_pack_refuses_groups_of_another_size():
    qweight, scale, offset = layer(8, 256, 64)
    with pytest.raises(ValueError, match="3 groups of 256 inputs"):
        w4a8_layout.pack(qweight, scale[:, :3], offset[:, :3])

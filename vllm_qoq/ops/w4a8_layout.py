"""The order in which the CUDA GEMM reads 4-bit weights (csrc/gemm/w4a8_config.h).

A block is 64 output channels x 128 inputs, and with groups of 128, 64 or 32 inputs their scales and
offsets. A warpgroup of 128 threads multiplies it in four steps of 32 inputs; each thread finds the
codes of two steps in 16 bytes, as words that hold the first 16 inputs of a step in the low
nibbles and the others in the high ones:

    codes   [half of k][warp][row r][column c][step][row + 0 or 8][byte]
            channel 16 warp + 8 (0 or 1) + r, input 64 half + 32 step + 4 c + byte (+ 16)
    params  [warp][row r][group][scale and offset + 128 of row r, then of row r + 8]
"""

from __future__ import annotations

import torch

from vllm_qoq.numerics import GROUP_SIZES, group_size_of
from vllm_qoq.numerics.packing import pack_nibbles, unpack_nibbles

BLOCK_N = 64
BLOCK_K = 128
CODE_BYTES = BLOCK_N * BLOCK_K // 2
PARAM_BYTES = 2 * BLOCK_N  # of one group of inputs


def pack(
    qweight: torch.Tensor,
    group_scale: torch.Tensor | None = None,
    group_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bring a layer's codes, and groups, into uint8 [ceil(N / 64), K / 128, bytes].

    qweight uint8 [N, K / 2], group_scale uint8 and group_offset int8 [N, K / G] as in
    `vllm_qoq.checkpoint.format`; channels past the last are zero. A block has `block_bytes(G)`,
    where G is 128, 64 or 32, and 0 without groups. Works on any device; a layer is packed once. A
    nested set's qresidual, which has no groups, is packed as codes are.

    Raises ValueError for a K that is no multiple of 128, and for another number of groups.
    """
    n, k = qweight.shape[0], 2 * qweight.shape[1]
    if k % BLOCK_K or k == 0:
        raise ValueError(f"{k} inputs are not a multiple of {BLOCK_K}, as the GEMM on CUDA needs")
    rows = -(-n // BLOCK_N) * BLOCK_N
    codes = _padded(unpack_nibbles(qweight), rows)
    # The dimensions are blocks, warp, + 8, r; and blocks of k, half, step, + 16, c, byte.
    fields = codes.view(-1, 4, 2, 8, k // BLOCK_K, 2, 2, 2, 4, 4)
    ordered = fields.permute(0, 4, 5, 1, 3, 8, 6, 2, 9, 7)
    # Neighbours become one byte, the first in the low nibble: that is where + 16 has gone.
    packed = pack_nibbles(ordered.reshape(rows // BLOCK_N, k // BLOCK_K, BLOCK_N * BLOCK_K))
    if group_scale is None or group_offset is None:
        return packed
    groups = group_scale.shape[1]
    if group_size_of(k, groups) is None:
        raise ValueError(f"{groups} groups of {k} inputs are of no size that there is")
    offset = (group_offset.to(torch.int16) + 128).to(torch.uint8)
    params = torch.stack((_padded(group_scale, rows), _padded(offset, rows)), dim=-1)
    # The dimensions are blocks, warp, + 8, r; and blocks of k, group, which parameter.
    params = params.view(-1, 4, 2, 8, k // BLOCK_K, groups * BLOCK_K // k, 2)
    params = params.permute(0, 4, 1, 3, 5, 2, 6)
    return torch.cat((packed, params.reshape(*packed.shape[:2], -1)), dim=-1)


def unpack(
    packed: torch.Tensor, n: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Undo `pack`: returns qweight, group_scale and group_offset of the first n channels."""
    blocks, k_blocks, size = packed.shape
    codes = unpack_nibbles(packed[..., :CODE_BYTES])
    fields = codes.reshape(blocks, k_blocks, 2, 4, 8, 4, 2, 2, 4, 2)
    rows = fields.permute(0, 3, 7, 4, 1, 2, 6, 9, 5, 8).reshape(blocks * BLOCK_N, -1)
    qweight = pack_nibbles(rows[:n])
    if size == CODE_BYTES:
        return qweight, None, None
    params = packed[..., CODE_BYTES:].reshape(blocks, k_blocks, 4, 8, -1, 2, 2)
    params = params.permute(0, 2, 5, 3, 1, 4, 6).reshape(blocks * BLOCK_N, -1, 2)[:n]
    offset = (params[..., 1].to(torch.int16) - 128).to(torch.int8)
    return qweight, params[..., 0].contiguous(), offset


def block_bytes(group_size: int) -> int:
    """Give the size of a block in bytes; a group size of 0 stands for no groups."""
    return CODE_BYTES + (BLOCK_K // group_size * PARAM_BYTES if group_size else 0)


def group_size_of_block(size: int) -> int | None:
    """Find the group size of a block of so many bytes, 0 for no groups; None for no block."""
    return next((group for group in (0, *GROUP_SIZES) if block_bytes(group) == size), None)


def _padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Append rows of zeros to `rows`, so that there are `count` in all."""
    if rows.shape[0] == count:
        return rows
    return torch.cat((rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])))

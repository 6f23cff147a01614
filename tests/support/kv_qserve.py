"""QServe's KV pages, to and from ours: what ties the bytes of a page to QServe's definition.

QServe keeps K and V apart. A page of either, for N = 64 tokens, H heads of size D and B = D *
bits / 8 bytes of codes a token, is (qserve/kernels/csrc/fused_attention/kvCacheUtils.h)

    codes   uint8 [H, N, B]    4 bits: channel 2i in the low nibble of byte i, 2i + 1 in the high
    scales  fp16  [H, N]
    zeros   fp16  [H, N]

one after the other, uint8 [H * N * (B + 4)].
"""

from __future__ import annotations

import torch

from vllm_qoq.numerics.kv_layout import (
    QuantizedBits,
    block_tokens,
    code_bytes,
    record_positions,
)


def to_qserve(
    pages: torch.Tensor, head_size: int, bits: QuantizedBits
) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [num_blocks, H, head_bytes]  ->  K and V pages, uint8 [num_blocks, H * N * (B + 4)]."""
    positions = record_positions(block_tokens(pages, head_size, bits), head_size, bits)
    records = pages[:, :, positions.flatten()].unflatten(-1, positions.shape)
    rows = code_bytes(head_size, bits)
    halves = records.split([row + 4 for row in rows], dim=-1)
    key, value = (
        torch.cat([part.flatten(1) for part in half.split((row, 2, 2), dim=-1)], dim=1)
        for half, row in zip(halves, rows, strict=True)
    )
    return key, value


def from_qserve(
    key: torch.Tensor, value: torch.Tensor, num_kv_heads: int, head_size: int, bits: QuantizedBits
) -> torch.Tensor:
    """The inverse: K and V pages to uint8 [num_blocks, H, head_bytes]."""
    rows = code_bytes(head_size, bits)
    tokens = key.shape[1] // (num_kv_heads * (rows[0] + 4))
    halves = [
        torch.cat(
            [
                part.view(-1, num_kv_heads, tokens, width)
                for part, width in zip(
                    page.split([num_kv_heads * tokens * width for width in (row, 2, 2)], dim=1),
                    (row, 2, 2),
                    strict=True,
                )
            ],
            dim=-1,
        )
        for page, row in zip((key, value), rows, strict=True)
    ]
    records = torch.cat(halves, dim=-1)
    pages = torch.empty(records.shape[0], num_kv_heads, records[0, 0].numel(), dtype=torch.uint8)
    pages[:, :, record_positions(tokens, head_size, bits).flatten()] = records.flatten(2)
    return pages

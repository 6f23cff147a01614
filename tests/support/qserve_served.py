"""A model in the layout of QServe, made of one in floating point."""

import torch
from qserve_checkpoints import packed_codes, permuted


def quantized(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """QServe's g128 leaves of a weight, rounded to the nearest code, and what they stand for."""
    n, k = weight.shape
    channel = (weight.float().abs().amax(1) / 119).half()
    level1 = (weight.float() / channel.float()[:, None]).round().clamp(-119, 119)
    groups = level1.view(n, k // 128, 128)
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    scale = ((high - low) / 15).ceil().clamp(1, 16)
    zero = (-low / scale).round().clamp(0, 15)
    codes = ((groups / scale[:, :, None]).round() + zero[:, :, None]).clamp(0, 15)
    stands_for = ((codes - zero[:, :, None]) * scale[:, :, None]).view(n, k) * channel[:, None]
    leaves = {
        "qweight": packed_codes(codes.view(n, k).long()),
        "s1_scales": channel,
        "s2_scales": permuted(scale.long(), "qserve"),
        "s2_zeros": permuted(((-zero * scale + 128) % 256 - 128).long(), "qserve"),
    }
    return leaves, stands_for

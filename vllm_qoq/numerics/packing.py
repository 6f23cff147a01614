"""Two 4-bit codes in a byte: the layout of `qweight` (`vllm_qoq.checkpoint.format`)."""

from __future__ import annotations

import torch


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes 0..15, an integer tensor [..., K] with even K, into uint8 [..., K / 2].

    The code with the even index is in the low nibble. Raises ValueError for an odd K or a
    code that does not fit, which would spill into its neighbour.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"{codes.shape[-1]} codes in a row; two go into a byte")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) <= 15:
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())}; 4 bits hold 0..15")
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack_nibbles`: uint8 [..., K / 2] to codes 0..15, uint8 [..., K]."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes are uint8, not {packed.dtype}")
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)

"""The page of the quantized KV cache: this module alone knows where its bytes are.

One layer's cache is uint8 [num_blocks, num_kv_heads, head_bytes]. A block holds N tokens, N a
multiple of 16; D is the head size. Keys and values have 4 or 8 bits each (`widths`), so BK and BV =
D * bits / 8 are the bytes of the codes of one token's key and value, and

    head_bytes = N * (BK + BV + 8)      4 bits, head 128: 136 bytes a token and head, bf16 has 512

The bytes of one block and head are contiguous, so that one bulk copy fetches them:

    | K codes            | V codes            | K scale, zero      | V scale, zero      |
    | N rows of BK bytes | N/2 rows of 2 BV   | N x 2 x fp16       | N x 2 x fp16       |

K: row t is token t. With 4 bits, byte i has channel 2i in the low nibble and 2i + 1 in the high.
V: row j is the tokens 2j and 2j + 1, whose 16-bit units alternate. A 32-bit word masked with
0x000F000F is then one channel of two neighbouring tokens, the pair that the tensor cores want for
the product with the probabilities:

    token 2j      a0 a1 | a2 a3 | ...          row j   a0 a1 b0 b1 | a2 a3 b2 b3 | ...
    token 2j + 1  b0 b1 | b2 b3 | ...

Row j is rotated right by 32 * (j mod 4) bytes, modulo its length, against bank conflicts.

Quantization is QServe's (qserve/kernels/csrc/fused_attention): per token and head over the D
channels, K after RoPE, a float zero in units of codes,

    x = scale * (code - zero)

QServe divides by max - min. That range is bounded below here, so that `zero` is finite and
accurate in fp16 also for a vector that hardly varies; where the bound does not bind, scales, zeros
and codes are QServe's.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple, TypeAlias

import torch

from vllm_qoq.numerics import FP16_MAX
from vllm_qoq.numerics.packing import pack_nibbles, unpack_nibbles

HEAD_SIZES = (64, 96, 128, 256)
BLOCK_MULTIPLE = 16  # tokens in a block

SMALLEST_SCALE = 6.2e-5  # a little above the smallest normal fp16
# max|x| / range stays below this, so that |zero| <= levels * this is 15360 or 32640.
LARGEST_OFFSET = {4: 1024.0, 8: 128.0}
SCALE_AND_ZERO_BYTES = 4


QuantizedBits: TypeAlias = Literal[4, 8, "k8v4"]
"""The precisions of a page: 4 or 8 bits for keys and values, or keys of 8 and values of 4."""


class Widths(NamedTuple):
    """The bits of a number of a key, and of a value."""

    key: int
    value: int


WIDTHS: dict[QuantizedBits, Widths] = {4: Widths(4, 4), 8: Widths(8, 8), "k8v4": Widths(8, 4)}


def widths(bits: QuantizedBits) -> Widths:
    """Look up the bits of keys and of values; ValueError for what the page does not have."""
    if bits not in WIDTHS:
        raise ValueError(f"a KV cache of {bits!r} bits; the page is defined for 4, 8 and 'k8v4'")
    return WIDTHS[bits]


def code_bytes(head_size: int, bits: QuantizedBits) -> tuple[int, int]:
    """Give BK and BV, the bytes of the codes of one token and head, of K and of V.

    Raises ValueError for a head size or bits that the page does not have.
    """
    of_key, of_value = widths(bits)
    if head_size not in HEAD_SIZES:
        sizes = ", ".join(map(str, HEAD_SIZES))
        raise ValueError(f"head size {head_size}; the quantized KV cache serves {sizes}")
    return head_size * of_key // 8, head_size * of_value // 8


def slot_bytes(head_size: int, bits: QuantizedBits) -> int:
    """Give the bytes that one token and head take: K and V with their scales and zeros."""
    return sum(code_bytes(head_size, bits)) + 2 * SCALE_AND_ZERO_BYTES


def quantize(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize vectors of one head to 4 or 8 bits.

    x  [..., D] float  ->  codes uint8 [..., D], scale and zero float16 [...]

    Beyond +-65504, which includes infinities, x is clamped. A vector with a NaN has the scale
    NaN, so it is read back as NaN. All arithmetic is float32, each operation rounded once.
    """
    levels = float(2**bits - 1)
    x = x.float().clamp(-FP16_MAX, FP16_MAX)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    largest = torch.maximum(low.abs(), high.abs())
    bound = (largest / LARGEST_OFFSET[bits]).clamp_min(SMALLEST_SCALE * levels)
    span = torch.maximum(high - low, bound)

    zero = -levels * low / span
    codes = (x * (levels / span) + zero).round().clamp(0, levels).nan_to_num()
    return codes.to(torch.uint8), (span / levels).squeeze(-1).half(), zero.squeeze(-1).half()


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Compute scale * (code - zero), float32 [..., D]; scale and zero are float16 [...]."""
    return scale.float()[..., None] * (codes.float() - zero.float()[..., None])


def max_error(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Bound the error of any channel that `quantize` may make: [..., D] -> float32 [..., 1].

    It is half a step, and half a unit in the last place of fp16 for each of scale and zero.
    """
    _, scale, _ = quantize(x, bits)
    largest = x.float().clamp(-FP16_MAX, FP16_MAX).abs().amax(-1, keepdim=True)
    half_step = scale.float()[..., None] * (0.5 + 2**-11)
    return half_step * 1.001 + largest * (3 * 2**-11) + 1e-10


def write(
    pages: torch.Tensor,
    slots: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bits: QuantizedBits,
) -> None:
    """Quantize tokens and put them into their slots; nothing else in the pages changes.

    pages       uint8 [num_blocks, H, head_bytes]
    slots       int [T]     block * N + position in it, each at most once; negative ones are skipped
    key, value  float [T, H, D]
    """
    head_size = key.shape[-1]
    tokens = block_tokens(pages, head_size, bits)
    is_real = slots >= 0
    slots = slots[is_real].long()
    records = torch.cat(
        [
            _pack(*quantize(vectors[is_real], width), width=width)
            for vectors, width in zip((key, value), widths(bits), strict=True)
        ],
        dim=-1,
    )
    heads = torch.arange(pages.shape[1])
    positions = record_positions(tokens, head_size, bits)[slots % tokens]
    pages[(slots // tokens)[:, None, None], heads[None, :, None], positions[:, None, :]] = records


def read(
    pages: torch.Tensor, blocks: torch.Tensor, length: int, head_size: int, bits: QuantizedBits
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantize the first `length` tokens of a request whose block table is `blocks`.

    pages uint8 [num_blocks, H, head_bytes], blocks int [>= length / N]  ->  keys and values,
    float32 [length, H, D]
    """
    tokens = block_tokens(pages, head_size, bits)
    used = blocks[: -(-length // tokens)].long()
    positions = record_positions(tokens, head_size, bits)
    records = pages[used][:, :, positions.flatten()].unflatten(-1, positions.shape)
    records = records.transpose(1, 2).flatten(0, 1)[:length]
    sizes = [size + SCALE_AND_ZERO_BYTES for size in code_bytes(head_size, bits)]
    key, value = (
        dequantize(*_unpack(part, width))
        for part, width in zip(records.split(sizes, dim=-1), widths(bits), strict=True)
    )  # [length, H, D]
    return key, value


def block_tokens(pages: torch.Tensor, head_size: int, bits: QuantizedBits) -> int:
    """Give N, the number of tokens that a block of `pages` [num_blocks, H, head_bytes] holds."""
    tokens, rest = divmod(pages.shape[-1], slot_bytes(head_size, bits))
    if rest or tokens % BLOCK_MULTIPLE:
        raise ValueError(
            f"pages of {pages.shape[-1]} bytes a head do not hold a multiple of {BLOCK_MULTIPLE} "
            f"tokens of {slot_bytes(head_size, bits)} bytes"
        )
    return tokens


@cache
def record_positions(tokens: int, head_size: int, bits: QuantizedBits) -> torch.Tensor:
    """Say where the bytes of a token are: int64 [N, BK + BV + 8], offsets into head_bytes.

    The record of a token is K codes, K scale, K zero, V codes, V scale, V zero.
    """
    if tokens % BLOCK_MULTIPLE or tokens <= 0:
        raise ValueError(f"a block of {tokens} tokens; it holds a multiple of {BLOCK_MULTIPLE}")
    key_row, value_row = code_bytes(head_size, bits)
    token = torch.arange(tokens)[:, None]
    byte = torch.arange(value_row)[None, :]

    pair = token // 2
    alternated = 4 * (byte // 2) + 2 * (token % 2) + byte % 2
    rotated = (alternated + 32 * (pair % 4)) % (2 * value_row)

    key_codes = token * key_row + torch.arange(key_row)[None, :]
    value_codes = tokens * key_row + pair * 2 * value_row + rotated
    numbers = tokens * (key_row + value_row)
    key_numbers = numbers + token * SCALE_AND_ZERO_BYTES + torch.arange(4)
    value_numbers = key_numbers + tokens * SCALE_AND_ZERO_BYTES
    return torch.cat([key_codes, key_numbers, value_codes, value_numbers], dim=1)


def _pack(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, width: int
) -> torch.Tensor:
    packed = pack_nibbles(codes) if width == 4 else codes
    numbers = torch.stack([scale, zero], dim=-1)
    return torch.cat([packed, numbers.view(torch.uint8)], dim=-1)


def _unpack(record: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, numbers = record[..., :-SCALE_AND_ZERO_BYTES], record[..., -SCALE_AND_ZERO_BYTES:]
    scale, zero = numbers.contiguous().view(torch.float16).unbind(-1)
    return unpack_nibbles(codes) if width == 4 else codes, scale, zero

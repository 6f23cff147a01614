"""The meaning of attention over the quantized KV cache, in plain PyTorch.

It is the CPU backend of the plugin and the oracle of the CUDA kernels. A step first writes its new
tokens into the pages (`update`), then attends (`attention`):

* A request with one new token, which is how every decode step looks, reads all its keys and
  values from the pages, the new token's too. (QServe takes that token unquantized.) So does one
  with a few that are speculated, one after the other, which gives what one at a time gives.
* A request with more reads the new ones as they are and those before them from the pages.
  So a prompt that runs in one piece sees no quantization at all, and one that runs in chunks, or
  hits the prefix cache, sees its history quantized.

With a mean of K, it is subtracted from every key, quantized or not, before anything else. That adds
the same to all scores of a query, which softmax does not see, and leaves what differs between keys
to the codes. It does not go together with a cap or sinks, which would see it.

A soft cap makes c * tanh(score / c) of every score. A sink is one more score of a query head,
beside those of the tokens: it takes its share of the softmax and adds no value.

With a Hadamard rotation, K is rotated before it is quantized and Q to match, so that scores stay
the same and outliers in single channels are spread over all.

All arithmetic is float32. Each request is computed by itself, so its result does not depend on
what else the step does.
"""

from __future__ import annotations

from functools import partial

import torch

from vllm_qoq.numerics import kv_layout
from vllm_qoq.numerics.kv_layout import QuantizedBits

# So many rows of queries are taken at a time, which bounds the memory of the scores.
_QUERY_TILE = 256


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Rotate x [..., D] to x @ H / sqrt(D), float32, with the Sylvester matrix H of size D.

    The rotation is its own inverse. Raises ValueError unless D is a power of two.
    """
    size = x.shape[-1]
    if size & (size - 1):
        raise ValueError(f"a Hadamard rotation of {size} channels; it needs a power of two")
    x = x.float()
    half = 1
    while half < size:
        pairs = x.unflatten(-1, (-1, 2, half))
        low, high = pairs.unbind(-2)
        x = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        half *= 2
    return x / size**0.5


def without_mean(key: torch.Tensor, k_mean: torch.Tensor | None) -> torch.Tensor:
    """Subtract a mean, float32 [H, D], from keys [..., H, D]; they stay as they are without one."""
    return key if k_mean is None else key.float() - k_mean


def update(
    pages: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    bits: QuantizedBits,
    use_hadamard: bool = False,
    k_mean: torch.Tensor | None = None,
) -> None:
    """Write the new tokens of a step into the pages.

    pages         uint8 [num_blocks, H, head_bytes]    vllm_qoq.numerics.kv_layout
    key, value    float [>= T, H, D]                   key after RoPE
    slot_mapping  int [T]                              block * N + position in it
    k_mean        float32 [H, D]                       of keys after RoPE, subtracted from them

    Tokens with a negative slot are skipped.
    """
    num_tokens = slot_mapping.shape[0]
    key = without_mean(key[:num_tokens], k_mean)
    key = hadamard(key) if use_hadamard else key
    kv_layout.write(pages, slot_mapping, key, value[:num_tokens], bits)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    scale: float,
    bits: QuantizedBits,
    most_decode_tokens: int = 1,
    sliding_window: int | None = None,
    use_hadamard: bool = False,
    k_mean: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the causal attention of a step whose tokens are in the pages already.

    query            float [T, Hq, D]      the new tokens of all requests, one after the other
    key, value       float [T, H, D]       the new tokens', unquantized; Hq is a multiple of H
    pages            uint8 [num_blocks, H, head_bytes]
    block_table      int [R, max_blocks]   the blocks of each request
    seq_lens         int [R]               tokens of each request, the new ones included
    query_start_loc  int [R + 1]           request r has the rows from [r] to [r + 1]
    scale            factor of the scores, usually 1 / sqrt(D)
    sliding_window   a token sees itself and the sliding_window - 1 before it; None means all
    k_mean           float32 [H, D], which the keys in the pages lack
    most_decode_tokens  a request with no more new tokens reads them from the pages, too
    soft_cap         scores stay below it; 0 means that they are not capped
    sinks            float [Hq], the score of each query head's sink

    Returns float32 [T, Hq, D]; rows of no request are zero. Raises ValueError for a mean of K with
    a soft cap or sinks.
    """
    if k_mean is not None and (soft_cap or sinks is not None):
        raise ValueError("a mean of K changes scores that are capped or stand beside a sink")
    key = without_mean(key, k_mean)
    if use_hadamard:
        query, key = hadamard(query), hadamard(key)
    output = torch.zeros(query.shape, dtype=torch.float32)
    starts = query_start_loc.tolist()
    attend = partial(
        _causal, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks
    )
    for request, length in enumerate(seq_lens.tolist()):
        rows = slice(starts[request], starts[request + 1])
        num_new = rows.stop - rows.start
        if num_new <= 0:  # CUDA graphs are padded with empty requests
            continue
        is_decode = num_new <= most_decode_tokens
        num_read = length if is_decode else length - num_new
        keys, values = kv_layout.read(pages, block_table[request], num_read, query.shape[-1], bits)
        if is_decode:
            for row in range(rows.start, rows.stop):
                seen = length - (rows.stop - row) + 1
                if seen > 0:
                    one = slice(row, row + 1)
                    output[one] = attend(query[one].float(), keys[:seen], values[:seen])
            continue
        keys = torch.cat([keys, key[rows].float()])
        values = torch.cat([values, value[rows].float()])
        output[rows] = attend(query[rows].float(), keys, values)
    return output


def _causal(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    soft_cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend for one request: query [n, Hq, D] of its last n tokens, keys and values [L, H, D]."""
    num_new, length = query.shape[0], keys.shape[0]
    group = query.shape[1] // keys.shape[1]
    # Queries of the heads that share a KV head become rows of one product: [H, n, group, D].
    grouped = query.unflatten(1, (-1, group)).transpose(0, 1)
    keys, values = keys.permute(1, 2, 0), values.transpose(0, 1)
    tiles = []
    for first in range(0, num_new, _QUERY_TILE):
        tile = grouped[:, first : first + _QUERY_TILE]
        num_rows = tile.shape[1]
        position = length - num_new + first + torch.arange(num_rows)
        # Keys that no row of the tile sees take no part.
        end = int(position[-1]) + 1
        begin = 0 if sliding_window is None else max(0, int(position[0]) - sliding_window + 1)
        distance = position[:, None] - torch.arange(begin, end)[None, :]
        is_hidden = distance < 0
        if sliding_window is not None:
            is_hidden |= distance >= sliding_window

        scores = tile.flatten(1, 2) @ keys[:, :, begin:end] * scale
        if soft_cap:
            scores = (scores / soft_cap).tanh() * soft_cap
        scores = scores.unflatten(1, (num_rows, group))
        scores.masked_fill_(is_hidden[None, :, None, :], float("-inf"))
        if sinks is not None:
            of_head = sinks.float().view(-1, 1, group, 1).expand(-1, num_rows, -1, -1)
            scores = torch.cat([scores, of_head], dim=-1)
        weights = scores.softmax(-1)[..., : end - begin]
        mixed = weights.flatten(1, 2) @ values[:, begin:end]
        tiles.append(mixed.unflatten(1, (num_rows, group)))
    return torch.cat(tiles, dim=1).transpose(0, 1).flatten(1, 2)

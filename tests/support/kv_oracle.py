"""The quantized KV cache written a second time, as loops over the page's definition say it."""

import math
from functools import cache

import torch

WIDTHS = {4: (4, 4), 8: (8, 8), "k8v4": (8, 4)}  # bits of a number of K and of V


def page_bytes(page_tokens, head_size, bits):
    return page_tokens * sum(head_size * width // 8 + 4 for width in WIDTHS[bits])


def quantize(x, bits):
    """x [..., D] -> codes [..., D], scale and zero float16 [...]; float32, on the CPU."""
    levels = float(2**bits - 1)
    x = x.float().cpu().clamp(-65504, 65504)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    least = torch.maximum(-low, high) / (1024 if bits == 4 else 128)
    span = torch.maximum(high - low, least.clamp_min(6.2e-5 * levels))
    zero = -levels * low / span
    codes = (x * (levels / span) + zero).round().clamp(0, levels).nan_to_num()
    return codes.to(torch.uint8), (span / levels).squeeze(-1).half(), zero.squeeze(-1).half()


def rotate(x):
    """x @ Sylvester's matrix / sqrt(D): one butterfly after the other."""
    x, size = x.float(), x.shape[-1]
    for bit in range(size.bit_length() - 1):
        index = torch.arange(size, device=x.device)
        other = x[..., index ^ (1 << bit)]
        x = torch.where((index >> bit & 1).bool(), other - x, x + other)
    return x / math.sqrt(size)


@cache
def byte_offsets(page_tokens, head_size, bits):
    """Where a page has the bytes of each token: codes of K and V [N, B], parameters [N, 4]."""
    k_row, v_row = (head_size * width // 8 for width in WIDTHS[bits])
    k, v = ([[0] * row for _ in range(page_tokens)] for row in (k_row, v_row))
    for token in range(page_tokens):
        pair = token // 2
        for i in range(k_row):
            k[token][i] = token * k_row + i
        for i in range(v_row):
            unit = 2 * (i // 2) + token % 2
            offset = (2 * unit + i % 2 + 32 * (pair % 4)) % (2 * v_row)
            v[token][i] = page_tokens * k_row + pair * 2 * v_row + offset
    parameters = page_tokens * (k_row + v_row) + torch.arange(4 * page_tokens).view(-1, 4)
    return torch.tensor(k), torch.tensor(v), parameters, parameters + 4 * page_tokens


def write(pages, slots, key, value, bits, hadamard=False, k_mean=None):
    """Quantizes key and value [T, H, D] into `pages`, on the CPU."""
    head_size = key.shape[-1]
    tokens = pages.shape[-1] // page_bytes(1, head_size, bits)
    k_at, v_at, k_parameters, v_parameters = byte_offsets(tokens, head_size, bits)
    key = key if k_mean is None else key.float() - k_mean
    key = rotate(key.cpu()) if hadamard else key
    parts = (key, k_at, k_parameters), (value, v_at, v_parameters)
    for (x, at, parameters_at), width in zip(parts, WIDTHS[bits], strict=True):
        codes, scale, zero = quantize(x, width)
        if width == 4:
            codes = codes[..., 0::2] | codes[..., 1::2] << 4
        parameters = torch.stack([scale, zero], -1).view(torch.uint8)
        for i, slot in enumerate(slots.tolist()):
            if slot >= 0:
                pages[slot // tokens][:, at[slot % tokens]] = codes[i]
                pages[slot // tokens][:, parameters_at[slot % tokens]] = parameters[i]


def read(pages, blocks, head_size, bits):
    """Keys and values float32 [tokens, H, D] of the blocks."""
    tokens = pages.shape[-1] // page_bytes(1, head_size, bits)
    offsets = [at.to(pages.device) for at in byte_offsets(tokens, head_size, bits)]
    pages = pages[blocks.long()]
    heads = []
    for at, parameters_at, width in zip(offsets[:2], offsets[2:], WIDTHS[bits], strict=True):
        codes = pages[..., at]
        if width == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        scale, zero = pages[..., parameters_at].view(torch.float16).float().unbind(-1)
        x = scale[..., None] * (codes.float() - zero[..., None])
        heads.append(x.transpose(1, 2).flatten(0, 1))
    return heads


def attention(query, key, value, length, scale, window=0, soft_cap=0.0, sinks=None):
    """query [Hq, D] of the last of `length` tokens, sinks [Hq]; float64 [Hq, D]."""
    first = max(0, length - window) if window else 0
    key, value = key[first:length].double(), value[first:length].double()
    scores = _scores(query, key, scale)
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(*scores.shape[:2], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[0]]
    return torch.einsum("hgt,thd->hgd", weights, value).flatten(0, 1)


def attention_of_new(query, key, value, length, scale, window=0, **options):
    """query [n, Hq, D] of the last n of `length` tokens, each of which sees itself; as above."""
    first = length - len(query) + 1
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    for i, one in enumerate(query):
        if first + i > 0:
            out[i] = attention(one, key, value, first + i, scale, window, **options)
    return out


def score_error(query, key, value, length, scale):
    """How far the output of each head moves if scores are off by 2^-22 of the largest: [Hq]."""
    key, value = key[:length].double(), value[:length].double()
    scores = _scores(query, key, scale)
    weights = scores.softmax(-1)
    out = torch.einsum("hgt,thd->hgd", weights, value)
    distance = (value.transpose(0, 1)[:, None] - out[:, :, None]).norm(dim=-1)
    return (2**-22 * scores.abs().amax(-1) * (weights * distance).sum(-1)).flatten()


def _scores(query, key, scale):
    groups = query.double().unflatten(0, (key.shape[1], -1))
    return torch.einsum("hgd,thd->hgt", groups, key) * scale

"""Run every CUDA kernel once or a few times on a GPU, and compare it with its reference.

`make test-gpu` does so for every shape and every edge. This takes a second or two, and finds a GPU
on which the kernels are wrong: one that their authors never had, or one that is broken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from vllm_qoq.numerics import kv_layout, reference, reference_attention
from vllm_qoq.numerics.kv_layout import QuantizedBits
from vllm_qoq.numerics.packing import pack_nibbles
from vllm_qoq.ops import expert_ops, kv_ops, linear_ops, w4a8_layout

Tensors = tuple[torch.Tensor, ...]
Layer = Mapping[str, torch.Tensor]

# Tokens of a batch: each of them takes another tile of the GEMM, and a few do not fill theirs.
_TOKENS = (1, 20, 70, 300)
_CHANNELS, _INPUTS = 264, 512
_EXPERTS, _CHOSEN = 4, 2
_HEADS, _KV_HEADS, _HEAD_SIZE, _PAGE = 8, 2, 128, 16
_LENGTHS = (1, 33, 500)
# Of a row of attention's output: it is rounded to bfloat16, and the weights of tokens to float16.
_ROW_ERROR = 3e-3
# Of codes whose sum or exponential the GPU computes in another order: how many may be off by one.
_MOVED = 0.02


class Trial:
    """The ops on one device, what of them was run, and what came out wrong.

    tried  the names of the ops, as in w4a8_gemm
    wrong  for each case that is not what the reference gives, what it is, in a few words
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with nothing tried."""
        self.device = device
        self.tried: set[str] = set()
        self.wrong: list[str] = []
        self._random = torch.Generator().manual_seed(0)

    def run(self, op: str, *arguments: Any) -> Tensors:
        """Run an op on the device, and bring what it returns to the CPU.

        What it writes into has to be on the device before.
        """
        self.tried.add(op)
        given = [a.to(self.device) if isinstance(a, torch.Tensor) else a for a in arguments]
        found = getattr(torch.ops.qoq, op)(*given)
        found = (found,) if isinstance(found, torch.Tensor) else found or ()
        return tuple(part.cpu() for part in found)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Draw int16 from low to high, the last not included."""
        return torch.randint(low, high, shape, dtype=torch.int16, generator=self._random)

    def normal(self, *shape: int) -> torch.Tensor:
        """Draw bfloat16 with a variance of one."""
        return torch.randn(shape, generator=self._random).bfloat16()

    def uniform(self, *shape: int) -> torch.Tensor:
        """Draw float32 from 0 to 1."""
        return torch.rand(shape, generator=self._random)

    def equal(self, what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Note what differs by a bit."""
        self.note(what, found != expected)

    def rounded(self, what: str, found: Tensors, expected: Tensors) -> None:
        """Note codes, scales and row sums that are no rounding of the expected ones."""
        codes, scale, row_sum = found[:3]
        off = (codes.int() - expected[0].int()).abs()
        self.note(what, (off > 1) | (off.float().mean() > _MOVED) & (off > 0))
        self.note(f"{what}, scales", (scale - expected[1]).abs() > 2**-7 * expected[1])
        self.equal(f"{what}, row sums", row_sum, codes.sum(1, dtype=torch.int32))

    def note(self, what: str, is_wrong: torch.Tensor) -> None:
        """Note how many values are wrong, if any is."""
        if is_wrong.any():
            self.wrong.append(f"{what}: {int(is_wrong.sum())} of {is_wrong.numel()} values")


def run(device: torch.device) -> Trial:
    """Run and compare all ops; raises RuntimeError where one does not run at all."""
    trial = Trial(device)
    # A GEMM leaves its workspace zero, and another layer's relies on it.
    workspace = linear_ops.workspace(device) if device.type == "cuda" else None
    _try_quantizing(trial)
    for name, layer in _layers(trial, _CHANNELS, _INPUTS):
        _try_gemm(trial, name, layer, workspace)
    for name, layer in _layers(trial, _EXPERTS * _INPUTS, _INPUTS):
        _try_experts(trial, name, layer, workspace)
    if workspace is not None:
        trial.note("workspace of w4a8_gemm", workspace.cpu() != 0)
    widths: tuple[QuantizedBits, ...] = (4, 8, "k8v4")
    for bits in widths:
        _try_cache(trial, bits)
    return trial


def _try_quantizing(trial: Trial) -> None:
    for tokens in _TOKENS:
        x, residual = trial.normal(2, tokens, 2 * _INPUTS)
        expected: Tensors = reference.quantize_per_token(x)
        found = trial.run("quantize_per_token", x)
        for part, *both in zip(("codes", "scales", "row sums"), found, expected, strict=True):
            trial.equal(f"quantize_per_token of {tokens} tokens, {part}", *both)
        weight = trial.normal(2 * _INPUTS)
        found = trial.run("add_rms_norm_quantize", x, residual, weight, 1e-5)
        expected = reference.add_rms_norm_quantize(x, residual, weight, 1e-5)
        what = f"add_rms_norm_quantize of {tokens} tokens"
        trial.rounded(what, found, expected)
        trial.equal(f"{what}, sums", found[3], expected[3])
        found = trial.run("silu_and_mul_quantize", x)
        expected = reference.silu_and_mul_quantize(x)
        trial.rounded(f"silu_and_mul_quantize of {tokens} tokens", found, expected)


def _layers(trial: Trial, n: int, k: int) -> Iterator[tuple[str, Layer]]:
    """Make a layer of each kind that there are kernels for, in the form of a checkpoint."""
    scale = trial.uniform(n) * 0.02 + 1e-3
    codes = pack_nibbles(trial.integers(0, 16, n, k))
    zero = trial.uniform(n) * 0.1
    yield "per channel", {"qweight": codes, "channel_scale": scale, "channel_zero": zero}
    group_scale = trial.integers(1, 17, n, k // 128)
    room = trial.uniform(n, k // 128) * (256 - 15 * group_scale)
    groups = {
        "qweight": codes,
        "channel_scale": scale,
        "group_scale": group_scale.to(torch.uint8),
        "group_offset": (room.to(torch.int16) - 128).to(torch.int8),
    }
    yield "in groups of 128", groups
    weight = reference.int8_weight(groups).to(torch.int16)
    nested = (weight + trial.integers(-8, 8, n, k)).clamp(-128, 127)
    residual = pack_nibbles(nested - weight + reference.RESIDUAL_ZERO)
    yield "nested", {**groups, "qresidual": residual}


def _packed(layer: Layer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Bring a layer's weight, and its residual if it has one, into the kernels' order."""
    weight = w4a8_layout.pack(layer["qweight"], layer.get("group_scale"), layer.get("group_offset"))
    residual = layer.get("qresidual")
    return weight, None if residual is None else w4a8_layout.pack(residual)


def _expected(layer: Layer, codes: Tensors) -> torch.Tensor:
    x, x_scale, x_row_sum = codes
    return linear_ops.w4a8_gemm(
        x,
        x_scale,
        x_row_sum,
        layer["qweight"],
        layer["channel_scale"],
        layer.get("channel_zero"),
        layer.get("group_scale"),
        layer.get("group_offset"),
        None,
        torch.bfloat16,
        residual=layer.get("qresidual"),
    )


def _try_gemm(trial: Trial, name: str, layer: Layer, workspace: torch.Tensor | None) -> None:
    weight, residual = _packed(layer)
    for tokens in _TOKENS:
        codes = reference.quantize_per_token(trial.normal(tokens, _INPUTS))
        (found,) = trial.run(
            "w4a8_gemm",
            *(*codes, weight, layer["channel_scale"], layer.get("channel_zero")),
            *(None, None, None, torch.bfloat16, workspace, residual),
        )
        trial.equal(f"w4a8_gemm {name}, {tokens} tokens", found, _expected(layer, codes))


def _try_experts(trial: Trial, name: str, layers: Layer, workspace: torch.Tensor | None) -> None:
    """Run tokens through a first layer of experts, and add up what comes out of it."""
    experts = [
        {key: part.chunk(_EXPERTS)[expert].contiguous() for key, part in layers.items()}
        for expert in range(_EXPERTS)
    ]
    packed = [_packed(layer) for layer in experts]
    weight = torch.cat([one for one, _ in packed])
    residuals = [one for _, one in packed if one is not None]
    for tokens in _TOKENS:
        what = f"of {tokens} tokens, experts {name}"
        x, share = trial.normal(tokens, _INPUTS), trial.uniform(tokens, _CHOSEN)
        ids = trial.uniform(tokens, _EXPERTS).argsort(dim=1)[:, :_CHOSEN].to(torch.int32)
        tile = expert_ops.tile_for(ids.numel(), _EXPERTS)
        rows, tile_expert, tiles = trial.run("route_to_experts", ids, None, _EXPERTS, tile)
        at = rows.flatten().long()
        limit = len(tile_expert) * tile
        if len(at.unique()) < len(at) or not 0 <= int(at.min()) <= int(at.max()) < limit:
            trial.wrong.append(f"route_to_experts {what}: its rows")
            return
        owner = tile_expert[at // tile]
        trial.equal(f"route_to_experts {what}", owner, ids.flatten())
        counts = torch.bincount(ids.flatten().long(), minlength=_EXPERTS)
        trial.equal(f"tiles {what}", tiles[0], ((counts + tile - 1) // tile).sum())

        codes = trial.run("quantize_for_experts", x, rows, tile, tile_expert)
        mine = tuple(part[at] for part in codes)
        expected: Tensors = reference.quantize_per_token(x.repeat_interleave(_CHOSEN, 0))
        for found, right in zip(mine, expected, strict=True):
            trial.equal(f"quantize_for_experts {what}", found, right)
        (y,) = trial.run(
            "w4a8_gemm_experts",
            *(*codes, tiles, tile_expert, _EXPERTS, weight, layers["channel_scale"]),
            *(layers.get("channel_zero"), None, torch.bfloat16, workspace),
            torch.cat(residuals) if residuals else None,
        )
        for expert, layer in enumerate(experts):
            is_here = owner == expert
            right = _expected(layer, tuple(part[is_here] for part in mine))
            trial.equal(f"w4a8_gemm_experts {what}", y[at[is_here]], right)
        inner = trial.run("silu_and_mul_quantize_experts", y, tiles, tile)
        inner_of_tokens = tuple(part[at] for part in inner)
        expected = reference.silu_and_mul_quantize(y[at])
        trial.rounded(f"silu_and_mul_quantize_experts {what}", inner_of_tokens, expected)
        (out,) = trial.run("combine_experts", y, rows, share)
        right = expert_ops.combine_experts(y, rows, share)
        trial.equal(f"combine_experts {what}", out, right)


def _try_cache(trial: Trial, bits: QuantizedBits) -> None:
    """Write the tokens of a few requests into their pages, attend to them, and read them back."""
    name = f"{bits} bits" if isinstance(bits, int) else bits
    blocks = -(-max(_LENGTHS) // _PAGE)
    order = trial.uniform(blocks * len(_LENGTHS)).argsort()
    table = order.view(len(_LENGTHS), blocks).to(torch.int32)
    key, value = trial.normal(2, sum(_LENGTHS), _KV_HEADS, _HEAD_SIZE)
    slots = torch.cat(
        [
            table[i, torch.arange(length) // _PAGE] * _PAGE + torch.arange(length) % _PAGE
            for i, length in enumerate(_LENGTHS)
        ]
    ).long()
    size = _PAGE * kv_layout.slot_bytes(_HEAD_SIZE, bits)
    pages = torch.zeros(len(order), _KV_HEADS, size, dtype=torch.uint8)
    there = pages.to(trial.device, copy=True)
    widths = kv_layout.widths(bits)
    trial.run("kv_write", key, value, slots, *widths, True, there, None)
    reference_attention.update(pages, key, value, slots, bits, use_hadamard=True)
    trial.equal(f"kv_write, {name}", there.cpu(), pages)

    lengths = torch.tensor(_LENGTHS, dtype=torch.int32)
    group, scale = _HEADS // _KV_HEADS, _HEAD_SIZE**-0.5
    for new, said in ((1, "one new token"), (3, "3 new tokens")):
        starts = torch.arange(len(_LENGTHS) + 1, dtype=torch.int32) * new
        query = trial.normal(len(_LENGTHS) * new, _HEADS, _HEAD_SIZE)
        out = torch.full_like(query, torch.nan, device=trial.device)
        workspace = kv_ops.workspace(trial.device, group, _HEAD_SIZE, new)
        trial.run(
            "kv_decode",
            *(query, there, table, lengths, scale, *widths, 0, True, out, workspace),
            *(0.0, None, new, starts if new > 1 else None),
        )
        right = reference_attention.attention(
            *(query, query, query, pages, table, lengths, starts),
            **{"scale": scale, "bits": bits, "most_decode_tokens": new, "use_hadamard": True},
        )
        error = (out.cpu().float() - right).norm(dim=-1)
        # NaN is no less than anything.
        is_right = error <= _ROW_ERROR * right.norm(dim=-1)
        trial.note(f"kv_decode, {name}, {said} a request", ~is_right)

    first = [length // 3 for length in _LENGTHS]
    counts = [length - skipped for length, skipped in zip(_LENGTHS, first, strict=True)]
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    read = torch.full((2, sum(counts), _KV_HEADS, _HEAD_SIZE), torch.nan, dtype=torch.float16)
    read = read.to(trial.device)
    trial.run(
        "kv_dequantize",
        *(there, table, torch.tensor(first, dtype=torch.int32), starts, *widths, True, *read),
    )
    for i, length in enumerate(_LENGTHS):
        k, v = kv_layout.read(pages, table[i], length, _HEAD_SIZE, bits)
        rows = slice(int(starts[i]), int(starts[i + 1]))
        for found, right in zip(read.cpu(), (reference_attention.hadamard(k), v), strict=True):
            trial.equal(f"kv_dequantize, {name}", found[rows], right[first[i] :].half())

"""Arguments that the ops refuse, and in which words: one table for the CPU and for CUDA.

A `Refusal` changes some of an op's right arguments. Its message is part of the whole one: CUDA
appends where it was raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vllm_qoq.ops import expert_ops, kv_ops, linear_ops, w4a8_layout

Arguments = dict[str, Any]
M, N, K = 4, 72, 256
SEQUENCES, KV_HEADS, GROUP, HEAD, BITS, PAGE_TOKENS, BLOCKS = 3, 2, 4, 64, 4, 16, 5
EXPERTS, TILE = 3, expert_ops.TILES[0]
TOKEN_BYTES = 2 * (HEAD * BITS // 8 + 4)
PAGE_BYTES = PAGE_TOKENS * TOKEN_BYTES

TYPES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int8: "Char",
    torch.uint8: "Byte",
}


@dataclass(frozen=True)
class Refusal:
    """A change of the arguments of `op`, by their names in its schema, and what is said of it.

    devices  where it is refused in these words
    weights  of w4a8_gemm: "grouped", "nested" or "channel"
    """

    op: str
    name: str
    change: Callable[[Arguments], Arguments]
    message: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    weights: str = "grouped"

    def arguments(self, device: torch.device) -> Arguments:
        """The arguments with the fault."""
        right = right_arguments(self.op, device, self.weights)
        return right | self.change(right)


def right_arguments(op: str, device: torch.device, weights: str = "grouped") -> Arguments:
    """Arguments of `op` on `device` that it takes."""
    return {
        "quantize_per_token": lambda: {"x": _rows(device, M, K)},
        "silu_and_mul_quantize": lambda: {"x": _rows(device, M, 2 * K)},
        "add_rms_norm_quantize": lambda: {
            "x": _rows(device, M, K),
            "residual": _rows(device, M, K),
            "weight": _rows(device, K),
            "epsilon": 1e-5,
        },
        "w4a8_gemm": lambda: _gemm(device, weights),
        "route_to_experts": lambda: {
            "topk_ids": torch.zeros(M, 2, dtype=torch.int32, device=device),
            "expert_map": torch.arange(EXPERTS, dtype=torch.int32, device=device),
            "experts": EXPERTS,
            "tile": TILE,
        },
        "quantize_for_experts": lambda: {
            "x": _rows(device, M, K),
            "rows": torch.arange(2 * M, dtype=torch.int32, device=device).view(M, 2),
            "tile": TILE,
            "tile_expert": _ints(device, 2),
        },
        "silu_and_mul_quantize_experts": lambda: {
            "x": _rows(device, TILE, 2 * K),
            "tiles": _ints(device, 1) + 1,
            "tile": TILE,
        },
        "w4a8_gemm_experts": lambda: _gemm_experts(device, weights),
        "combine_experts": lambda: {
            "y": _rows(device, TILE, K),
            "rows": torch.arange(2 * M, dtype=torch.int32, device=device).view(M, 2),
            "topk_weights": torch.ones(M, 2, device=device),
        },
        "kv_write": lambda: {
            "key": _rows(device, SEQUENCES, KV_HEADS, HEAD),
            "value": _rows(device, SEQUENCES, KV_HEADS, HEAD),
            "slots": torch.arange(SEQUENCES, device=device),
            "k_bits": BITS,
            "v_bits": BITS,
            "hadamard": False,
            "pages": _pages(device),
            "k_mean": torch.zeros(KV_HEADS, HEAD, device=device),
        },
        "kv_decode": lambda: {
            "query": _rows(device, SEQUENCES, GROUP * KV_HEADS, HEAD),
            "pages": _pages(device),
            "block_table": _ints(device, SEQUENCES, 1),
            "seq_lens": _ints(device, SEQUENCES) + 1,
            "scale": 0.125,
            "k_bits": BITS,
            "v_bits": BITS,
            "window": 0,
            "hadamard": False,
            "out": _rows(device, SEQUENCES, GROUP * KV_HEADS, HEAD),
            "workspace": kv_ops.workspace(device, GROUP, HEAD),
            "soft_cap": 30.0,
            "sinks": _rows(device, GROUP * KV_HEADS),
            "query_len": 1,
            "query_start": None,
        },
        "kv_dequantize": lambda: {
            "pages": _pages(device),
            "block_table": _ints(device, SEQUENCES, 1),
            "first_token": _ints(device, SEQUENCES),
            "row_start": torch.arange(SEQUENCES + 1, dtype=torch.int32, device=device),
            "k_bits": BITS,
            "v_bits": BITS,
            "hadamard": False,
            "key": _rows(device, SEQUENCES, KV_HEADS, HEAD),
            "value": _rows(device, SEQUENCES, KV_HEADS, HEAD),
        },
    }[op]()


def call(op: str, arguments: Arguments) -> Any:
    """Run `qoq::op` through PyTorch's dispatcher, up to the end of its kernel."""
    result = getattr(torch.ops.qoq, op)(**arguments)
    if any(isinstance(value, torch.Tensor) and value.is_cuda for value in arguments.values()):
        torch.cuda.synchronize()
    return result


def refusals(device_type: str) -> list[Refusal]:
    """All that is refused on "cpu" or "cuda"."""
    return [refusal for refusal in _all() if device_type in refusal.devices]


def _all() -> Iterator[Refusal]:
    yield from _of_rows()
    yield from _of_gemm()
    yield from _of_experts()
    yield from _of_pages()
    yield from _of_kv_write()
    yield from _of_kv_decode()
    yield from _of_kv_dequantize()


def _of_rows() -> Iterator[Refusal]:
    """Ops that quantize the rows of x."""
    for op, columns, types in (
        ("quantize_per_token", K, "BFloat16, Half or Float"),
        ("silu_and_mul_quantize", 2 * K, "BFloat16 or Half"),
        ("add_rms_norm_quantize", K, "BFloat16 or Half"),
    ):

        def x(name: str, change: Callable[[torch.Tensor], torch.Tensor], text: str, op=op):
            return Refusal(op, f"x {name}", lambda a: {"x": change(a["x"])}, f"{op}: {text}")

        yield x("one row", lambda x: x[0], f"x is [{columns}], expected floats [M, K]")
        yield x("empty", lambda x: x[:, :0], f"x is [{M}, 0], expected 1 to 2^24 columns")
        yield x(
            "too wide",
            lambda x: x[:1, :1].expand(1, 2**24 + 2),
            "x is [1, 16777218], expected 1 to 2^24 columns",
        )
        yield x(
            "too many",
            lambda x: x[:1].expand(2**31, -1),
            f"x is [2147483648, {columns}], expected 1 to 2^24 columns",
        )
        yield x("gaps", with_gaps, "the columns of x are not contiguous")
        yield x("double", lambda x: x.double(), f"x is Double, expected {types}")
        yield x("integers", lambda x: x.to(torch.int8), f"x is Char, expected {types}")
    op = "silu_and_mul_quantize"
    yield Refusal(op, "x float", lambda a: {"x": a["x"].float()}, f"{op}: x is Float, expected")
    yield Refusal(
        op,
        "x odd",
        lambda a: {"x": a["x"][:, 1:]},
        f"{op}: x is [{M}, {2 * K - 1}], expected gate and up side by side, [M, 2 K]",
    )
    op = "add_rms_norm_quantize"
    yield Refusal(
        op,
        "x elsewhere",
        lambda a: {"x": a["x"].cpu()},
        f"{op}: residual is not on CUDA device",
        _CUDA,
    )
    yield Refusal(op, "x float", lambda a: {"x": a["x"].float()}, f"{op}: x is Float, expected")
    yield from _of_tensor(op, "residual", torch.bfloat16, (M, K))
    yield from _of_tensor(op, "weight", torch.bfloat16, (K,))
    yield Refusal(
        op,
        "residual other half",
        lambda a: {"residual": a["residual"].half()},
        f"{op}: residual is Half [{M}, {K}], expected BFloat16 [{M}, {K}]",
    )


def _of_gemm() -> Iterator[Refusal]:
    op = "w4a8_gemm"

    def gemm(name: str, change: Callable[[Arguments], Arguments], text: str, **more: Any):
        return Refusal(op, name, change, f"{op}: {text}", **more)

    yield gemm(
        "x one row",
        lambda a: {"x": a["x"][0]},
        f"x is [{K}] and channel_scale [{N}], expected [M, K] and [N]",
    )
    yield gemm(
        "channel_scale of two dimensions",
        lambda a: {"channel_scale": a["channel_scale"][None]},
        f"x is [{M}, {K}] and channel_scale [1, {N}], expected [M, K] and [N]",
    )
    yield gemm(
        "out_dtype",
        lambda a: {"out_dtype": torch.float32},
        "the output is bfloat16 or float16, not Float",
    )
    for n in (0, N - 1):
        yield gemm(
            f"N={n}",
            lambda a, n=n: {"channel_scale": a["channel_scale"][:n]},
            f"N={n} must be a multiple of 8",
        )
    for k in (0, K - 2):
        yield gemm(
            f"K={k}", lambda a, k=k: {"x": a["x"][:, :k]}, f"K={k} must be a multiple of 128"
        )
    yield gemm(
        "K too large",
        lambda a: {"x": a["x"].new_zeros(1, 65536 + 128)},
        "K=65664 overflows int32; split the layer",
    )
    yield gemm(
        "M too large",
        lambda a: {"x": a["x"][:1].expand(2**24 + 1, -1)},
        f"M=16777217, N={N} are too large",
    )
    yield gemm(
        "N too large",
        lambda a: {"channel_scale": a["channel_scale"][:1].expand(2**24 + 8)},
        f"M={M}, N=16777224 are too large",
    )
    for name in ("group_scale", "group_offset"):
        groups = {name: torch.zeros(N, K // 128, dtype=torch.uint8)}
        text = "on CUDA the groups are inside the packed weight (w4a8_layout.pack)"
        yield gemm(f"{name} on CUDA", lambda a, g=groups: _moved(g, a), text, devices=("cuda",))
        text = "a packed weight has its groups in it already"
        yield gemm(f"{name} on a CPU", lambda a, g=groups: g, text, devices=("cpu",))

    blocks = -(-N // 64)
    sizes = {
        "x": (torch.int8, (M, K), "grouped"),
        "x_scale": (torch.float32, (M,), "grouped"),
        "x_row_sum": (torch.int32, (M,), "grouped"),
        "weight": (torch.uint8, (blocks, K // 128, 4224), "grouped"),
        "residual": (torch.uint8, (blocks, K // 128, 4096), "nested"),
        "channel_scale": (torch.float32, (N,), "grouped"),
        "channel_zero": (torch.float32, (N,), "channel"),
    }
    for name, (dtype, shape, weights) in sizes.items():
        # The sizes are those of x and of channel_scale.
        has_shape = name not in ("x", "channel_scale")
        yield from _of_tensor(op, name, dtype, shape, weights=weights, has_shape=has_shape)
    yield gemm(
        "weight of a channel",
        lambda a: {"weight": a["weight"][..., :4096].contiguous()},
        f"weight is Byte [{blocks}, {K // 128}, 4096], expected Byte [{blocks}, {K // 128}, 4224]",
    )
    yield gemm(
        "weight with groups",
        lambda a: {"weight": a["weight"].new_zeros(blocks, K // 128, 4224)},
        f"weight is Byte [{blocks}, {K // 128}, 4224], expected Byte [{blocks}, {K // 128}, 4096]",
        weights="channel",
    )
    yield gemm(
        "weight in groups of another size",
        lambda a: {"weight": a["weight"].new_zeros(blocks, K // 128, 4096 + 3 * 128)},
        f"weight is Byte [{blocks}, {K // 128}, 4480], expected Byte [{blocks}, {K // 128}, 4224]",
    )
    yield gemm(
        "weight in small groups of other inputs",
        lambda a: {"weight": a["weight"].new_zeros(blocks, K // 128 + 1, 4352)},
        f"weight is Byte [{blocks}, {K // 128 + 1}, 4352], "
        f"expected Byte [{blocks}, {K // 128}, 4352]",
    )
    yield gemm(
        "residual of a channel",
        lambda a: {"residual": a["weight"]},
        "a residual belongs to a weight with groups",
        weights="channel",
    )
    yield gemm(
        "flag without residual",
        lambda a: {"use_residual": a["x_row_sum"][:1]},
        "use_residual is given, but no residual",
    )
    for dtype in (torch.float32, torch.int64):
        yield gemm(
            f"use_residual {TYPES[dtype]}",
            lambda a, dtype=dtype: {"use_residual": a["use_residual"].to(dtype)},
            f"use_residual is {TYPES[dtype]} [1], expected Int [1]",
            weights="nested",
        )
    for shape in ((2,), (0,), (1, 1), ()):
        yield gemm(
            f"use_residual {list(shape)}",
            lambda a, shape=shape: {"use_residual": a["x_row_sum"].new_ones(shape)},
            f"use_residual is Int {list(shape)}, expected Int [1]",
            weights="nested",
        )
    # Only foreign memory has integers at odd places.
    yield gemm(
        "use_residual misaligned",
        lambda a: {
            "use_residual": torch.frombuffer(bytearray(16), dtype=torch.int32, count=1, offset=2)
        },
        "use_residual does not begin at a multiple of 4 bytes; clone it",
        weights="nested",
        devices=("cpu",),
    )
    yield gemm(
        "use_residual elsewhere",
        lambda a: {"use_residual": a["use_residual"].cpu()},
        "use_residual is not on CUDA device 0, where x is",
        weights="nested",
        devices=("cuda",),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for refusal in _of_tensor(op, "bias", dtype, (N,)):
            if not refusal.name.endswith("type"):
                yield refusal
    for dtype in (torch.float64, torch.int32):
        yield gemm(
            f"bias {TYPES[dtype]}",
            lambda a, dtype=dtype: {"bias": a["channel_scale"].to(dtype)},
            f"bias is {TYPES[dtype]}, expected Float, BFloat16 or Half",
        )
    yield gemm(
        "x elsewhere",
        lambda a: {"x": a["x"].cpu()},
        "x is not on CUDA device",
        devices=("cuda",),
    )
    yield gemm(
        "no workspace",
        lambda a: {"workspace": None},
        "on CUDA a workspace is needed (ops.workspace)",
        devices=("cuda",),
    )
    for name, change, text in (
        ("short", lambda w: w[:-1], "is Int ["),
        ("type", lambda w: w.float(), "is Float ["),
        ("gaps", with_gaps, "(not contiguous), expected Int ["),
        ("misaligned", misaligned, "does not begin at a multiple of 16 bytes; clone it"),
        ("elsewhere", lambda w: w.cpu(), "is not on CUDA device 0, where x is"),
    ):
        yield Refusal(
            op,
            f"workspace {name}",
            lambda a, change=change: {"workspace": change(a["workspace"])},
            text if text.startswith("(") else f"{op}: workspace {text}",
            devices=("cuda",),
        )


def _of_experts() -> Iterator[Refusal]:
    """The ops of a mixture of experts, beside what they share with those of a linear layer."""

    def refusal(op: str, name: str, text: str, **changed: Callable[[Any], Any]):
        def change(a: Arguments) -> Arguments:
            return {key: new(a[key]) for key, new in changed.items()}

        return Refusal(op, name, change, f"{op}: {text}")

    op = "route_to_experts"
    flat = "expected [tokens, experts of a token]"
    yield refusal(op, "ids flat", f"topk_ids is [{2 * M}], {flat}", topk_ids=torch.flatten)
    yield refusal(op, "ids long", "topk_ids is Long", topk_ids=lambda ids: ids.long())
    for count in (0, 1025):
        text = f"{count} experts, expected 1 to 1024"
        yield refusal(op, f"{count} experts", text, experts=lambda _, c=count: c)
    yield refusal(op, "tile", "tiles of 8 rows, expected 16, 64 or 128", tile=lambda _: 8)
    many = (1 << 25) + 1
    text = f"topk_ids is [{many}, 2], expected at most 2^26 pairs"
    yield refusal(op, "many ids", text, topk_ids=lambda ids: ids[:1].expand(many, 2))
    yield refusal(op, "map long", "expert_map is Long", expert_map=lambda m: m.long())
    op = "quantize_for_experts"
    expected = "expected [tokens, experts of a token] and [tiles]"
    text = f"rows is [{2 * M}] and tile_expert [2], {expected}"
    yield refusal(op, "rows flat", text, rows=torch.flatten)
    text = f"rows is Int [{M - 1}, 2], expected Int [{M}, 2]"
    yield refusal(op, "rows short", text, rows=lambda rows: rows[1:])
    text = "x is Float, expected BFloat16 or Half"
    yield refusal(op, "x float", text, x=lambda x: x.float())
    yield refusal(op, "tile", "tiles of 8 rows, expected 16, 64 or 128", tile=lambda _: 8)
    op = "silu_and_mul_quantize_experts"
    yield refusal(op, "x float", "x is Float, expected BFloat16 or Half", x=lambda x: x.float())
    text = f"x is [{TILE}, {2 * K - 1}], expected gate and up side by side, [M, 2 K]"
    yield refusal(op, "x odd", text, x=lambda x: x[:, 1:])
    text = "tiles is Int [2], expected Int [1]"
    yield refusal(op, "tiles", text, tiles=lambda tiles: tiles.expand(2).clone())
    op = "w4a8_gemm_experts"
    text = f"channel_scale is [{EXPERTS * N}], expected as many channels of each of "
    for experts in (0, EXPERTS + 2):
        yield refusal(op, f"{experts} experts", text, experts=lambda _, e=experts: e)
    text = f"x is [{TILE}, {K}] and tile_expert [2], expected 16, 64 or 128 rows for each tile"
    yield refusal(op, "tile_expert", text, tile_expert=lambda one: one.repeat(2))
    blocks = EXPERTS * -(-N // 64)
    text = f"the weight is [{blocks}, {K // 128}, 4352], expected no groups or groups of 128"
    wide = (blocks, K // 128, 4352)
    yield refusal(op, "groups of 64", text, weight=lambda weight: weight.new_zeros(wide))
    yield refusal(op, "tiles long", "tiles is Long [1]", tiles=lambda tiles: tiles.long())
    text = "the output is bfloat16 or float16, not Float"
    yield refusal(op, "out_dtype", text, out_dtype=lambda _: torch.float32)
    op = "combine_experts"
    text = f"y is [{TILE}, {K}] and rows [{2 * M}], expected [rows, hidden] and {flat[9:]}"
    yield refusal(op, "rows flat", text, rows=torch.flatten)
    yield refusal(op, "y float", "y is Float, expected BFloat16 or Half", y=lambda y: y.float())
    text = f"y is [{TILE}, {K - 4}], expected a multiple of 8 columns"
    yield refusal(op, "y narrow", text, y=lambda y: y[:, 4:].contiguous())
    text = "topk_weights is Double"
    yield refusal(op, "weights", text, topk_weights=lambda weights: weights.double())


def _of_tensor(
    op: str,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    weights: str = "grouped",
    has_shape: bool = True,
) -> Iterator[Refusal]:
    """What every tensor has to be that `check_tensor` looks at."""
    is_new = name == "bias"
    expected = f"expected {TYPES[dtype]} {list(shape)}"

    def faulty(kind: str, change: Callable[[torch.Tensor], torch.Tensor], text: str, **more: Any):
        def changed(a: Arguments) -> Arguments:
            right = a["channel_scale"].to(dtype) if is_new else a[name]
            return {name: change(right)}

        label = f"{name} {TYPES[dtype]} {kind}" if is_new else f"{name} {kind}"
        return Refusal(op, label, changed, f"{op}: {name} {text}", weights=weights, **more)

    yield faulty("type", lambda t: t.double(), f"is Double {list(shape)}, {expected}")
    if has_shape:
        short = [shape[0] - 1, *shape[1:]]
        yield faulty("short", lambda t: t[:-1], f"is {TYPES[dtype]} {short}, {expected}")
        flat = [1, *shape]
        yield faulty("deeper", lambda t: t[None], f"is {TYPES[dtype]} {flat}, {expected}")
    yield faulty("gaps", with_gaps, f"is {TYPES[dtype]} {list(shape)} (not contiguous), {expected}")
    yield faulty("misaligned", misaligned, "does not begin at a multiple of 16 bytes; clone it")
    if name != "x":
        text = "is not on CUDA device 0, where x is"
        yield faulty("elsewhere", lambda t: t.cpu(), text, devices=("cuda",))


def _of_pages() -> Iterator[Refusal]:
    """What all ops on the KV cache ask of it, and of heads and block tables."""
    for op, heads in (
        ("kv_write", ("key", "value")),
        ("kv_decode", ("query", "out")),
        ("kv_dequantize", ("key", "value")),
    ):

        def kv(name: str, change: Callable[[Arguments], Arguments], text: str, op=op):
            return Refusal(op, name, change, f"{op}: {text}", devices=("cuda",))

        for name in heads:
            count = KV_HEADS * (GROUP if op == "kv_decode" else 1)
            shown = "q" if name == "query" else name

            def head(
                kind: str, change: Callable[[torch.Tensor], torch.Tensor], text: str, name=name
            ):
                return kv(f"{name} {kind}", lambda a: {name: change(a[name])}, text)

            expected = "expected BFloat16 or Half [rows, heads, head size]"
            shape = [SEQUENCES, count, HEAD]
            yield head("type", lambda t: t.float(), f"{shown} is Float {shape}, {expected}")
            flat = [SEQUENCES, count * HEAD]
            yield head("flat", lambda t: t.flatten(1), f"{shown} is BFloat16 {flat}, {expected}")
            elsewhere = f"{shown} is not on CUDA device 0, where the cache is"
            yield head("elsewhere", lambda t: t.cpu(), elsewhere)
            gaps = (
                f"the heads of {shown} are not contiguous, or do not begin at multiples of 8 "
                "bytes; clone it"
            )
            yield head("gaps", with_gaps, gaps)
            yield head("misaligned", misaligned, gaps)
            yield head("odd rows", lambda t: _padded_rows(t, 2), gaps)
            yield head("odd heads", lambda t: _padded(t, 2), gaps)

        shown = "q" if op == "kv_decode" else "key"
        yield kv(
            "pages elsewhere",
            lambda a: {"pages": a["pages"].cpu()},
            f"{shown} is not on CUDA device",
        )
        for k_bits, v_bits in ((3, 3), (4, 8), (8, 3), (16, 16)):
            yield kv(
                f"bits {k_bits} and {v_bits}",
                lambda a, k=k_bits, v=v_bits: {"k_bits": k, "v_bits": v},
                f"keys of {k_bits} bits and values of {v_bits}, expected 4 and 4, 8 and 8, or 8 "
                "and 4",
            )
        yield kv(
            "head size",
            lambda a, heads=heads: {name: _wider(a[name], 80) for name in heads},
            "the head size is 80, expected 64, 96, 128 or 256",
        )

        def rotated(a: Arguments, heads=heads) -> Arguments:
            pages = a["pages"].new_zeros(BLOCKS, KV_HEADS, PAGE_TOKENS * (96 + 8))
            return {name: _wider(a[name], 96) for name in heads} | {
                "pages": pages,
                "hadamard": True,
            }

        text = "a Hadamard rotation of 96 channels; it needs a power of two"
        yield kv("rotation", rotated, text)
        expected = "expected Byte [blocks, KV heads, bytes of a page]"
        shape = [BLOCKS, KV_HEADS, PAGE_BYTES]
        yield kv(
            "pages type",
            lambda a: {"pages": a["pages"].view(torch.int8)},
            f"the cache is Char {shape}, {expected}",
        )
        yield kv(
            "pages flat",
            lambda a: {"pages": a["pages"].flatten(1)},
            f"the cache is Byte {[BLOCKS, KV_HEADS * PAGE_BYTES]}, {expected}",
        )
        for size in (0, PAGE_BYTES - TOKEN_BYTES):
            shape = [BLOCKS, KV_HEADS, size]
            yield kv(
                f"pages of {size} bytes",
                lambda a, size=size: {"pages": a["pages"][..., :size].contiguous()},
                f"the cache is {shape}, but a page of keys of {BITS} bits, values of {BITS} and "
                f"heads of {HEAD} has {TOKEN_BYTES} bytes a token, for a multiple of 16 tokens",
            )
        shape = [BLOCKS, KV_HEADS, PAGE_BYTES]
        yield kv(
            "pages of narrower keys",
            lambda a: {"k_bits": 8},
            f"the cache is {shape}, but a page of keys of 8 bits, values of {BITS} and heads of "
            f"{HEAD} has {TOKEN_BYTES + HEAD // 2} bytes a token, for a multiple of 16 tokens",
        )
        memory = (
            "pages of the cache are not contiguous CUDA memory, or do not begin at multiples of "
            "16 bytes"
        )
        yield kv("pages gaps", lambda a: {"pages": with_gaps(a["pages"])}, memory)
        yield kv("pages misaligned", lambda a: {"pages": misaligned(a["pages"])}, memory)
        yield kv("pages odd rows", lambda a: {"pages": _padded_rows(a["pages"], 8)}, memory)
        yield kv("pages odd heads", lambda a: {"pages": _padded(a["pages"], 8)}, memory)


def _of_pair(op: str) -> Iterator[Refusal]:
    """`value` beside `key`, and both beside the cache."""
    shape = [SEQUENCES, KV_HEADS, HEAD]

    def value(name: str, change: Callable[[torch.Tensor], torch.Tensor], text: str):
        message = f"{op}: value is {text}, but key is BFloat16 {shape}"
        return Refusal(op, f"value {name}", lambda a: {"value": change(a["value"])}, message, _CUDA)

    yield value("other half", lambda t: t.half(), f"Half {shape}")
    yield value("rows", lambda t: t[1:], f"BFloat16 {[SEQUENCES - 1, KV_HEADS, HEAD]}")
    yield value("heads", lambda t: t[:, 1:], f"BFloat16 {[SEQUENCES, KV_HEADS - 1, HEAD]}")
    yield value("size", lambda t: _wider(t, 128), f"BFloat16 {[SEQUENCES, KV_HEADS, 128]}")
    yield Refusal(
        op,
        "heads",
        lambda a: {name: a[name][:, 1:] for name in ("key", "value")},
        f"{op}: key has {KV_HEADS - 1} heads, but the cache {KV_HEADS}",
        _CUDA,
    )


def _of_kv_write() -> Iterator[Refusal]:
    op = "kv_write"
    yield from _of_pair(op)
    expected = f"expected contiguous Long of at most {SEQUENCES}"
    for name, change, text in (
        ("type", lambda t: t.int(), f"slots is Int [{SEQUENCES}], {expected}"),
        ("deeper", lambda t: t[None], f"slots is Long [1, {SEQUENCES}], {expected}"),
        ("gaps", with_gaps, f"slots is Long [{SEQUENCES}], {expected}"),
        ("many", lambda t: t.repeat(2), f"slots is Long [{2 * SEQUENCES}], {expected}"),
        ("elsewhere", lambda t: t.cpu(), "slots is not on CUDA device 0, where the cache is"),
    ):
        yield Refusal(
            op,
            f"slots {name}",
            lambda a, change=change: {"slots": change(a["slots"])},
            f"{op}: {text}",
            _CUDA,
        )
    expected = f"expected contiguous Float [{KV_HEADS}, {HEAD}]"
    for name, change, text in (
        ("type", lambda t: t.half(), f"k_mean is Half [{KV_HEADS}, {HEAD}], {expected}"),
        ("flat", lambda t: t.flatten(), f"k_mean is Float [{KV_HEADS * HEAD}], {expected}"),
        ("heads", lambda t: t[:-1], f"k_mean is Float [{KV_HEADS - 1}, {HEAD}], {expected}"),
        ("gaps", with_gaps, f"k_mean is Float [{KV_HEADS}, {HEAD}], {expected}"),
        ("misaligned", misaligned, "k_mean does not begin at a multiple of 16 bytes; clone it"),
        ("elsewhere", lambda t: t.cpu(), "k_mean is not on CUDA device 0, where the cache is"),
    ):
        yield Refusal(
            op,
            f"k_mean {name}",
            lambda a, change=change: {"k_mean": change(a["k_mean"])},
            f"{op}: {text}",
            _CUDA,
        )

    def many(a: Arguments) -> Arguments:
        tokens, heads = 2**15, 2**10
        key = a["key"][:1, :1].expand(tokens, heads, HEAD)
        return {
            "key": key,
            "value": key,
            "slots": a["slots"].new_zeros(tokens),
            "pages": a["pages"][:1, :1].expand(1, heads, PAGE_BYTES),
            "k_mean": None,
        }

    yield Refusal(op, "tokens", many, f"{op}: 32768 tokens are too many", _CUDA)


def _of_kv_decode() -> Iterator[Refusal]:
    op = "kv_decode"
    heads = GROUP * KV_HEADS
    shape = [SEQUENCES, heads, HEAD]

    def decode(name: str, change: Callable[[Arguments], Arguments], text: str):
        return Refusal(op, name, change, f"{op}: {text}", _CUDA)

    for name, change, text in (
        ("other half", lambda t: t.half(), f"Half {shape}"),
        ("rows", lambda t: t[1:], f"BFloat16 {[SEQUENCES - 1, heads, HEAD]}"),
        ("heads", lambda t: t[:, 1:], f"BFloat16 {[SEQUENCES, heads - 1, HEAD]}"),
        ("size", lambda t: _wider(t, 128), f"BFloat16 {[SEQUENCES, heads, 128]}"),
    ):
        yield decode(
            f"out {name}",
            lambda a, change=change: {"out": change(a["out"])},
            f"out is {text}, but q is BFloat16 {shape}",
        )

    def of_heads(a: Arguments, count: int) -> Arguments:
        tensor = a["query"][:, :1].repeat(1, count, 1)
        return {"query": tensor, "out": torch.empty_like(tensor)}

    for count in (heads - 1, 17 * KV_HEADS):
        yield decode(
            f"{count} heads",
            lambda a, count=count: of_heads(a, count),
            f"{count} query heads for {KV_HEADS} KV heads, expected 1 to 16 for each",
        )

    def odd_group(a: Arguments) -> Arguments:
        query = a["query"].new_zeros(SEQUENCES, 9 * KV_HEADS, 96)
        pages = a["pages"].new_zeros(BLOCKS, KV_HEADS, PAGE_TOKENS * (96 + 8))
        return {"query": query, "out": torch.empty_like(query), "pages": pages, "sinks": None}

    text = "9 query heads of size 96 for a KV head, expected 1 to 8 or an even number up to 16"
    yield decode("an odd group", odd_group, text)
    yield decode(
        "no KV heads",
        lambda a: {"pages": a["pages"][:, :0]},
        f"{heads} query heads for 0 KV heads, expected 1 to 16 for each",
    )
    expected = f"expected contiguous BFloat16 [{heads}]"
    for name, change, text in (
        ("type", lambda t: t.float(), f"sinks is Float [{heads}], {expected}"),
        ("deeper", lambda t: t[None], f"sinks is BFloat16 [1, {heads}], {expected}"),
        ("short", lambda t: t[1:], f"sinks is BFloat16 [{heads - 1}], {expected}"),
        ("gaps", with_gaps, f"sinks is BFloat16 [{heads}], {expected}"),
        ("elsewhere", lambda t: t.cpu(), "sinks is not on CUDA device 0, where the cache is"),
    ):
        yield decode(f"sinks {name}", lambda a, change=change: {"sinks": change(a["sinks"])}, text)
    text = "soft_cap is -1, expected 0 (not capped) or a positive number"
    yield decode("soft_cap", lambda a: {"soft_cap": -1.0}, text)
    yield decode("soft_cap NaN", lambda a: {"soft_cap": float("nan")}, "soft_cap is ")
    for length in (0, 9):
        yield decode(
            f"query_len {length}",
            lambda a, length=length: {"query_len": length},
            f"query_len is {length}, expected 1 to 8",
        )

    def starts(a: Arguments, count: int = SEQUENCES + 1) -> torch.Tensor:
        return torch.arange(count, dtype=torch.int32, device=a["query"].device)

    text = "query_len is 2, which needs query_start"
    yield decode("no query_start", lambda a: {"query_len": 2}, text)
    text = "query_len is 1, and query_start is for more"
    yield decode("needless query_start", lambda a: {"query_start": starts(a)}, text)
    expected = f"expected contiguous Int [{SEQUENCES + 1}]"
    for name, change, text in (
        ("type", lambda t: t.long(), f"query_start is Long [{SEQUENCES + 1}], {expected}"),
        ("deeper", lambda t: t[None], f"query_start is Int [1, {SEQUENCES + 1}], {expected}"),
        ("short", lambda t: t[1:], f"query_start is Int [{SEQUENCES}], {expected}"),
        ("gaps", with_gaps, f"query_start is Int [{SEQUENCES + 1}], {expected}"),
        ("elsewhere", lambda t: t.cpu(), "query_start is not on CUDA device 0, where the cache is"),
    ):
        yield decode(
            f"query_start {name}",
            lambda a, change=change: {"query_len": 2, "query_start": change(starts(a))},
            text,
        )

    def more_rows(a: Arguments) -> Arguments:
        query = a["query"].repeat(3, 1, 1)
        return {
            "query": query,
            "out": torch.empty_like(query),
            "query_len": 2,
            "query_start": starts(a),
        }

    text = f"q has {3 * SEQUENCES} rows, but {SEQUENCES} sequences of up to 2 new tokens have fewer"
    yield decode("more rows", more_rows, text)
    yield from _of_block_table(op)
    yield from _of_ints(op, "seq_lens", SEQUENCES)
    yield decode("scale", lambda a: {"scale": 0.0}, "scale is 0, expected a positive number")
    yield decode("scale NaN", lambda a: {"scale": float("nan")}, "scale is ")
    for window in (-1, 2**31):
        yield decode(
            f"window {window}",
            lambda a, window=window: {"window": window},
            f"window is {window}, expected 0 (all tokens) or more",
        )

    def far_apart(a: Arguments) -> Arguments:
        step = 2**30
        memory = a["pages"].new_empty(step + PAGE_BYTES)
        return {"pages": memory.as_strided((1, KV_HEADS, PAGE_BYTES), (2 * step, step, 1))}

    text = f"{KV_HEADS} KV heads, {2**30} bytes apart, are too far apart"
    yield decode("far apart", far_apart, text)

    def many_sequences(a: Arguments) -> Arguments:
        rows, blocks = 2**20, 2**12
        return {
            "query": a["query"][:1].expand(rows, -1, -1),
            "out": a["out"][:1].expand(rows, -1, -1),
            "block_table": a["block_table"].new_zeros(1, blocks).expand(rows, -1),
            "seq_lens": a["seq_lens"].new_ones(rows),
        }

    yield decode(
        "many sequences",
        many_sequences,
        f"{2**20} sequences of up to {2**16} tokens are too many",
    )

    def long_pages(a: Arguments) -> Arguments:
        pages = a["pages"].new_zeros(1, 1, 2**17 * TOKEN_BYTES).expand(1, KV_HEADS, -1)
        return {"pages": pages, "block_table": a["block_table"].new_zeros(SEQUENCES, 16)}

    text = f"{SEQUENCES} sequences of up to {2**21} tokens are too many"
    yield decode("long pages", long_pages, text)
    memory = "the workspace is not contiguous Int at a multiple of 16 bytes"
    for name, change, text in (
        ("type", lambda t: t.float(), memory),
        ("gaps", with_gaps, memory),
        ("misaligned", misaligned, memory),
        ("elsewhere", lambda t: t.cpu(), "the workspace is not on CUDA device 0, where the cache"),
        ("short", lambda t: t[:16], "the workspace has 16 integers, expected at least "),
    ):
        yield decode(
            f"workspace {name}",
            lambda a, change=change: {"workspace": change(a["workspace"])},
            text,
        )


def _of_kv_dequantize() -> Iterator[Refusal]:
    op = "kv_dequantize"
    yield from _of_pair(op)
    # Its length is the number of sequences.
    yield from _of_ints(op, "first_token", SEQUENCES, has_length=False)
    yield from _of_ints(op, "row_start", SEQUENCES + 1)
    yield from _of_block_table(op)

    def dequantize(name: str, change: Callable[[Arguments], Arguments], text: str):
        return Refusal(op, name, change, f"{op}: {text}", _CUDA)

    yield dequantize(
        "many rows",
        lambda a: {name: a[name][:1].expand(2**30, -1, -1) for name in ("key", "value")},
        f"{2**30} rows of up to {PAGE_TOKENS} tokens are too many",
    )
    for name in ("key", "value"):
        text = f"the heads of {name} do not begin at multiples of 16 bytes"
        for kind, change in (
            ("at 8 bytes", lambda t: misaligned(t, 4)),
            ("rows at 8 bytes", lambda t: _padded_rows(t, 4)),
            ("heads at 8 bytes", lambda t: _padded(t, 4)),
        ):
            yield dequantize(
                f"{name} {kind}",
                lambda a, name=name, change=change: {name: change(a[name])},
                text,
            )


def _of_block_table(op: str) -> Iterator[Refusal]:
    expected = f"expected Int [{SEQUENCES}, blocks] with contiguous rows"
    for name, change, text in (
        ("type", lambda t: t.long(), f"block_table is Long [{SEQUENCES}, 1], {expected}"),
        ("flat", lambda t: t[:, 0], f"block_table is Int [{SEQUENCES}], {expected}"),
        ("short", lambda t: t[1:], f"block_table is Int [{SEQUENCES - 1}, 1], {expected}"),
        (
            "gaps",
            lambda t: with_gaps(t.repeat(1, 2)),
            f"block_table is Int [{SEQUENCES}, 2], {expected}",
        ),
        ("elsewhere", lambda t: t.cpu(), "block_table is not on CUDA device 0, where the cache is"),
    ):
        yield Refusal(
            op,
            f"block_table {name}",
            lambda a, change=change: {"block_table": change(a["block_table"])},
            f"{op}: {text}",
            _CUDA,
        )


def _of_ints(op: str, argument: str, count: int, has_length: bool = True) -> Iterator[Refusal]:
    expected = f"expected contiguous Int [{count}]"
    changes = [
        ("type", lambda t: t.long(), f"{argument} is Long [{count}], {expected}"),
        ("deeper", lambda t: t[None], f"{argument} is Int [1, {count}], {expected}"),
        ("gaps", with_gaps, f"{argument} is Int [{count}], {expected}"),
        ("elsewhere", lambda t: t.cpu(), f"{argument} is not on CUDA device 0, where the cache is"),
    ]
    if has_length:
        changes.append(
            ("short", lambda t: t[1:], f"{argument} is Int [{count - 1}], {expected}"),
        )
    for name, change, text in changes:
        yield Refusal(
            op,
            f"{argument} {name}",
            lambda a, change=change: {argument: change(a[argument])},
            f"{op}: {text}",
            _CUDA,
        )


_CUDA = ("cuda",)


def with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second one of twice as many."""
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


def misaligned(tensor: torch.Tensor, elements: int = 1) -> torch.Tensor:
    """The same values, so many elements further than where memory begins."""
    shifted = tensor.new_empty(tensor.numel() + elements)[elements:].view(tensor.shape)
    return shifted.copy_(tensor)


def _padded(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same values with so many unused elements after the last dimension of each."""
    padding = tensor.new_zeros(*tensor.shape[:-1], elements)
    return torch.cat((tensor, padding), dim=-1)[..., : tensor.shape[-1]]


def _padded_rows(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same values with so many unused elements after each row of the first dimension."""
    return _padded(tensor.flatten(1), elements).unflatten(1, tensor.shape[1:])


def _wider(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Zeros with another size of the last dimension."""
    return tensor.new_zeros(*tensor.shape[:-1], size)


def _moved(tensors: Arguments, like: Arguments) -> Arguments:
    return {name: tensor.to(like["x"].device) for name, tensor in tensors.items()}


def _rows(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16, device=device)


def _ints(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=device)


def _pages(device: torch.device) -> torch.Tensor:
    return torch.zeros(BLOCKS, KV_HEADS, PAGE_BYTES, dtype=torch.uint8, device=device)


def _gemm(device: torch.device, weights: str) -> Arguments:
    codes = torch.zeros(N, K // 2, dtype=torch.uint8, device=device)
    scale = torch.ones(N, K // 128, dtype=torch.uint8, device=device)
    offset = torch.zeros(N, K // 128, dtype=torch.int8, device=device)
    is_channel, is_nested = weights == "channel", weights == "nested"
    return {
        "x": torch.ones(M, K, dtype=torch.int8, device=device),
        "x_scale": torch.ones(M, dtype=torch.float32, device=device),
        "x_row_sum": torch.full((M,), K, dtype=torch.int32, device=device),
        "weight": w4a8_layout.pack(codes, *(() if is_channel else (scale, offset))),
        "channel_scale": torch.ones(N, dtype=torch.float32, device=device),
        "channel_zero": torch.zeros(N, dtype=torch.float32, device=device) if is_channel else None,
        "group_scale": None,
        "group_offset": None,
        "bias": None,
        "out_dtype": torch.bfloat16,
        "workspace": linear_ops.workspace(device) if device.type == "cuda" else None,
        "residual": w4a8_layout.pack(codes) if is_nested else None,
        "use_residual": torch.ones(1, dtype=torch.int32, device=device) if is_nested else None,
    }


def _gemm_experts(device: torch.device, weights: str) -> Arguments:
    one = _gemm(device, weights)
    return {
        "x": torch.ones(TILE, K, dtype=torch.int8, device=device),
        "x_scale": torch.ones(TILE, device=device),
        "x_row_sum": torch.full((TILE,), K, dtype=torch.int32, device=device),
        "tiles": _ints(device, 1) + 1,
        "tile_expert": _ints(device, 1),
        "experts": EXPERTS,
        **{name: _repeated(one[name]) for name in ("weight", "channel_scale", "channel_zero")},
        "bias": None,
        "out_dtype": torch.bfloat16,
        "workspace": one["workspace"],
        "residual": _repeated(one["residual"]),
        "use_residual": one["use_residual"],
    }


def _repeated(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else torch.cat([tensor] * EXPERTS)

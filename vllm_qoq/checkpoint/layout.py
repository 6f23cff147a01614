"""The layout of a layer: how each quantization method that a set may use stores it.

A layer is described from the names, dtypes and shapes of its tensors and from the
set's own `quantization_config`; no tensor is read. N is out_features, K is
in_features, G the group size, `pack` = 32 / bits values in an int32:

    plain    weight F16|BF16|F32 [N, K]
    dense    weight I8|F8 [N, K]              weight_scale [N, 1] | [N, K/G] | [] | blocks
             (weight_zero_point as scale)      or weight_scale_inv [N/b, K/b]
    packed   weight_packed I32 [N, K/pack]    weight_scale [N, K/G] | [N, 1]
             weight_shape I64 [2]              (weight_zero_point I32 [N/pack, K/G])
    gptq     qweight I32 [K/pack, N]          scales [K/G, N]   qzeros I32 [K/G, N/pack]
             g_idx I32 [K]
    awq      qweight I32 [K, N/pack]          scales [K/G, N]   qzeros I32 [K/G, N/pack]
    qoq      qweight U8 [N, K/2]              and what `vllm_qoq.checkpoint.format` says of QoQ sets
    residual qresidual U8 [N, K/2]            of a nested set; its base has the rest
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vllm_qoq.checkpoint.folder import TensorInfo
from vllm_qoq.checkpoint.format import (
    INPUT_RATIO,
    QOQ_LINEAR,
    QOQ_RESIDUAL,
    QoQSet,
    ResidualSet,
    split_layer,
)
from vllm_qoq.errors import FormatError, shown

StorageMethod = Literal["plain", "dense", "packed", "gptq", "awq", "qoq", "residual"]
Leaves = Mapping[str, TensorInfo]

QUANTIZED_LEAVES = frozenset(
    {
        *("weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point"),
        *("weight_shape", "weight_g_idx", "weight_global_scale", "scale_weight"),
        *("input_scale", "input_zero_point", "input_global_scale"),
        *("qweight", "qzeros", "scales", "g_idx"),
        *("group_scale", "group_offset", "channel_scale", "channel_zero", "qresidual"),
        INPUT_RATIO,
    }
)
KV_CACHE_LEAVES = frozenset(
    {
        *("k_scale", "v_scale", "q_scale", "prob_scale", "kv_scale"),
        *("k_zero_point", "v_zero_point", "output_scale"),
    }
)
FLOATS = frozenset({"F16", "BF16", "F32"})
FP8 = frozenset({"F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of one layer of one set.

    `block` is the part of the weight under one scale, as (rows, columns).
    """

    method: StorageMethod
    out_features: int
    in_features: int
    bits: int
    block: tuple[int, int]

    @property
    def group_size(self) -> int | None:
        """Input channels per scale, or None when a scale covers all of them."""
        return self.block[1] if self.block[1] < self.in_features else None


def group_leaves(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Group tensors by layer: layer name -> leaf -> info."""
    layers: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        layer, leaf = split_layer(name)
        layers.setdefault(layer, {})[leaf] = info
    return layers


def is_quantized(leaves: Leaves) -> bool:
    """Whether a layer with these tensors is a quantized one, complete or not."""
    if not QUANTIZED_LEAVES.isdisjoint(leaves):
        return True
    return "weight" in leaves and leaves["weight"].dtype in {"I8", "U8", *FP8}


def describe(leaves: Leaves, config: Mapping[str, Any]) -> Layout:
    """Find the layout of a layer, or raise FormatError with the tensor that is wrong.

    `config` is the `quantization_config` of the set.
    """
    if config.get("quant_method") == QOQ_LINEAR and is_quantized(leaves):
        layout = _qoq(leaves, config)
    elif config.get("quant_method") == QOQ_RESIDUAL and is_quantized(leaves):
        layout = _residual(leaves)
    elif "weight_packed" in leaves:
        layout = _packed(leaves, config)
    elif "qweight" in leaves and "scales" in leaves:
        layout = _awq(leaves, config) if _is_awq(config) else _gptq(leaves, config)
    elif "weight" in leaves:
        layout = _dense(leaves, config) if is_quantized(leaves) else _plain(leaves)
    else:
        raise _lost(leaves, "weight")
    if "bias" in leaves:
        _expect(leaves["bias"], FLOATS, (layout.out_features,))
    return layout


def weight_args(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `weights` entries of a compressed-tensors config, one per group of layers."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        return []
    found = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    return [args for args in found if isinstance(args, dict)]


def _plain(leaves: Leaves) -> Layout:
    weight = leaves["weight"]
    if len(weight.shape) != 2:
        raise _wrong(weight, "a matrix [out_features, in_features]")
    _expect(weight, FLOATS, weight.shape)
    n, k = weight.shape
    bits = 32 if weight.dtype == "F32" else 16
    return Layout("plain", n, k, bits=bits, block=(n, k))


def _dense(leaves: Leaves, config: Mapping[str, Any]) -> Layout:
    weight = leaves["weight"]
    if len(weight.shape) != 2:
        raise _wrong(weight, "a matrix [out_features, in_features]")
    _expect(weight, {"I8", *FP8}, weight.shape)
    scale = leaves.get("weight_scale") or leaves.get("weight_scale_inv")
    if scale is None:
        raise _lost(leaves, "weight_scale")
    block = _block(scale, weight.shape, config)
    if "weight_zero_point" in leaves:
        _expect(leaves["weight_zero_point"], {"I8", *FP8}, scale.shape)
    bits = {bits for args in weight_args(config) if isinstance(bits := args.get("num_bits"), int)}
    n, k = weight.shape
    return Layout("dense", n, k, bits=bits.pop() if len(bits) == 1 else 8, block=block)


def _block(scale: TensorInfo, shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, int]:
    """Find the block of a dense weight [N, K] under one scale, from the shape of the scales."""
    _expect(scale, FLOATS, scale.shape)
    n, k = shape
    if math.prod(scale.shape) == 1:
        return n, k
    if scale.shape in ((n,), (n, 1)):
        return 1, k
    sizes = [
        config.get("weight_block_size"),
        *(a.get("block_structure") for a in weight_args(config)),
    ]
    sizes += [(1, a.get("group_size")) for a in weight_args(config)]
    for size in sizes:
        if (
            isinstance(size, (list, tuple))
            and len(size) == 2
            and all(_is_positive(s) for s in size)
        ):
            rows, columns = size
            if scale.shape == (math.ceil(n / rows), math.ceil(k / columns)):
                return rows, columns
    raise _wrong(scale, f"one scale per row, group or block of a {n} x {k} weight")


def _packed(leaves: Leaves, config: Mapping[str, Any]) -> Layout:
    packed, scale = leaves["weight_packed"], leaves.get("weight_scale")
    if "weight_shape" not in leaves or scale is None:
        raise _lost(leaves, "weight_scale" if scale is None else "weight_shape")
    if len(packed.shape) != 2 or len(scale.shape) != 2:
        raise _wrong(packed if len(packed.shape) != 2 else scale, "a matrix")
    n, words = packed.shape
    _expect(packed, {"I32"}, (n, words))
    _expect(leaves["weight_shape"], {"I64"}, (2,))
    for args in weight_args(config):
        bits, group = args.get("num_bits"), args.get("group_size")
        if bits not in (2, 4, 8):
            continue
        k = words * 32 // bits
        group = int(group or 0) if _is_positive(group) else k
        if scale.shape == (n, math.ceil(k / group)):
            break
    else:
        raise _wrong(scale, f"scales of the groups that the config describes, for {n} rows")
    _expect(scale, FLOATS, scale.shape)
    if not args.get("symmetric", True) and "weight_zero_point" not in leaves:
        raise _lost(leaves, "weight_zero_point")
    if "weight_zero_point" in leaves:
        zeros = (math.ceil(n * bits / 32), scale.shape[1])
        _expect(leaves["weight_zero_point"], {"I32"}, zeros)
    if "weight_g_idx" in leaves:
        _expect(leaves["weight_g_idx"], {"I32"}, (k,))
    return Layout("packed", n, k, bits=bits, block=(1, group))


def _gptq(leaves: Leaves, config: Mapping[str, Any]) -> Layout:
    bits, group = _bits_and_group(config)
    qweight = leaves["qweight"]
    if len(qweight.shape) != 2:
        raise _wrong(qweight, "a matrix")
    k, n = qweight.shape[0] * 32 // bits, qweight.shape[1]
    group = group or k
    _expect(qweight, {"I32"}, qweight.shape)
    _scales_and_zeros(leaves, bits, math.ceil(k / group), n)
    if "g_idx" in leaves:
        _expect(leaves["g_idx"], {"I32"}, (k,))
    return Layout("gptq", n, k, bits=bits, block=(1, group))


def _awq(leaves: Leaves, config: Mapping[str, Any]) -> Layout:
    bits, group = _bits_and_group(config)
    qweight = leaves["qweight"]
    if len(qweight.shape) != 2:
        raise _wrong(qweight, "a matrix")
    k, n = qweight.shape[0], qweight.shape[1] * 32 // bits
    group = group or k
    _expect(qweight, {"I32"}, qweight.shape)
    _scales_and_zeros(leaves, bits, math.ceil(k / group), n)
    return Layout("awq", n, k, bits=bits, block=(1, group))


def _qoq(leaves: Leaves, config: Mapping[str, Any]) -> Layout:
    qoq_set = QoQSet.parse(config, f"config.json: {QOQ_LINEAR}")
    n, k = _nibbles(leaves, "qweight")
    try:
        expected = qoq_set.tensors(n, k)
    except FormatError as error:
        qweight = leaves["qweight"]
        raise FormatError(f"{qweight.file}: {qweight.name}: {error}") from None
    _check_codes(leaves, expected)
    _only(leaves, expected, f"group_size {qoq_set.group_size}")
    group = k if qoq_set.group_size == -1 else qoq_set.group_size
    return Layout("qoq", n, k, bits=4, block=(1, group))


def _check_codes(leaves: Leaves, expected: Mapping[str, tuple[str, list[int]]]) -> None:
    """Raise FormatError for a qweight whose size all other tensors of the layer contradict alike.

    expected  what a layer of the size of the qweight has
    """
    others = [leaf for leaf in expected if leaf != "qweight"]
    for axis, what in enumerate(("rows", "groups of columns")):
        sizes = {
            leaf: leaves[leaf].shape[axis] if len(leaves[leaf].shape) > axis else None
            for leaf in others
            if leaf in leaves and len(expected[leaf][1]) > axis
        }
        size = next(iter(sizes.values()), None)
        is_one = len(sizes) > 1 and size is not None and set(sizes.values()) == {size}
        if is_one and size != expected[next(iter(sizes))][1][axis]:
            raise _wrong(leaves["qweight"], f"{size} {what}, as {', '.join(sizes)} have")


def _residual(leaves: Leaves) -> Layout:
    n, k = _nibbles(leaves, "qresidual")
    _only(leaves, ResidualSet.tensors(n, k), QOQ_RESIDUAL)
    return Layout("residual", n, k, bits=4, block=(1, k))  # the groups are the base's


def _nibbles(leaves: Leaves, leaf: str) -> tuple[int, int]:
    """The sizes (N, K) of a tensor with two codes in a byte."""
    if leaf not in leaves:
        raise _lost(leaves, leaf)
    if len(leaves[leaf].shape) != 2:
        raise _wrong(leaves[leaf], "a matrix")
    n, half = leaves[leaf].shape
    return n, 2 * half


def _only(leaves: Leaves, expected: Mapping[str, tuple[str, list[int]]], what: str) -> None:
    """Raise FormatError for a layer of `what` that lacks a tensor, or has another."""
    for leaf, (dtype, shape) in expected.items():
        if leaf not in leaves:
            raise _lost(leaves, leaf)
        _expect(leaves[leaf], {dtype}, tuple(shape))
    for leaf in sorted(QUANTIZED_LEAVES & leaves.keys() - expected.keys() - {INPUT_RATIO}):
        raise _wrong(leaves[leaf], f"nothing: {what} does not have it")


def _scales_and_zeros(leaves: Leaves, bits: int, groups: int, n: int) -> None:
    if "qzeros" not in leaves:
        raise _lost(leaves, "qzeros")
    _expect(leaves["scales"], FLOATS, (groups, n))
    _expect(leaves["qzeros"], {"I32"}, (groups, n * bits // 32))


def _is_awq(config: Mapping[str, Any]) -> bool:
    return "awq" in f"{config.get('quant_method')} {config.get('packing_format')}"


def _bits_and_group(config: Mapping[str, Any]) -> tuple[int, int | None]:
    bits = config.get("w_bit", config.get("bits"))
    group = config.get("q_group_size", config.get("group_size"))
    if bits not in (2, 4, 8):
        raise FormatError(f"config.json: quantization_config.bits: {shown(bits)} is not 2, 4 or 8")
    return bits, group if _is_positive(group) else None


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and value > 0


def _expect(info: TensorInfo, dtypes: frozenset[str] | set[str], shape: tuple[int, ...]) -> None:
    if info.dtype not in dtypes or info.shape != shape:
        raise _wrong(info, f"{' or '.join(sorted(dtypes))} {list(shape)}")


def _wrong(info: TensorInfo, expected: str) -> FormatError:
    return FormatError(
        f"{info.file}: {info.name}: is {info.dtype} {list(info.shape)}, expected {expected}; "
        "quantize the model again"
    )


def _lost(leaves: Leaves, leaf: str) -> FormatError:
    some = next(iter(leaves.values()))
    layer, _ = split_layer(some.name)
    return FormatError(
        f"{some.file}: {layer}.{leaf}: missing, though the layer has {', '.join(sorted(leaves))}; "
        "download or quantize the model again"
    )

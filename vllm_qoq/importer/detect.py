"""Detection of a source's format by the names of its tensors, and checks that all are there.

Configs are not asked, because those of QServe do not name the format and edited ones do wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from vllm_qoq.checkpoint.folder import TensorInfo
from vllm_qoq.checkpoint.layout import FLOATS
from vllm_qoq.errors import FormatError
from vllm_qoq.importer.tiles import TILE
from vllm_qoq.models.linears import CONSTANT, LinearLayers
from vllm_qoq.models.tensors import HEAD
from vllm_qoq.numerics import GROUP_SIZES

Kind = Literal["g128", "g64", "g32", "channel", "w8a8"]
GROUP_SIZE_OF: Mapping[Kind, int] = {"g128": 128, "g64": 64, "g32": 32}
"""The inputs of a group, of the kinds that have groups."""
VECTORS = frozenset({"channel_scale", "channel_zero", "weight_scale"})
"""The leaves of our tensors with a number per output channel."""
KV_SCALE = "kv_scale_quant_orig"
_KIND_OF = {size: kind for kind, size in GROUP_SIZE_OF.items()}
# The tensor that only a packed layer of this kind has; g128 stands for any groups.
_MARKS: Mapping[str, Kind] = {
    ".s2_scales": "g128",
    ".s1_szeros": "channel",
    ".dequant_scale": "w8a8",
}
_I8 = frozenset({"I8"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """The dtype, one of several, and the shape that a tensor must have."""

    dtypes: frozenset[str]
    shape: tuple[int, ...]


def packed_kind(tensors: Mapping[str, TensorInfo], model: LinearLayers) -> Kind:
    """Find the format of a packed checkpoint, from the names and shapes of its tensors."""
    found: dict[Kind, str] = {}
    for name in tensors:
        for mark, kind in _MARKS.items():
            if name.endswith(mark):
                found.setdefault(kind, name)
    if not found:
        raise FormatError(
            f"no tensor ends in {', '.join(_MARKS)}: this is not a checkpoint of QServe; "
            "give the folder that QServe serves, or model.pt and scale.pt of deepcompressor"
        )
    if len(found) > 1:
        raise FormatError(
            f"{' and '.join(found.values())}: of different formats in one checkpoint; "
            "remove the files that are not part of it"
        )
    kind = next(iter(found))
    return _kind_of_groups(tensors, "s2_scales", model) if kind in GROUP_SIZE_OF else kind


def raw_kind(scales: Mapping[str, TensorInfo], model: LinearLayers) -> Kind:
    """Find the format that `scale.pt` of deepcompressor describes, from its tensors."""
    if any(name.endswith(".weight.scale.1") for name in scales):
        return _kind_of_groups(scales, "weight.scale.1", model)
    if any(name.endswith((".weight.zero", ".weight.scaled_zero")) for name in scales):
        return "channel"
    if any(name.endswith(".weight.scale.0") for name in scales):
        return "w8a8"
    raise FormatError("scale.pt: no tensor ends in .weight.scale.0; give deepcompressor's output")


def _kind_of_groups(tensors: Mapping[str, TensorInfo], leaf: str, model: LinearLayers) -> Kind:
    """Find the kind from the first layer whose `leaf` has a number for each group of each output.

    Raises FormatError for groups of a size that there is not here. Where no layer says the size, it
    is 128, with which the shapes are compared.
    """
    for layer, (n, k) in model.linears.items():
        info = tensors.get(f"{layer}.{leaf}")
        groups = prod(info.shape) // n if info is not None else 0
        if info is None or groups == 0 or prod(info.shape) % n or k % groups:
            continue
        if k // groups not in _KIND_OF:
            raise FormatError(
                f"{info.file}: {info.name}: has {groups} groups of {k // groups} inputs; only "
                f"groups of {', '.join(map(str, GROUP_SIZES))} can be imported"
            )
        return _KIND_OF[k // groups]
    return "g128"


def packed_layer(kind: Kind, n: int, k: int) -> dict[str, Wanted]:
    """Map each leaf of a packed layer with N outputs and K inputs to what it must be."""
    channel = Wanted(FLOATS, (n,))
    if kind == "w8a8":
        return {"weight": Wanted(_I8, (n, k)), "dequant_scale": channel}
    qweight = {"qweight": Wanted(_I8, (n, k // 2)), "s1_scales": channel}
    if kind == "channel":
        return qweight | {"s1_szeros": channel}
    groups = Wanted(_I8, (k // GROUP_SIZE_OF[kind], n))
    return qweight | {"s2_scales": groups, "s2_zeros": groups}


def check_packed(tensors: Mapping[str, TensorInfo], kind: Kind, model: LinearLayers) -> list[str]:
    """Raise FormatError for what is missing, extra or misshapen in a packed checkpoint.

    Returns the names of the tensors that an import drops.
    """
    wanted: dict[str, Wanted] = {}
    for layer, (n, k) in model.linears.items():
        if kind != "w8a8":
            _check_divisible(f"{layer}.qweight", n, k, GROUP_SIZE_OF.get(kind, TILE))
        wanted |= {f"{layer}.{leaf}": w for leaf, w in packed_layer(kind, n, k).items()}
    return _check_all(tensors, wanted, model)


def check_raw(tensors: Mapping[str, TensorInfo], kind: Kind, model: LinearLayers) -> list[str]:
    """Raise FormatError for what is missing, extra or misshapen in `model.pt`.

    Returns the names of the tensors that an import drops.
    """
    for layer, (_, k) in model.linears.items():
        _check_divisible(f"{layer}.weight", TILE, k, GROUP_SIZE_OF.get(kind, 2))
    # Codes are found by rounding, for which the 8 bits of bf16 are too coarse.
    dtypes = frozenset({"F16", "F32"})
    wanted = {f"{name}.weight": Wanted(dtypes, shape) for name, shape in model.linears.items()}
    return _check_all(tensors, wanted, model)


def check_scales(scales: Mapping[str, TensorInfo], kind: Kind, model: LinearLayers) -> None:
    """Raise FormatError for tensors of `scale.pt` that belong to no layer.

    `RawLayers` finds those that are missing.
    """
    leaves = {"scale.0"} if kind == "w8a8" else {"scale.0", "zero", "scaled_zero"}
    leaves |= {"scale.1"} if kind in GROUP_SIZE_OF else set()
    wanted = {f"{layer}.weight.{leaf}" for layer in model.linears for leaf in leaves}
    for name in sorted(scales.keys() - wanted):
        raise FormatError(
            f"{scales[name].file}: {name}: belongs to no layer of the base model; "
            "give the --base that this model was made of"
        )


def _check_all(
    tensors: Mapping[str, TensorInfo], linears: Mapping[str, Wanted], model: LinearLayers
) -> list[str]:
    wanted = dict(linears)
    wanted |= {f"{x}.bias": Wanted(FLOATS, (model.linears[x][0],)) for x in model.biased}
    wanted |= {name: Wanted(FLOATS, shape) for name, shape in model.others.items()}
    dropped = sorted(n for n in tensors if n.endswith((f".{KV_SCALE}", CONSTANT)))
    for name, want in sorted(wanted.items()):
        if name in tensors:
            _check_one(tensors[name], want)
        elif name != HEAD or not model.is_tied:
            raise FormatError(
                f"{name}: missing, the base model has it; download or convert the model again, "
                "or give the --base that it was made of"
            )
    for name in sorted(tensors.keys() - wanted.keys() - set(dropped)):
        raise FormatError(
            f"{tensors[name].file}: {name}: the base model has no such tensor; "
            "give the --base that this model was made of"
        )
    return dropped


def _check_one(info: TensorInfo, want: Wanted) -> None:
    if info.dtype not in want.dtypes or info.shape != want.shape:
        raise FormatError(
            f"{info.file}: {info.name}: is {info.dtype} {list(info.shape)}, expected "
            f"{' or '.join(sorted(want.dtypes))} {list(want.shape)}; "
            "give the --base that this model was made of, or download it again"
        )


def _check_divisible(name: str, n: int, k: int, columns: int) -> None:
    if n % TILE or k % columns:
        raise FormatError(
            f"{name}: the base model has {n} outputs and {k} inputs here, which are not multiples "
            f"of {TILE} and {columns}; give the --base that this model was made of"
        )

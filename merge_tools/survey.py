"""What the sets have in common: the comparisons, by content, on which a plan rests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_tools import MergeError
from merge_tools.compatible import model_dtype
from merge_tools.layout import FLOATS
from merge_tools.progress import Progress
from merge_tools.sources import WeightSet
from vllm_qoq.checkpoint import TensorInfo
from vllm_qoq.format import split_layer

if TYPE_CHECKING:
    import torch

_CHUNK_VALUES = 4 << 20


@dataclass(frozen=True)
class Survey:
    """The inputs of a merge as a plan needs them: names, sizes and results of comparisons."""

    tensors: Mapping[str, Mapping[str, TensorInfo]]
    """Set -> tensor -> info, sets in the order of the command line."""
    prefill: str
    quantized: frozenset[str]
    """The layers that are quantized in at least one set."""
    model_dtype: str
    """The dtype of `config.json`, by safetensors' name."""
    unequal: Mapping[str, tuple[str, ...]]
    """Tensor of no quantized layer -> the sets where it differs from the prefill set's."""
    recast: frozenset[str]
    """Tensors with equal values but stored in several dtypes."""
    zero_biases: frozenset[tuple[str, str]]
    """(set, tensor): biases of zeros in layers that have no bias in another set."""


def survey(sources: Sequence[WeightSet], prefill: WeightSet, progress: Progress) -> Survey:
    """Compare the tensors of the sets. Reads every tensor that all sets might share."""
    quantized = frozenset().union(*(source.quantized for source in sources))
    dtype = model_dtype(prefill.checkpoint.config)
    others = [source for source in sources if source is not prefill]
    unequal: dict[str, tuple[str, ...]] = {}
    recast = set()
    shared = [n for n in prefill.tensors if split_layer(n)[0] not in quantized]
    sizes = [prefill.tensors[name].nbytes * len(others) for name in shared]
    with progress.stage("compare", sum(sizes)) as advance:
        for name, size in zip(shared, sizes, strict=True):
            results = {other.name: _compare(prefill, other, name, dtype) for other in others}
            if differing := tuple(n for n, result in results.items() if result == "unequal"):
                unequal[name] = differing
            elif "recast" in results.values():
                recast.add(name)
            advance(size)
    return Survey(
        tensors={source.name: source.tensors for source in sources},
        prefill=prefill.name,
        quantized=quantized,
        model_dtype=dtype,
        unequal=unequal,
        recast=frozenset(recast),
        zero_biases=frozenset(_zero_biases(sources, quantized)),
    )


def _compare(left: WeightSet, right: WeightSet, name: str, dtype: str) -> str:
    """`equal`, `recast` (equal once both are cast to `dtype`, without loss) or `unequal`."""
    if left.tensors[name].dtype == right.tensors[name].dtype:
        pairs = _chunks(left.get(name), right.get(name))
        return "equal" if all(_same_bytes(a, b) for a, b in pairs) else "unequal"
    if not {left.tensors[name].dtype, right.tensors[name].dtype, dtype} <= FLOATS:
        return "unequal"
    target = torch_dtype(dtype)
    for a, b in _chunks(left.get(name), right.get(name)):
        is_lossless = all(_same_bytes(t.to(target).to(t.dtype), t) for t in (a, b))
        if not is_lossless or not _same_bytes(a.to(target), b.to(target)):
            return "unequal"
    return "recast"


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), _CHUNK_VALUES):
        yield tuple(tensor[start : start + _CHUNK_VALUES] for tensor in flat)


def _same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    import torch

    # bytes, because 0 == -0 and NaN != NaN
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of one of `FLOATS`."""
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[name]


def _zero_biases(
    sources: Sequence[WeightSet], quantized: frozenset[str]
) -> Iterator[tuple[str, str]]:
    """GPTQ tools write a bias of zeros into every layer, also where the model has none."""
    for layer in sorted(quantized):
        having = [source for source in sources if "bias" in source.layers[layer]]
        if len(having) in (0, len(sources)):
            continue
        for source in having:
            tensor = f"{layer}.bias"
            if source.get(tensor).any():
                lacks = next(s.name for s in sources if s not in having)
                raise MergeError(
                    f"{tensor}: is in {source.name}, not zero, and missing from {lacks}; download "
                    f"or quantize {lacks} again"
                )
            yield source.name, tensor

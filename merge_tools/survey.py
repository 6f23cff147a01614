"""The comparison of the sets by content, on which a plan rests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_tools import MergeError
from merge_tools.compatible import model_dtype
from vllm_qoq.checkpoint.folder import TensorInfo
from vllm_qoq.checkpoint.format import split_layer
from vllm_qoq.checkpoint.layout import FLOATS
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.models.names import experts_of, split_expert
from vllm_qoq.progress import Progress

if TYPE_CHECKING:
    import torch

_CHUNK_VALUES = 4 << 20


@dataclass(frozen=True)
class Survey:
    """The tensors of all sets and the results of comparing them."""

    tensors: Mapping[str, Mapping[str, TensorInfo]]
    """Set -> tensor -> info, sets in the order of the command line."""
    prefill: str
    quantized: frozenset[str]
    """The layers that are quantized in at least one set."""
    float_experts: frozenset[str]
    """The mixtures of experts that no set quantizes and that differ between the sets."""
    model_dtype: str
    """The dtype in which the model will run, by safetensors' name."""
    unequal: Mapping[str, tuple[str, ...]]
    """Tensor outside the quantized layers -> the sets where it differs from the prefill set's."""
    recast: Mapping[str, str]
    """Tensor that is stored in several dtypes with equal values -> the set whose copy is nearest
    to `model_dtype`."""
    zero_biases: frozenset[tuple[str, str]]
    """(set, tensor) for each bias of zeros in a layer that has no bias in another set."""

    def is_per_set(self, layer: str) -> bool:
        """Whether each set has its own tensors of a layer."""
        place = split_expert(layer)
        is_float = place is not None and place[0] in self.float_experts
        return is_float or layer in self.quantized


def survey(
    sources: Sequence[StoredSet],
    prefill: StoredSet,
    progress: Progress,
    dtype: str | None = None,
) -> Survey:
    """Compare the tensors of the sets. Reads every tensor that all sets might share.

    dtype  the dtype in which the model will run, by safetensors' name; by default the prefill set's
    """
    quantized = frozenset().union(*(source.quantized for source in sources))
    dtype = dtype or model_dtype(prefill.checkpoint.config)
    others = [source for source in sources if source is not prefill]
    unequal: dict[str, tuple[str, ...]] = {}
    recast: dict[str, str] = {}
    shared = [n for n in prefill.tensors if split_layer(n)[0] not in quantized]
    sizes = [prefill.tensors[name].nbytes * len(others) for name in shared]
    with progress.stage("compare", sum(sizes)) as advance:
        for name, size in zip(shared, sizes, strict=True):
            results = {other.name: _compare(prefill, other, name, dtype) for other in others}
            if differing := tuple(n for n, result in results.items() if result == "unequal"):
                unequal[name] = differing
            elif "recast" in results.values():
                stored = (s.name for s in (prefill, *others) if s.tensors[name].dtype == dtype)
                recast[name] = next(stored, prefill.name)
            advance(size)
    experts = experts_of(split_layer(name)[0] for name in unequal)
    return Survey(
        tensors={source.name: source.tensors for source in sources},
        prefill=prefill.name,
        quantized=quantized,
        float_experts=experts,
        model_dtype=dtype,
        unequal={n: sets for n, sets in unequal.items() if not _is_in(experts, n)},
        recast={name: owner for name, owner in recast.items() if not _is_in(experts, name)},
        zero_biases=frozenset(_zero_biases(sources, quantized)),
    )


def _is_in(experts: frozenset[str], tensor: str) -> bool:
    return not experts_of([split_layer(tensor)[0]]).isdisjoint(experts)


def _compare(left: StoredSet, right: StoredSet, name: str, dtype: str) -> str:
    """Compare a tensor of two sets: "equal", "recast" or "unequal".

    Recast are tensors in two dtypes that are equal but for the rounding to them.
    """
    dtypes = [left.tensors[name].dtype, right.tensors[name].dtype]
    pairs = _chunks(left.get(name), right.get(name))
    if dtypes[0] == dtypes[1]:
        return "equal" if all(_is_same(a, b) for a, b in pairs) else "unequal"
    if not {*dtypes, dtype} <= FLOATS:
        return "unequal"
    # Either may be a rounding of the other, or both of one tensor that neither has.
    return "recast" if all(_is_rounded(a, b) for a, b in pairs) else "unequal"


def _is_rounded(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors differ by no more than what their dtypes round."""
    import torch

    unit = sum(torch.finfo(t.dtype).eps / 2 for t in (left, right))
    tiny = sum(
        torch.finfo(t.dtype).smallest_normal * torch.finfo(t.dtype).eps / 2 for t in (left, right)
    )
    a, b = left.double(), right.double()
    # At powers of two the spacing below is half that above, so the larger magnitude counts.
    return bool(((a - b).abs() <= a.abs().maximum(b.abs()) * unit + tiny).all())


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), _CHUNK_VALUES):
        yield tuple(tensor[start : start + _CHUNK_VALUES] for tensor in flat)


def is_same_tensor(source: StoredSet, left: str, right: str) -> bool:
    """Whether two tensors of a set have the same shape and values."""
    infos = [source.tensors[name] for name in (left, right)]
    if infos[0].shape != infos[1].shape or infos[0].dtype != infos[1].dtype:
        return False
    return all(_is_same(a, b) for a, b in _chunks(source.get(left), source.get(right)))


def _is_same(left: torch.Tensor, right: torch.Tensor) -> bool:
    import torch

    # Tensors are equal by bytes, so that NaN is NaN (`values` refuses it later), or by value, so
    # that 0 is -0.
    is_same = torch.equal(left.view(torch.uint8), right.view(torch.uint8))
    return is_same or (left.element_size() > 1 and torch.equal(left, right))


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of one of `FLOATS`."""
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[name]


def _zero_biases(
    sources: Sequence[StoredSet], quantized: frozenset[str]
) -> Iterator[tuple[str, str]]:
    """Find biases of zeros that only some sets have; MergeError for one that is not zero.

    GPTQ tools write one into every layer, also where the model has none.
    """
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

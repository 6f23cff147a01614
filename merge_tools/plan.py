"""The plan of a merge: what it will write, worked out without touching a file.

Shards begin anew with each set: the shared tensors come first, then one run of
shards per set, so that a set can be downloaded without the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from merge_tools.norms import ratio_globs, readers_of
from merge_tools.survey import Survey
from vllm_qoq.checkpoint.folder import TensorInfo
from vllm_qoq.checkpoint.format import INPUT_RATIO, join_name, split_layer
from vllm_qoq.checkpoint.shards import Shards, cut, total_bytes
from vllm_qoq.models.names import experts_of, layer_globs


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a tensor of the output: `tensor` of the set `set_name`.

    copy    the bytes are taken over
    cast    the values are, in the dtype of the output
    ratio   the values are divided by those of the prefill set (see `norms`)
    nest    `tensor` is a layer, whose residual on the base is computed (see `nest`)
    """

    how: Literal["copy", "cast", "ratio", "nest"]
    set_name: str
    tensor: str


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of the output, the set that owns it (None: all sets share it), and its origin."""

    info: TensorInfo
    owner: str | None
    origin: Origin


@dataclass(frozen=True)
class MergePlan:
    """The tensors of the output and what `config.json` says of them.

    tensors        name in the output -> what it is made of
    shards         file name -> tensors, in the order in which their bytes are written
    input_ratio    set -> globs of the layers that carry one
    float_experts  globs of mixtures of experts that each set has for itself, though in float
    dropped        (set, tensor) for each bias of zeros that is left out
    bases          nested set -> its base
    dtype          the dtype that `config.json` gets, None for the prefill set's
    """

    sets: tuple[str, ...]
    prefill: str
    tensors: Mapping[str, Planned]
    shards: Shards
    input_ratio: Mapping[str, tuple[str, ...]]
    dropped: tuple[tuple[str, str], ...]
    quantized: frozenset[str]
    float_experts: tuple[str, ...] = ()
    bases: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None

    def bytes_of(self, owner: str | None) -> int:
        """Bytes of the tensors of the set `owner`, or of the shared ones if it is None."""
        return sum(p.info.nbytes for p in self.tensors.values() if p.owner == owner)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return total_bytes(self.shards)


def make_plan(
    survey: Survey,
    config: Mapping[str, Any],
    max_shard_bytes: int,
    bases: Mapping[str, str],
    dtype: str | None,
) -> MergePlan:
    """Decide what is shared, what is per set and what is derived.

    config  the `config.json` of the prefill set
    bases   set to nest -> its base
    dtype   the dtype that the output is said to run in, None for the prefill set's

    Raises MergeError for a tensor that differs between the sets and must not.
    """
    ratios = _ratio_layers(survey, config)
    groups = [_shared(survey)]
    for name in survey.tensors:
        if name in bases:
            groups.append(_nested(survey, name, bases[name]))
        else:
            groups.append(_of_set(survey, name, ratios[name]))
    infos = (sorted((p.info for p in group), key=lambda info: info.name) for group in groups)
    layers = {name: tuple(sorted(mine)) for name, mine in ratios.items()}
    return MergePlan(
        sets=tuple(survey.tensors),
        prefill=survey.prefill,
        tensors={planned.info.name: planned for group in groups for planned in group},
        shards=cut(infos, max_shard_bytes),
        input_ratio=ratio_globs(layers, survey.quantized),
        dropped=tuple(sorted(survey.zero_biases)),
        quantized=survey.quantized,
        float_experts=layer_globs(survey.float_experts, _mixtures(survey)),
        bases=bases,
        dtype=dtype,
    )


def _mixtures(survey: Survey) -> frozenset[str]:
    """Find all mixtures of experts of the model."""
    return experts_of(split_layer(name)[0] for name in survey.tensors[survey.prefill])


def _ratio_layers(survey: Survey, config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Map set -> layer -> norm, for layers that another norm than the stored one prepares."""
    ratios: dict[str, dict[str, str]] = {name: {} for name in survey.tensors}
    for tensor, differing in survey.unequal.items():
        names = f"{survey.prefill} and {', '.join(differing)}"
        for reader in readers_of(config, tensor, survey.quantized, names):
            for name in differing:
                ratios[name][reader] = tensor
    return ratios


def _shared(survey: Survey) -> list[Planned]:
    planned = []
    for name, info in survey.tensors[survey.prefill].items():
        if survey.is_per_set(split_layer(name)[0]):
            continue
        owner = survey.recast.get(name, survey.prefill)
        info = survey.tensors[owner][name]
        is_cast = name in survey.recast and info.dtype != survey.model_dtype
        dtype = survey.model_dtype if is_cast else info.dtype
        origin = Origin("cast" if is_cast else "copy", owner, name)
        planned.append(Planned(replace(info, dtype=dtype), None, origin))
    return planned


def _of_set(survey: Survey, set_name: str, ratios: Mapping[str, str]) -> list[Planned]:
    planned = []
    for name, info in survey.tensors[set_name].items():
        is_mine = survey.is_per_set(split_layer(name)[0])
        if is_mine and (set_name, name) not in survey.zero_biases:
            stored = replace(info, name=join_name(set_name, name))
            planned.append(Planned(stored, set_name, Origin("copy", set_name, name)))
    for layer, norm in ratios.items():
        shape = survey.tensors[set_name][norm].shape
        stored = TensorInfo(join_name(set_name, f"{layer}.{INPUT_RATIO}"), "F32", shape, "")
        planned.append(Planned(stored, set_name, Origin("ratio", set_name, norm)))
    return planned


def _nested(survey: Survey, set_name: str, base: str) -> list[Planned]:
    """Plan, for each layer of the 4-bit set, what raises it to 8 bits, and the 8-bit set's bias."""
    planned = []
    for layer in sorted(survey.quantized):
        shape = survey.tensors[base][f"{layer}.qweight"].shape
        stored = TensorInfo(join_name(set_name, f"{layer}.qresidual"), "U8", shape, "")
        planned.append(Planned(stored, set_name, Origin("nest", set_name, layer)))
        bias = survey.tensors[set_name].get(f"{layer}.bias")
        if bias is not None and (set_name, bias.name) not in survey.zero_biases:
            stored = replace(bias, name=join_name(set_name, bias.name))
            planned.append(Planned(stored, set_name, Origin("copy", set_name, bias.name)))
    return planned

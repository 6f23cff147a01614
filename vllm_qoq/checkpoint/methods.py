"""The quantization methods that a set may have, and which layers each of them quantizes.

`METHODS` is the one table: what it lacks is refused by name. Each entry reads the keys of a
`quantization_config` as vLLM reads them, above all the format's own way to leave modules out:

    compressed-tensors  `ignore`: names and `re:` patterns; `targets` of each group
    gptq                `dynamic`: `-:` patterns skip, `+:` patterns override; modules_in_block_to_
                        quantize by substring, and without it the layers that have quantized tensors
    awq                 modules_to_not_convert by substring; without it as GPTQ
    auto-round          extra_config: names, ends of names and patterns; bits of 16 skip
    fp8, fbgemm_fp8     ignored_layers, modules_to_not_convert: whole names
    modelopt            ignore, exclude_modules: names, substrings and globs
    quark               exclude: names and `re:` patterns

vLLM runs some projections as one layer (`vllm_qoq.models.names.FUSED`): a `Unit`. So it does all
experts of a mixture, whose method it chooses by the projections of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch, fnmatchcase
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_qoq.checkpoint.format import QOQ_LINEAR, QOQ_RESIDUAL, SECTION, never_quantized
from vllm_qoq.checkpoint.patterns import matches, occurs
from vllm_qoq.errors import FormatError, shown
from vllm_qoq.models.names import FUSED, split_expert

_WHERE = f"config.json: {SECTION}"
_PATTERN = "re:"
# These are more than any model has layers, and few enough to compare each with each layer.
_MOST_ENTRIES = 16_384
# An entry of extra_config with one of these is a pattern for auto-round.
_SPECIAL = frozenset(r"*+?^$()[]{}|\\")
# A ModelOpt checkpoint never quantizes these, whatever it lists.
_MODELOPT_TOWERS = ("vision_tower", "vision_model", "vit_large_projector")
_EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_LINEAR_CLASSES = (
    "QKVParallelLinear",
    "MergedColumnParallelLinear",
    "ColumnParallelLinear",
    "RowParallelLinear",
    "ReplicatedLinear",
)


@dataclass(frozen=True, slots=True)
class Unit:
    """A layer of vLLM: its name, and the layers of the checkpoint that it is made of.

    Of a mixture of experts these are the layers of its first expert.
    """

    name: str
    parts: tuple[str, ...]

    @classmethod
    def of(cls, layer: str, layers: Collection[str]) -> Unit:
        """The unit that runs `layer` of a model with these `layers`."""
        expert = split_expert(layer)
        if expert is not None:
            parts = tuple(f"{expert[0]}.0.{name}" for name in _EXPERT_PROJECTIONS)
            return cls(expert[0], tuple(part for part in parts if part in layers) or (layer,))
        parent, _, leaf = layer.rpartition(".")
        for fused, leaves in FUSED.items():
            parts = tuple(f"{parent}.{part}" for part in leaves)
            if leaf in leaves and sum(part in layers for part in parts) > 1:
                return cls(f"{parent}.{fused}", tuple(part for part in parts if part in layers))
        return cls(layer, (layer,))


class QuantizationMethod(BaseModel):
    """The keys of a `quantization_config` that vLLM reads; wrong types of theirs are refused."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    def unserved(self) -> Iterator[str]:
        """Find why no vLLM serves a set with this config, each as `KEY: reason; remedy`."""
        yield from ()

    def quantizes(self, unit: Unit, stored: Collection[str]) -> bool:
        """Whether vLLM makes a quantized layer of `unit`.

        `stored` are the layers that have quantized tensors. Raises FormatError where the config
        tells the parts of one layer apart.
        """
        raise NotImplementedError

    def of_layer(self, unit: Unit, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The `quantization_config` that holds for one layer."""
        return config


class _Override(BaseModel):
    """The keys that a rule of GPTQ's `dynamic` or of auto-round's extra_config sets."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    bits: int | None = None
    group_size: int | list[int] | None = None
    sym: bool | None = None

    def given(self) -> dict[str, Any]:
        """The keys that the rule sets, apart from `sym`."""
        found = {"bits": self.bits, "group_size": self.group_size}
        return {key: value for key, value in found.items() if value is not None}


class _Weights(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    num_bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    block_structure: list[int] | str | None = None


class _Group(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    targets: list[str] = []
    weights: _Weights | None = None

    @property
    def is_attention(self) -> bool:
        """Whether the group quantizes attention, which vLLM leaves to the KV cache."""
        return len(self.targets) == 1 and self.targets[0].endswith("Attention")


class CompressedTensors(QuantizationMethod):
    """The format of llmcompressor."""

    config_groups: dict[str, _Group] = {}
    ignore: list[str] | None = None
    sparsity_config: dict[str, Any] | None = None

    def unserved(self) -> Iterator[str]:
        if (self.sparsity_config or {}).get("targets"):
            yield "sparsity_config: no vLLM serves sparse weights; quantize without sparsity"
        if not self.config_groups:
            yield "config_groups: missing, so no layer is quantized; quantize the model again"
        for name, group in self.config_groups.items():
            if not group.is_attention and (not group.targets or group.weights is None):
                yield f"config_groups.{name}: lacks targets or weights; quantize the model again"

    def quantizes(self, unit: Unit, stored: Collection[str]) -> bool:
        if _any_or_all(unit, lambda name: _listed(name, self.ignore or ())):
            return False
        return self._group(unit) is not None

    def of_layer(self, unit: Unit, config: Mapping[str, Any]) -> Mapping[str, Any]:
        group = self._group(unit)
        if group is None:
            return config
        return {**config, "config_groups": {group: config["config_groups"][group]}}

    def _group(self, unit: Unit) -> str | None:
        targets = {
            target: name
            for name, group in self.config_groups.items()
            if not group.is_attention
            for target in group.targets
        }
        for target in targets:
            if _is_listed(unit.name, target):
                return targets[target]
        found = [next((t for t in targets if _is_listed(p, t)), None) for p in unit.parts]
        if found[0] is not None and None not in found:
            return targets[found[0]]
        for target in targets:
            if any(_is_class(name, target) for name in _LINEAR_CLASSES):
                return targets[target]
        return None


class GPTQ(QuantizationMethod):
    """The format of AutoGPTQ and GPTQModel."""

    bits: int | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    sym: bool | None = None
    dynamic: dict[str, _Override] | None = None
    modules_in_block_to_quantize: list[str | list[str]] | None = None

    def unserved(self) -> Iterator[str]:
        for key in ("bits", "group_size", "desc_act", "sym"):
            if getattr(self, key) is None:
                yield f"{key}: missing; take it from the tool that quantized the model"
        if self.bits is not None and self.bits not in (4, 8):
            yield f"bits: {self.bits} is not 4 or 8; quantize the model again"
        if self.sym is False:
            yield "sym: false, and vLLM serves symmetric GPTQ only; quantize with sym=True"
        for rule, override in (self.dynamic or {}).items():
            if not rule.startswith("-:") and override.bits not in (None, 4, 8):
                yield f"dynamic.{rule}.bits: {override.bits} is not 4 or 8; quantize again"
            if override.sym is False:
                yield f"dynamic.{rule}.sym: false, and vLLM serves symmetric GPTQ only"

    def quantizes(self, unit: Unit, stored: Collection[str]) -> bool:
        override = self._override(unit.name)
        if override is None:
            return False
        for part in unit.parts:
            own = self._override(part)
            if own is not None and self._merged(own) != self._merged(override):
                raise FormatError(
                    f"{part}: {_WHERE}.dynamic gives it {self._merged(own)}, but vLLM runs it as "
                    f"{unit.name} and looks for that name; write the rule so that it matches both"
                )
        modules = [*_flat(self.modules_in_block_to_quantize or ())]
        if not modules:
            return _all_parts(unit, lambda part: part in stored)
        return _all_parts(unit, lambda part: any(module in part for module in modules))

    def of_layer(self, unit: Unit, config: Mapping[str, Any]) -> Mapping[str, Any]:
        override = self._override(unit.name)
        return config if override is None else {**config, **override.given()}

    def _merged(self, override: _Override) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, **override.given()}

    def _override(self, name: str) -> _Override | None:
        """The first rule that matches, or an empty one; None where that rule skips the layer."""
        for rule, override in (self.dynamic or {}).items():
            is_negative = rule.startswith("-:")
            if matches(rule.removeprefix("-:" if is_negative else "+:"), name):
                return None if is_negative else override
        return _Override()


class AWQ(QuantizationMethod):
    """The format of AutoAWQ."""

    bits: int | None = None
    w_bit: int | None = None
    group_size: int | None = None
    q_group_size: int | None = None
    zero_point: bool | None = None
    modules_to_not_convert: list[str] | None = None

    def unserved(self) -> Iterator[str]:
        bits = self.w_bit if self.w_bit is not None else self.bits
        if bits != 4:
            yield f"bits: {shown(bits)} is not 4; quantize the model again"
        if self.group_size is None and self.q_group_size is None:
            yield "group_size: missing; take it from the tool that quantized the model"
        if self.zero_point is None:
            yield "zero_point: missing; take it from the tool that quantized the model"

    def quantizes(self, unit: Unit, stored: Collection[str]) -> bool:
        skipped = self.modules_to_not_convert
        if not skipped:
            return _all_parts(unit, lambda part: part in stored)
        return not _any_or_all(unit, lambda name: any(module in name for module in skipped))


class AutoRound(QuantizationMethod):
    """The format of Intel's auto-round, which vLLM calls inc."""

    bits: int | None = None
    group_size: int | list[int] | None = None
    sym: bool = True
    data_type: str = "int"
    packing_format: str = "auto_round:auto_gptq"
    block_name_to_quantize: str | list[str] | None = None
    to_quant_block_names: str | list[str] | None = None
    extra_config: dict[str, _Override] | None = None

    def unserved(self) -> Iterator[str]:
        if self.bits not in (2, 3, 4, 5, 6, 7, 8):
            yield f"bits: {shown(self.bits)} is not 2 to 8; quantize the model again"
        if self.group_size is None:
            yield "group_size: missing; take it from the tool that quantized the model"
        is_awq, is_gptq = "awq" in self.packing_format, "gptq" in self.packing_format
        if self.data_type == "int" and not is_awq and not is_gptq:
            yield (
                f"packing_format: {shown(self.packing_format)} is not served; export with "
                "format='auto_round:auto_gptq' or 'auto_round:auto_awq'"
            )
        if self.data_type == "int" and is_gptq and not self.sym:
            yield "sym: false, and vLLM serves symmetric weights in GPTQ's packing only; sym=True"

    def quantizes(self, unit: Unit, stored: Collection[str]) -> bool:
        return (self._resolve(unit)["bits"] or 0) < 16

    def of_layer(self, unit: Unit, config: Mapping[str, Any]) -> Mapping[str, Any]:
        found = self._resolve(unit)
        if isinstance(found["group_size"], list):
            found["weight_block_size"] = found["group_size"]
        return {**config, **found}

    def _resolve(self, unit: Unit) -> dict[str, Any]:
        extra = self.extra_config or {}
        for name, override in extra.items():
            is_named = name in (unit.name, f"model.{unit.name}")
            if is_named and (override.bits is None or override.bits >= 16):
                return self._merged(_Override(bits=16), inside=False)
        for name, override in extra.items():
            if unit.name == name:
                return self._merged(override, inside=True)
        for name, override in extra.items():
            if unit.name.endswith(f".{name}"):
                return self._merged(override, inside=True)
        blocks = self.block_name_to_quantize or self.to_quant_block_names
        blocks = blocks.split(",") if isinstance(blocks, str) else blocks
        inside = not blocks or any(unit.name.startswith(block) for block in blocks)
        given = [self._explicit(part) for part in unit.parts]
        if len(unit.parts) > 1 and any(override is not None for override in given):
            found = [self._merged(override or _Override(), inside=inside) for override in given]
            if any(other != found[0] for other in found[1:]):
                raise _mixed(unit)
            return found[0]
        return self._merged(self._explicit(unit.name) or _Override(), inside=inside)

    def _explicit(self, name: str) -> _Override | None:
        extra = self.extra_config or {}
        if name in extra:
            return extra[name]
        for pattern, override in extra.items():
            if not _SPECIAL.isdisjoint(pattern) and occurs(pattern, name):
                return override
        return None

    def _merged(self, override: _Override, inside: bool) -> dict[str, Any]:
        bits = self.bits if inside else 16
        return {"bits": bits, "group_size": self.group_size, **override.given()}


class FP8(QuantizationMethod):
    """The fp8 of DeepSeek, transformers and AutoFP8: a scale per tensor or per block."""

    activation_scheme: str | None = None
    ignored_layers: list[str] | None = None
    modules_to_not_convert: list[str] | None = None
    weight_block_size: list[int] | None = None

    def unserved(self) -> Iterator[str]:
        if self.activation_scheme not in ("static", "dynamic"):
            yield f"activation_scheme: {shown(self.activation_scheme)} is not 'static' or 'dynamic'"

    def quantizes(self, unit: Unit, stored: Collection[str]) -> bool:
        skipped = self.ignored_layers or self.modules_to_not_convert or ()
        return not _any_or_all(unit, lambda name: name in skipped)


class FBGEMM(QuantizationMethod):
    """The fp8 of Meta, with a scale per row."""

    modules_to_not_convert: list[str] | None = None
    activation_scale_ub: float | int | None = None

    def unserved(self) -> Iterator[str]:
        if self.activation_scale_ub is None:
            yield "activation_scale_ub: missing; take it from the tool that quantized the model"

    def quantizes(self, unit: Unit, stored: Collection[str]) -> bool:
        skipped = self.modules_to_not_convert or ()
        return not _any_or_all(unit, lambda name: name in skipped)


class _ModelOptPart(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    exclude_modules: list[str] | None = None


class ModelOpt(QuantizationMethod):
    """The fp8 of NVIDIA ModelOpt, whose config stands in either of two places."""

    quant_algo: str | None = None
    ignore: list[str] | None = None
    quantization: _ModelOptPart | None = None

    def unserved(self) -> Iterator[str]:
        algo = self.quantization.quant_algo if self.quantization else self.quant_algo
        if not (algo or "").upper().startswith("FP8"):
            yield f"quant_algo: {shown(algo)} cannot be a set; quantize to FP8"
        if self.quantization and self.quantization.kv_cache_quant_algo:
            yield (
                f"quantization.kv_cache_quant_algo: "
                f"{shown(self.quantization.kv_cache_quant_algo)}, but all sets share one KV cache, "
                "whose precision is chosen when serving; quantize without it"
            )

    def quantizes(self, unit: Unit, stored: Collection[str]) -> bool:
        skipped = (self.quantization.exclude_modules if self.quantization else self.ignore) or []
        if any(tower in unit.name for tower in _MODELOPT_TOWERS):
            return False
        if _any_or_all(unit, lambda name: name in skipped):
            return False
        return not any(module in unit.name or fnmatch(unit.name, module) for module in skipped)


class Quark(QuantizationMethod):
    """The fp8 and int8 of AMD Quark."""

    exclude: list[str] | None = None
    export: dict[str, Any] | None = None

    def unserved(self) -> Iterator[str]:
        if self.export is None:
            yield "export: missing; take it from the tool that quantized the model"
        elif self.export.get("kv_cache_group"):
            yield (
                "export.kv_cache_group: all sets share one KV cache, whose precision is chosen "
                "when serving; quantize without it"
            )

    def quantizes(self, unit: Unit, stored: Collection[str]) -> bool:
        return not _any_or_all(unit, lambda name: _listed(name, self.exclude or ()))


class QoQ(QuantizationMethod):
    """The format of a QoQ set; `vllm_qoq.checkpoint.format` checks its other keys."""

    ignore: list[str] | tuple[str, ...] = Field(default_factory=never_quantized)

    def quantizes(self, unit: Unit, stored: Collection[str]) -> bool:
        globs = self.ignore
        return not _all_parts(unit, lambda part: any(fnmatchcase(part, glob) for glob in globs))


METHODS: Mapping[str, type[QuantizationMethod]] = {
    "compressed-tensors": CompressedTensors,
    **dict.fromkeys(("gptq", "auto_gptq", "gptq_marlin"), GPTQ),
    **dict.fromkeys(("awq", "auto_awq", "awq_marlin"), AWQ),
    **dict.fromkeys(("auto-round", "inc"), AutoRound),
    "fp8": FP8,
    "fbgemm_fp8": FBGEMM,
    "modelopt": ModelOpt,
    "quark": Quark,
    QOQ_LINEAR: QoQ,
}


def method_name(config: Mapping[str, Any]) -> str:
    """The `quant_method` of a config, spelled as vLLM spells it; empty where there is none."""
    name = config.get("quant_method")
    if not isinstance(name, str):
        return ""
    return name.lower().replace("compressed_tensors", "compressed-tensors")


def parse(config: Mapping[str, Any]) -> QuantizationMethod:
    """Read the method of a `quantization_config`; FormatError if it is not in the table."""
    name = method_name(config)
    if name not in METHODS:
        raise FormatError(
            f"{_WHERE}.quant_method: {shown(config.get('quant_method'))} cannot be a set; take a "
            f"checkpoint in one of {', '.join(METHODS)}, for example from llmcompressor"
        )
    for key, entries in config.items():
        if isinstance(entries, list | dict) and len(entries) > _MOST_ENTRIES:
            raise FormatError(
                f"{_WHERE}.{key}: has {len(entries)} entries, more than {_MOST_ENTRIES}; write "
                "patterns instead of names"
            )
    try:
        return METHODS[name].model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].partition(" or instance of ")[0]  # without a class of ours
        raise FormatError(
            f"{_WHERE}.{key}: {shown(first['input'])}: {message}; mend {key or 'it'} or quantize "
            "the model again"
        ) from None


def is_nested(config: Mapping[str, Any]) -> bool:
    """Whether a set is a residual on another, whose config says what is quantized."""
    return config.get("quant_method") == QOQ_RESIDUAL


def _listed(name: str, entries: Iterable[str]) -> bool:
    return any(_is_listed(name, entry) for entry in entries)


def _is_listed(name: str, entry: str) -> bool:
    if entry.startswith(_PATTERN):
        return matches(entry.removeprefix(_PATTERN), name)
    return name == entry


def _is_class(name: str, target: str) -> bool:
    if target.startswith(_PATTERN):
        return matches(target.removeprefix(_PATTERN), name)
    return target.lower() in name.lower()


def _any_or_all(unit: Unit, rule: Callable[[str], bool]) -> bool:
    """Whether `rule` holds for the name of the fused layer, or else for all of its parts."""
    return rule(unit.name) or _all_parts(unit, rule)


def _all_parts(unit: Unit, rule: Callable[[str], bool]) -> bool:
    """Whether `rule` holds for all parts; FormatError where it tells them apart."""
    found = {rule(part) for part in unit.parts}
    if len(found) > 1:
        raise _mixed(unit)
    return found.pop()


def _mixed(unit: Unit) -> FormatError:
    return FormatError(
        f"{unit.name}: {_WHERE} leaves out only some of {', '.join(unit.parts)}, or treats them "
        "differently, but vLLM runs them as one layer; quantize all of them alike"
    )


def _flat(modules: Iterable[str | list[str]]) -> Iterator[str]:
    for module in modules:
        yield from (module if isinstance(module, list) else [module])

"""The checkpoint contract: what `config.json` says and how tensors are named.

A checkpoint is an ordinary Hugging Face folder. `config.json` keeps the base
model's `architectures` and adds one section:

    "quantization_config": {
      "quant_method": "qoq", "format_version": 1,
      "sets": {"w8a8":  {"quant_method": "compressed-tensors", ...},
               "w4a16": {"quant_method": "compressed-tensors", ...}},
      "routing": {...},                                  # vllm_qoq.routing.table
      "input_ratio": {"w4a16": ["model.layers.*.self_attn.q_proj", ...]},
      "float_experts": ["model.layers.0.mlp.experts"],   # absent: all sets share them
      "kv_cache": {"bits": 4},                           # vllm_qoq.checkpoint.kv_config
      "lm_head": {"bits": 8},                            # absent: in the model's dtype
      "stream": {"rotation": "stored"}                   # absent: the original model's
    }

Tensors. A layer that is quantized in at least one set has its tensors once per
set, with the name of the set in front: `w8a8.model.layers.0.mlp.up_proj.weight`.
Everything else (embeddings, norms, lm_head) is equal in all sets, stored once
and has no prefix.

`input_ratio`. Two sets of one model may scale their norms differently
(SmoothQuant folds its scales into them). The checkpoint keeps the norm of the
prefill set; a layer of another set that reads such a norm carries

    SET.LAYER.input_ratio   float32 [in_features]

which multiplies the layer's input. The section lists the layers that have one
as globs over layer names, so that a lost tensor is noticed.

`float_experts`. Experts that no set quantizes are stored once, as everything that all sets share.
Where they differ between the sets, each set has its own, with its name in front, and the section
lists these mixtures of experts as globs over names such as `model.layers.0.mlp.experts`.

`lm_head`. In int8 it is `lm_head.weight` int8 [V, K], `lm_head.weight_scale` float32 [V, 1],
for all sets; its input is rounded to int8 per token.

`stream`. The residual stream may be in another basis than the original model's: a rotation R is
folded into the layers that read and write it, and the weight of the final norm into lm_head.
Generation does not notice. Hidden states that leave the model elsewhere than through lm_head do,
as embeddings, rewards and the inputs of draft heads. With `"rotation": "stored"` they can be
turned back, by

    stream.rotation  int8 [H, H]                  R * sqrt(H): every entry -1 or 1, rows orthogonal
    stream.norm      the model's dtype [H]        the final norm's weight before it was folded

    stream of the original model        = stream @ R.T
    last hidden state of the original   = (last hidden state @ R.T) * stream.norm

and with `"rotation": "unknown"` they cannot: the final norm was folded by another tool.

`kv_cache`. With `"k_mean": true` every attention layer whose cache is quantized has

    model.layers.0.self_attn.k_mean   float32 [num_key_value_heads, head_dim]

the mean of its keys after RoPE, which is subtracted from every key. Any finite numbers leave the
function of the model as it is. All sets share it, as they share the cache.

QoQ. A set with `{"quant_method": "qoq_linear", "group_size": 128}` (`QoQSet`) holds,
for a layer with N outputs and K inputs in groups of G = 128, 64 or 32,

    qweight        uint8   [N, K / 2]    codes 0..15, two a byte, the even k in the low nibble
    channel_scale  float32 [N]           finite, positive
    group_scale    uint8   [N, ceil(K / G)]  1..16
    group_offset   int8    [N, ceil(K / G)]

    W8 = q * group_scale + group_offset    an int8 for every code that occurs
    W  = W8 * channel_scale

and with `"group_size": -1`

    qweight        uint8   [N, K / 2]
    channel_scale  float32 [N]           finite, positive
    channel_zero   float32 [N]           finite; a multiple of the scale only by chance

    W  = q * channel_scale - channel_zero

Rows are output channels and nothing is permuted, so tensor parallelism can slice
every tensor. A bias keeps its name and the model's dtype.

Nested sets. `{"quant_method": "qoq_residual", "base": "w4a8"}` (`ResidualSet`) is the 8-bit set
whose upper part is a qoq_linear set with groups. It quantizes the same layers and holds

    qresidual      uint8   [N, K / 2]    0..15, two a byte, the even k in the low nibble

    W8 = q * group_scale + group_offset + (qresidual - 8)    an int8
    W  = W8 * channel_scale

with everything but qresidual the base's: a step reads one plane of 4 bits or both.

Beside the index may lie `qoq_transforms.safetensors` (`vllm_qoq.checkpoint.transforms`), which says
how the weights were changed before they were rounded.

A model without quantized weights may have the section, too, for its KV cache alone (`KVSection`):

    "quantization_config": {"quant_method": "qoq", "kv_cache": {"bits": 4}}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_qoq.checkpoint.kv_config import KVCache
from vllm_qoq.errors import FormatError, one_line, shown
from vllm_qoq.numerics import group_count
from vllm_qoq.routing.table import MOST_RULES, Routing, RoutingError

QUANT_METHOD = "qoq"
SECTION = "quantization_config"
INPUT_RATIO = "input_ratio"
K_MEAN = "k_mean"
QOQ_LINEAR = "qoq_linear"
QOQ_RESIDUAL = "qoq_residual"

INT8_HEAD_TENSORS = ("weight", "weight_scale")
"""The leaves of an int8 lm_head."""
STREAM = "stream"
TRANSFORMS = "transforms"
"""The first component of the names in the file that says how the weights were changed."""

_SET_NAME = re.compile(r"[a-z][a-z0-9]{0,31}")
# These are first components of tensor names in Hugging Face checkpoints, and attributes
# of vLLM's linear layers, beside which a set's module is registered.
_RESERVED = frozenset(
    {
        *("model", "transformer", "language", "visual", "vision", "backbone"),
        *("encoder", "decoder", "thinker", "talker"),
        *("weight", "bias", "scheme", "prefix"),
        *(STREAM, TRANSFORMS),
    }
)


def never_quantized() -> tuple[str, ...]:
    """List globs of the linear layers that no set quantizes."""
    # Every process with vLLM imports this module, whatever it serves, and the table takes 25 ms.
    from vllm_qoq.models.names import LM_HEAD
    from vllm_qoq.models.table import router_globs

    return (LM_HEAD, *router_globs())


class QoQSet(BaseModel):
    """A set of QoQ weights: level 1 int8 per output channel, level 2 uint4 per group.

    group_size  inputs that share a group_scale, or -1: 4 bits per output channel, no groups
    ignore      globs of linear layers that are not quantized; by default lm_head, and the routers
                of mixtures of experts by the names that models have for them
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["qoq_linear"] = "qoq_linear"
    group_size: Literal[128, 64, 32, -1] = 128
    ignore: tuple[str, ...] = Field(default_factory=never_quantized, max_length=MOST_RULES)

    @classmethod
    def parse(cls, config: Mapping[str, Any], where: str) -> QoQSet:
        """Validate one entry of `sets`; a FormatError begins with `where`."""
        try:
            return cls.model_validate(config)
        except ValidationError as error:
            raise FormatError(one_line(error, where)) from None

    def ignores(self, layer: str) -> bool:
        """Whether `layer` stays unquantized."""
        return any(fnmatchcase(layer, glob) for glob in self.ignore)

    def tensors(self, out_features: int, in_features: int) -> dict[str, tuple[str, list[int]]]:
        """Map each leaf of a layer to its (safetensors dtype, shape).

        Raises FormatError for a size that cannot be.
        """
        n, k, group = out_features, in_features, self.group_size
        if k % 2:
            raise FormatError(f"{k} inputs are odd, but a byte holds the codes of two")
        shapes = {"qweight": ("U8", [n, k // 2]), "channel_scale": ("F32", [n])}
        if group == -1:
            return shapes | {"channel_zero": ("F32", [n])}
        groups = group_count(k, group)
        return shapes | {"group_scale": ("U8", [n, groups]), "group_offset": ("I8", [n, groups])}


class ResidualSet(BaseModel):
    """An 8-bit set that is stored as what it adds to a QoQ set.

    base  the qoq_linear set with groups, which says what is quantized
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["qoq_residual"] = "qoq_residual"
    base: str

    @classmethod
    def parse(cls, config: Mapping[str, Any], where: str) -> ResidualSet:
        """Validate one entry of `sets`; a FormatError begins with `where`."""
        try:
            return cls.model_validate(config)
        except ValidationError as error:
            raise FormatError(one_line(error, where)) from None

    @staticmethod
    def tensors(out_features: int, in_features: int) -> dict[str, tuple[str, list[int]]]:
        """Map each leaf that a layer adds to the base's to its (safetensors dtype, shape)."""
        return {"qresidual": ("U8", [out_features, in_features // 2])}


class KVSection(BaseModel):
    """The `quantization_config` of a model of which only the KV cache is quantized."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["qoq"] = "qoq"
    format_version: Literal[1] = 1
    kv_cache: KVCache

    @classmethod
    def parse(cls, section: Mapping[str, Any]) -> KVSection:
        """Validate the section of a `config.json`; FormatError says what is wrong."""
        try:
            return cls.model_validate(section)
        except ValidationError as error:
            raise FormatError(one_line(error, SECTION)) from None

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `parse` reads."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "kv_cache": self.kv_cache.to_json(),
        }


class LMHead(BaseModel):
    """The lm_head of all sets, where it is not in the model's dtype."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Literal[8]


class Stream(BaseModel):
    """The basis of a residual stream that is not the original model's.

    rotation  "stored" where the checkpoint has what turns hidden states back, else "unknown"
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rotation: Literal["stored", "unknown"]

    @property
    def is_stored(self) -> bool:
        """Whether the checkpoint has `stream.rotation` and `stream.norm`."""
        return self.rotation == "stored"


def stream_shapes(hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Map each leaf of a stored `Stream` to its shape."""
    return {"rotation": (hidden_size, hidden_size), "norm": (hidden_size,)}


class Section(BaseModel):
    """The `quantization_config` of a checkpoint; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["qoq"] = "qoq"
    format_version: Literal[1] = 1
    sets: dict[str, dict[str, Any]]
    routing: Routing
    input_ratio: dict[str, Annotated[tuple[str, ...], Field(max_length=MOST_RULES)]] = {}
    float_experts: Annotated[tuple[str, ...], Field(max_length=MOST_RULES)] = ()
    kv_cache: KVCache | None = None
    lm_head: LMHead | None = None
    stream: Stream | None = None

    @field_validator("sets")
    @classmethod
    def _sets(cls, sets: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if not sets:
            raise ValueError("a checkpoint needs at least one set; make it again")
        for name, config in sets.items():
            check_set_name(name)
            if not isinstance(config.get("quant_method"), str):
                raise ValueError(f"set {shown(name)} has no quant_method; make it again")
            if config["quant_method"] == QOQ_LINEAR:
                QoQSet.parse(config, name)
        for name, config in sets.items():
            if config["quant_method"] == QOQ_RESIDUAL:
                _check_base(name, ResidualSet.parse(config, name).base, sets)
        return sets

    @model_validator(mode="after")
    def _names(self) -> Section:
        self.routing.check_sets(self.sets)
        for name in self.input_ratio:
            if name not in self.sets:
                raise ValueError(
                    f"input_ratio names the set {shown(name)}, which does not exist; the sets are "
                    f"{', '.join(self.sets)}"
                )
        return self

    @classmethod
    def parse(cls, section: Mapping[str, Any]) -> Section:
        """Validate the section of a `config.json`; FormatError says what is wrong."""
        try:
            return cls.model_validate(section)
        except ValidationError as error:
            raise FormatError(one_line(error, SECTION)) from None
        except RoutingError as error:
            raise FormatError(f"{SECTION}: {error}") from None

    def base_of(self, set_name: str) -> str | None:
        """The set that `set_name` adds a residual to; None for a set of its own."""
        base: str | None = self.sets[set_name].get("base")
        return base if self.sets[set_name]["quant_method"] == QOQ_RESIDUAL else None

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `parse` reads."""
        section: dict[str, Any] = {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "sets": self.sets,
            "routing": self.routing.to_json(),
        }
        if self.input_ratio:
            section["input_ratio"] = {name: list(globs) for name, globs in self.input_ratio.items()}
        if self.float_experts:
            section["float_experts"] = list(self.float_experts)
        if self.kv_cache is not None:
            section["kv_cache"] = self.kv_cache.to_json()
        if self.lm_head is not None:
            section["lm_head"] = {"bits": self.lm_head.bits}
        if self.stream is not None:
            section[STREAM] = {"rotation": self.stream.rotation}
        return section

    def has_input_ratio(self, set_name: str, layer: str) -> bool:
        """Whether `layer` (a checkpoint layer, not a fused one) carries an input_ratio."""
        return any(fnmatchcase(layer, glob) for glob in self.input_ratio.get(set_name, ()))

    def has_float_experts(self, experts: str) -> bool:
        """Whether each set has its own of a mixture of experts that none of them quantizes."""
        return any(fnmatchcase(experts, glob) for glob in self.float_experts)


def _check_base(name: str, base: str, sets: Mapping[str, Mapping[str, Any]]) -> None:
    config = sets.get(base)
    if config is None:
        raise ValueError(
            f"set {shown(name)} has the base {shown(base)}, which does not exist; make it again"
        )
    if config["quant_method"] != QOQ_LINEAR or QoQSet.model_validate(config).group_size == -1:
        raise ValueError(
            f"set {shown(name)} has the base {shown(base)}, which is no {QOQ_LINEAR} set with "
            "groups; make it again"
        )


def check_set_name(name: str) -> None:
    """Raise ValueError unless `name` can name a set.

    Lower-case letters and digits only, so that no rule of vLLM that rewrites
    tensor names (`.q_proj.` to `.qkv_proj.`) can hit it.
    """
    if not _SET_NAME.fullmatch(name):
        raise ValueError(
            f"set name {shown(name)}: use lower-case letters and digits, beginning with a letter"
        )
    if name in _RESERVED:
        raise ValueError(
            f"set name {shown(name)} is reserved, models name their own tensors so; choose another"
        )


def split_name(tensor: str, sets: Iterable[str]) -> tuple[str | None, str]:
    """Split a tensor's name into set and ordinary name.

    `w8a8.model.norm.weight` gives ("w8a8", "model.norm.weight"). The set is None without prefix.
    """
    head, dot, rest = tensor.partition(".")
    return (head, rest) if dot and head in sets else (None, tensor)


def join_name(set_name: str | None, tensor: str) -> str:
    """Put the name of a set in front of a tensor's, as the inverse of `split_name`."""
    return tensor if set_name is None else f"{set_name}.{tensor}"


def split_layer(tensor: str) -> tuple[str, str]:
    """Split a tensor's name into layer and leaf.

    `model.layers.0.mlp.up_proj.weight` gives ("model.layers.0.mlp.up_proj", "weight").
    """
    layer, _, leaf = tensor.rpartition(".")
    return layer, leaf

"""The tensors that a model has in floating point, from its `config.json` alone.

The table says which layers an architecture has, and this module how their sizes follow from the
keys of the config. Shapes are those of PyTorch: a linear layer is [out_features, in_features], a
norm [size]. No file is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

from vllm_qoq.errors import FormatError, shown
from vllm_qoq.models.config import CONFIG
from vllm_qoq.models.names import LM_HEAD
from vllm_qoq.models.table import (
    ARCHITECTURES,
    REMEDY,
    Architecture,
    LayerSpec,
    architecture_of,
    flag,
    layer_kinds,
)

Shape = tuple[int, ...]

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", f"{LM_HEAD}.weight", "model.norm.weight"
LAYERS = "model.layers."
MOST_LAYERS = 1024
_MOST_EXPERTS = 512
MOST_SIZE = 1 << 24


class ExpectedTensors(Mapping[str, Shape]):
    """The shape of every tensor of the model that a `config.json` describes, by the tensor's name.

    Shapes are computed when asked for. `outside` are those of no decoder layer. `optional` are
    those that a checkpoint may have besides: the lm_head, where it is the embedding. `key_heads` is
    the number of heads of K, and their size. `is_sparse` says of each layer whether it has a
    mixture of `experts`, of which a token goes through `experts_of_token`, and `kinds` names the
    kinds of the layers of a hybrid model, none where all are alike. FormatError names a key that is
    missing or impossible.
    """

    def __init__(self, model: Architecture, config: Mapping[str, Any]) -> None:
        sizes = _Sizes(model, config)
        self.layers = sizes.key("num_hidden_layers", most=MOST_LAYERS)
        self.is_tied = _is_tied(model, config)
        self.key_heads = (sizes["key"] // sizes["head"], sizes["head"])
        vocabulary = (sizes["vocabulary"], sizes["hidden"])
        self.outside: Mapping[str, Shape] = {
            EMBEDDING: vocabulary,
            FINAL_NORM: (sizes["hidden"],),
            **({} if self.is_tied else {HEAD: vocabulary}),
        }
        self.optional: Mapping[str, Shape] = {HEAD: vocabulary} if self.is_tied else {}
        self._indices = {str(index): index for index in range(self.layers)}
        self.is_sparse = _sparse_layers(model, config, self.layers)
        self.experts, self.experts_of_token = _experts(sizes) if any(self.is_sparse) else (0, 0)
        self.kinds = layer_kinds(model, config, self.layers) if model.kinds else []
        self._alike = list(zip(self.kinds or [""] * self.layers, self.is_sparse, strict=True))
        self._sizes_of = {
            alike: dict(_tensors(_modules(model, sizes, *alike), config, sizes))
            for alike in dict.fromkeys(self._alike)
        }
        self._shapes = {
            alike: {name: tuple(sizes[one] for one in of_tensor) for name, of_tensor in all.items()}
            for alike, all in self._sizes_of.items()
        }

    def keys_of(self, name: str) -> tuple[str, ...]:
        """Name, for each size of a tensor, the keys of `config.json` that it is made of."""
        index, _, tensor = name.removeprefix(LAYERS).partition(".")
        if not name.startswith(LAYERS):
            return ("hidden_size",) if name == FINAL_NORM else ("vocab_size", "hidden_size")
        sizes = self._sizes_of[self._alike[self._indices[index]]]
        return tuple(_KEYS[size] for size in sizes[tensor])

    def of_layer(self, index: int) -> Mapping[str, Shape]:
        """List the tensors of decoder layer `index`, named relative to it."""
        return self._shapes[self._alike[index]]

    def __getitem__(self, name: str) -> Shape:
        index, dot, tensor = name.removeprefix(LAYERS).partition(".")
        if name.startswith(LAYERS) and dot and index in self._indices:
            return self.of_layer(self._indices[index])[tensor]
        return self.outside[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.outside
        for index in range(self.layers):
            for tensor in self.of_layer(index):
                yield f"{LAYERS}{index}.{tensor}"

    def __len__(self) -> int:
        return len(self.outside) + sum(len(self.of_layer(i)) for i in range(self.layers))


def expected_tensors(config: Mapping[str, Any]) -> ExpectedTensors:
    """List what a checkpoint in floating point of the model that `config` describes must hold.

    Raises FormatError if the architecture is not in the table, or a size is missing or impossible.
    """
    model = architecture_of(config)
    if model is None:
        raise FormatError(
            f"{CONFIG}: architectures: {shown(config.get('architectures'))} is not known; known "
            f"are {', '.join(ARCHITECTURES)}"
        )
    return ExpectedTensors(model, config)


def _modules(
    model: Architecture, sizes: _Sizes, kind: str, is_sparse: bool
) -> dict[str, LayerSpec]:
    """List the modules of a decoder layer of a kind, with or without experts."""
    common = {**model.common, **model.kinds.get(kind, {})}
    if not is_sparse or model.experts is None:
        return {**common, **model.mlp}
    router = {model.experts.router: LayerSpec(("experts", "hidden"))}
    modules = {**common, **router, **model.experts.shared}
    for number in range(sizes["experts"]):
        for name, module in model.experts.modules.items():
            modules[f"{model.experts.prefix}.{number}.{name}"] = module
    return modules


def _tensors(
    modules: Mapping[str, LayerSpec], config: Mapping[str, Any], sizes: _Sizes
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """List the tensors of `modules`, with the names of their sizes."""
    for name, module in modules.items():
        yield name if module.is_tensor else f"{name}.weight", module.sizes
        if module.has_bias(config, sizes.defaults):
            yield f"{name}.bias", module.sizes[:1]


def _sparse_layers(model: Architecture, config: Mapping[str, Any], layers: int) -> list[bool]:
    """Say of each decoder layer whether it has experts."""
    if model.experts is None:
        return [False] * layers
    dense = config.get("mlp_only_layers")
    step = config.get("decoder_sparse_step")
    step = step if _is_count(step) else 1
    dense = set(map(str, dense)) if isinstance(dense, list) else set()
    return [str(i) not in dense and (i + 1) % step == 0 for i in range(layers)]


def _experts(sizes: _Sizes) -> tuple[int, int]:
    """Read the number of experts in a mixture, and of those that a token goes through."""
    experts = sizes["experts"]
    return experts, sizes.key("num_experts_per_tok", most=experts)


def _is_tied(model: Architecture, config: Mapping[str, Any]) -> bool:
    is_said = config.get("tie_word_embeddings") is not None
    return flag(config, "tie_word_embeddings") if is_said else model.is_tied


_LINEAR_KEY = "linear_num_key_heads * linear_key_head_dim"
_LINEAR_VALUE = "linear_num_value_heads * linear_value_head_dim"
# The keys of `config.json` that each size is made of, as messages show them.
_KEYS = {
    "hidden": "hidden_size",
    "vocabulary": "vocab_size",
    "inner": "intermediate_size",
    "two_inner": "2 * intermediate_size",
    "head": "head_dim",
    "query": "num_attention_heads * head_dim",
    "gated_query": "2 * num_attention_heads * head_dim",
    "key": "num_key_value_heads * head_dim",
    "qkv": "(num_attention_heads + 2 * num_key_value_heads) * head_dim",
    "expert_inner": "moe_intermediate_size",
    "experts": "num_experts",
    "shared_inner": "shared_expert_intermediate_size",
    "one": "1",
    "linear_value": _LINEAR_VALUE,
    "linear_qkv": f"2 * {_LINEAR_KEY} + {_LINEAR_VALUE}",
    "linear_qkvz": f"2 * {_LINEAR_KEY} + 2 * {_LINEAR_VALUE}",
    "linear_heads": "linear_num_value_heads",
    "two_linear_heads": "2 * linear_num_value_heads",
    "linear_head": "linear_value_head_dim",
    "kernel": "linear_conv_kernel_dim",
}


class _Sizes:
    """The sizes that modules are made of, by name, read from a `config.json`."""

    def __init__(self, model: Architecture, config: Mapping[str, Any]) -> None:
        self._config = config
        self.defaults = model.defaults

    def __getitem__(self, name: str) -> int:
        match name:
            case "hidden":
                return self.key("hidden_size")
            case "vocabulary":
                return self.key("vocab_size")
            case "inner":
                return self.key("intermediate_size")
            case "two_inner":
                return 2 * self["inner"]
            case "head":
                return self._head_dim()
            case "query":
                return self.key("num_attention_heads") * self["head"]
            case "key":
                return self._key_value_heads() * self["head"]
            case "qkv":
                return self["query"] + 2 * self["key"]
            case "gated_query":
                return 2 * self["query"]
            case "linear_value":
                return self["linear_heads"] * self["linear_head"]
            case "linear_qkv":
                return 2 * self._linear_key() + self["linear_value"]
            case "linear_qkvz":
                return 2 * self._linear_key() + 2 * self["linear_value"]
            case "linear_heads":
                return self._linear_heads()
            case "two_linear_heads":
                return 2 * self["linear_heads"]
            case "linear_head":
                return self.key("linear_value_head_dim")
            case "kernel":
                return self.key("linear_conv_kernel_dim")
            case "expert_inner":
                return self.key("moe_intermediate_size")
            case "shared_inner":
                return self.key("shared_expert_intermediate_size")
            case "one":
                return 1
            case "experts":
                keys = ("num_local_experts", "num_experts")
                name = next((k for k in keys if k in self._config), keys[-1])
                return self.key(name, most=_MOST_EXPERTS)
        raise KeyError(name)

    def key(self, key: str, default: Callable[[], int] | None = None, most: int = MOST_SIZE) -> int:
        """Read the count under `key` of `config.json`; without one, take what `default` returns."""
        value = self._config.get(key)
        if value is None and key not in self._config:
            value = self.defaults.get(key)
        if value is None and default is not None:
            return default()
        if value is None:
            raise FormatError(f"{CONFIG}: {key}: missing; {REMEDY}")
        if not _is_count(value) or value > most:
            raise FormatError(
                f"{CONFIG}: {key}: {shown(value)} is not a whole number from 1 to {most}; {REMEDY}"
            )
        return value

    def _head_dim(self) -> int:
        found = self.key("head_dim", self._even_head)
        if found % 2:
            raise FormatError(
                f"{CONFIG}: head_dim: {found} is odd, but rotary embeddings turn pairs; {REMEDY}"
            )
        return found

    def _even_head(self) -> int:
        heads, hidden = self.key("num_attention_heads"), self["hidden"]
        if hidden % heads:
            raise FormatError(
                f"{CONFIG}: hidden_size: {hidden} is not a multiple of num_attention_heads, "
                f"{heads}, and there is no head_dim; {REMEDY}"
            )
        return hidden // heads

    def _linear_key(self) -> int:
        return self.key("linear_num_key_heads") * self.key("linear_key_head_dim")

    def _linear_heads(self) -> int:
        heads, keys = self.key("linear_num_value_heads"), self.key("linear_num_key_heads")
        if heads % keys:
            raise FormatError(
                f"{CONFIG}: linear_num_value_heads: {heads} is not a multiple of "
                f"linear_num_key_heads, {keys}; {REMEDY}"
            )
        return heads

    def _key_value_heads(self) -> int:
        heads = self.key("num_attention_heads")
        found = self.key("num_key_value_heads", lambda: heads)
        if heads % found:
            raise FormatError(
                f"{CONFIG}: num_attention_heads: {heads} is not a multiple of "
                f"num_key_value_heads, {found}; {REMEDY}"
            )
        return found


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0

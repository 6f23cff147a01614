"""Checks that the tensors of a set have the names and shapes that `config.json` implies.

vLLM takes the sizes of a model from its config and does not notice all contradictions.
For an architecture of the table (`vllm_qoq.models.table`) every tensor is known: what is
missing, misshapen or surplus is found. For any other, what common names tell is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vllm_qoq.checkpoint.folder import TensorInfo
from vllm_qoq.checkpoint.format import (
    INT8_HEAD_TENSORS,
    K_MEAN,
    QUANT_METHOD,
    SECTION,
    STREAM,
    split_layer,
)
from vllm_qoq.checkpoint.language import stored_name
from vllm_qoq.checkpoint.layout import FLOATS, QUANTIZED_LEAVES
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.errors import FormatError
from vllm_qoq.models.config import CONFIG, text_config
from vllm_qoq.models.names import LM_HEAD, split_decoder
from vllm_qoq.models.table import architecture_of
from vllm_qoq.models.tensors import (
    EMBEDDING,
    HEAD,
    LAYERS,
    ExpectedTensors,
    Shape,
    expected_tensors,
)

_REMEDY = "download or quantize the model again"
# Old checkpoints hold these constants, which vLLM computes.
_CONSTANTS = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
_MOST = 1 << 24


def is_known(weights: StoredSet) -> bool:
    """Whether every tensor of the model is known."""
    return architecture_of(weights.checkpoint.config) is not None


def findings(weights: StoredSet) -> Iterator[str]:
    """Find what contradicts `config.json`, a line each. Reads no tensor."""
    if not is_known(weights):
        yield from _common_names(weights)
        return
    try:
        tensors = expected_tensors(weights.checkpoint.config)
    except FormatError as error:
        yield str(error)
        return
    for name, shape in tensors.outside.items():
        yield from _tensor(weights, tensors, name, shape)
    present = _present_layers(weights)
    for index in range(tensors.layers):
        if index not in present:
            layer = stored_name(f"{LAYERS}{index}", weights.tensors)
            yield f"{layer}: has no tensors at all; {_REMEDY}"
            continue
        for name, shape in tensors.of_layer(index).items():
            yield from _tensor(weights, tensors, f"{LAYERS}{index}.{name}", shape)
    yield from _surplus(weights, tensors)


def surplus_biases(weights: StoredSet) -> list[str]:
    """List the biases that the model of `config.json` does not have.

    GPTQ tools write one into every layer. Those are zeros, or the set is another model's.
    """
    tensors = _expected(weights)
    if tensors is None:
        return []
    return [name for name in weights.tensors if _is_surplus_bias(name, tensors)]


def has_tied_copy(weights: StoredSet) -> bool:
    """Whether the embedding is the lm_head, and the set has an lm_head all the same."""
    if HEAD not in weights.tensors or EMBEDDING not in weights.tensors:
        return False
    tensors = _expected(weights)
    return tensors is not None and HEAD in tensors.optional


def _expected(weights: StoredSet) -> ExpectedTensors | None:
    """The tensors of the model; None where they are not known, or the config is wrong."""
    try:
        return expected_tensors(weights.checkpoint.config)
    except FormatError:
        return None


def _present_layers(weights: StoredSet) -> set[int]:
    places = (split_decoder(layer) for layer in weights.layers)
    return {place[1] for place in places if place is not None and place[0] == LAYERS}


def _tensor(weights: StoredSet, tensors: ExpectedTensors, name: str, shape: Shape) -> Iterator[str]:
    layer, leaf = split_layer(name)
    leaves = weights.layers.get(layer)
    if not leaves:
        lost = stored_name(layer if name.startswith(LAYERS) else name, weights.tensors)
        yield f"{lost}: missing; {_REMEDY}"
    elif layer in weights.quantized and leaf == "weight":
        yield from _quantized(weights, tensors, layer, shape)
    elif leaf not in leaves:
        lost = stored_name(name, weights.tensors)
        yield f"{lost}: missing, {CONFIG} says that the model has it; {_REMEDY}"
    else:
        yield from _plain(weights, tensors, leaves[leaf], name=name, shape=shape)


def _quantized(
    weights: StoredSet, tensors: ExpectedTensors, layer: str, shape: Shape
) -> Iterator[str]:
    if len(shape) != 2:
        place = stored_name(layer, weights.tensors)
        yield f"{place}: is quantized, but no linear layer; {_REMEDY}"
        return
    try:
        size = weights.size(layer)
    except FormatError:  # reported with the layer
        return
    if size != shape:
        some = next(iter(weights.layers[layer].values()))
        place = stored_name(layer, weights.tensors)
        yield (
            f"{some.file}: {place}: is {list(size)}, but {CONFIG} says "
            f"{_derived(tensors, f'{layer}.weight', shape)}; {_REMEDY}"
        )


def _plain(
    weights: StoredSet, tensors: ExpectedTensors, info: TensorInfo, name: str, shape: Shape
) -> Iterator[str]:
    is_int8_head = name == HEAD and LM_HEAD in weights.shared_layers
    if info.shape != shape:
        yield (
            f"{info.file}: {info.name}: is {list(info.shape)}, but {CONFIG} says "
            f"{_derived(tensors, name, shape)}; {_REMEDY}"
        )
    elif info.dtype not in FLOATS and not is_int8_head:
        yield (
            f"{info.file}: {info.name}: is {info.dtype}, expected {' or '.join(sorted(FLOATS))}; "
            f"{_REMEDY}"
        )


def _derived(tensors: ExpectedTensors, name: str, shape: Shape) -> str:
    return f"{list(shape)} ({', '.join(tensors.keys_of(name))})"


def _surplus(weights: StoredSet, tensors: ExpectedTensors) -> Iterator[str]:
    """Find tensors that the model has no place for; a copy of a tied head is not one."""
    beyond = set()
    known = architecture_of(weights.checkpoint.config)
    unused = known.unused if known is not None else ()
    for name, info in weights.tensors.items():
        layer, leaf = split_layer(name)
        if name.partition(".")[0] in unused:
            continue
        if name in tensors or name.endswith(_CONSTANTS) or _is_surplus_bias(name, tensors):
            continue
        # The modules `stream` and `k_mean` check these.
        if layer == STREAM or (leaf == K_MEAN and _is_ours(weights)):
            continue
        if name in tensors.optional:
            yield from _tied_head(weights, tensors, info, name)
        elif layer == LM_HEAD and LM_HEAD in weights.shared_layers and leaf in INT8_HEAD_TENSORS:
            continue
        elif leaf in QUANTIZED_LEAVES and len(tensors.get(f"{layer}.weight", ())) == 2:
            continue  # `layout` checks which of them belong together
        elif (place := split_decoder(name)) is None or place[:2] not in beyond:
            if place is not None and place[0] == LAYERS and place[1] >= tensors.layers:
                beyond.add(place[:2])
                layer = stored_name(f"{LAYERS}{place[1]}", weights.tensors)
                yield (
                    f"{info.file}: {layer}: is beyond num_hidden_layers = "
                    f"{tensors.layers} of {CONFIG}; {_REMEDY}"
                )
            else:
                yield (
                    f"{info.file}: {info.name}: the model that {CONFIG} describes has no such "
                    f"tensor; remove it, or {_REMEDY}"
                )


def _tied_head(
    weights: StoredSet, tensors: ExpectedTensors, info: TensorInfo, name: str
) -> Iterator[str]:
    if LM_HEAD in weights.shared_layers:
        yield (
            f"{CONFIG}: tie_word_embeddings: is true, but the checkpoint has an int8 {LM_HEAD} of "
            f"its own; {_REMEDY}"
        )
    else:
        yield from _plain(weights, tensors, info, name=name, shape=tensors.optional[name])


def _is_ours(weights: StoredSet) -> bool:
    section = weights.checkpoint.config.get(SECTION)
    return isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD


def _is_surplus_bias(name: str, tensors: ExpectedTensors) -> bool:
    layer, leaf = split_layer(name)
    return (
        leaf == "bias"
        and layer.startswith(LAYERS)
        and name not in tensors
        and len(tensors.get(f"{layer}.weight", ())) == 2
    )


def _common_names(weights: StoredSet) -> Iterator[str]:
    """Find what contradicts the config, by common names, where the architecture is not known."""
    text = text_config(weights.checkpoint.config)
    hidden, vocabulary, inner = (
        _size(text.get(key)) for key in ("hidden_size", "vocab_size", "intermediate_size")
    )
    if _size(text.get("word_embed_proj_dim")) is not None:  # OPT: embeddings of another width
        return
    both = {"embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    in_layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        **{f"self_attn.{x}_proj": (None, hidden) for x in "qkv"},
        "self_attn.o_proj": (hidden, None),
    }
    if not text.get("use_double_wide_mlp"):  # Gemma 4: some layers are twice as wide
        in_layer |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
        in_layer |= {"mlp.down_proj": (hidden, inner)}
    for layer, leaves in weights.layers.items():
        place = split_decoder(layer)
        table: Mapping[str, tuple[int | None, ...]] = both if place is None else in_layer
        module = layer.rpartition(".")[2] if place is None else place[2]
        if not _is_text(layer) or module not in table:
            continue
        shape, wanted = _shape(weights, layer), table[module]
        if shape is None or len(shape) != len(wanted):
            continue
        want = [w if w is not None else s for w, s in zip(wanted, shape, strict=True)]
        if list(shape) != want:
            some = next(iter(leaves.values()))
            yield (
                f"{some.file}: {layer}: is {list(shape)}, but {CONFIG} says {want} (hidden_size "
                f"{hidden}, vocab_size {vocabulary}, intermediate_size {inner}); {_REMEDY}"
            )


def _shape(weights: StoredSet, layer: str) -> Shape | None:
    if layer in weights.quantized:
        try:
            return weights.size(layer)
        except FormatError:  # reported with the layer
            return None
    info = weights.layers[layer].get("weight")
    return info.shape if info is not None else None


def _is_text(layer: str) -> bool:
    """Whether a layer belongs to the language model, not to an encoder beside it."""
    return not any(word in layer for word in ("vision", "visual", "audio", "encoder", "tower"))


def _size(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST:
        return value
    return None

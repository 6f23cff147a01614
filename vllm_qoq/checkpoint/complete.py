"""Checks that nothing is missing from a set, as far as headers tell; vLLM does not notice.

There are three views, because no single one sees every loss: the tensors of one layer must
fit together (`layout`), the decoder layers must look alike, and all must be as
`config.json` says (`sizes`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from vllm_qoq.checkpoint import constants, served, sizes
from vllm_qoq.checkpoint.format import INPUT_RATIO
from vllm_qoq.checkpoint.language import language_set
from vllm_qoq.checkpoint.layout import weight_args
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.errors import FormatError, shown
from vllm_qoq.models.config import CONFIG, text_config
from vllm_qoq.models.names import split_decoder
from vllm_qoq.models.table import architecture_of, routers
from vllm_qoq.models.tensors import MOST_LAYERS
from vllm_qoq.models.vision import TOWERS, language_config, language_name, vision_language

_REMEDY = "download or quantize the model again"


def findings(weights: StoredSet) -> Iterator[str]:
    """Find what is missing or malformed, a line each; nothing for a complete set."""
    try:
        language = language_set(weights)
    except FormatError as error:
        yield str(error)
        return
    yield from constants.findings(weights.checkpoint.config)
    yield from sizes.findings(language)
    yield from _quantized_towers(weights)
    yield from served.findings(weights)
    yield from _malformed_layers(weights)
    if not sizes.is_known(language):
        yield from _missing_modules(weights)
    yield from _unlike_layers(weights)


def check(weights: StoredSet) -> None:
    """Raise FormatError with the first of the `findings`, if there is one."""
    for finding in findings(weights):
        raise FormatError(f"{weights.checkpoint.path}: {finding}")


def _malformed_layers(weights: StoredSet) -> Iterator[str]:
    model = architecture_of(language_config(weights.checkpoint.config))
    gates = routers(model) if model is not None else ()
    for layer in sorted(weights.quantized):
        place = split_decoder(layer)
        if place is not None and place[2] in gates:
            yield (
                f"{layer}: is quantized, but all sets share what weights the experts; quantize "
                f'with ignore=["re:.*{re.escape(place[2])}$"]'
            )
            continue
        if "lm_head" in layer or "embed" in layer:
            yield (
                f"{layer}: is quantized, but the sets share embeddings and lm_head; quantize "
                'with ignore=["lm_head"]'
            )
            continue
        try:
            weights.describe(layer)
        except FormatError as error:
            yield str(error)


def _quantized_towers(weights: StoredSet) -> Iterator[str]:
    """Find quantized layers beside the language model: a tower runs once, whatever set is next."""
    if vision_language(weights.checkpoint.config) is None:
        return
    for layer in sorted(weights.quantized):
        if language_name(layer) is None:
            yield (
                f"{layer}: is quantized, but what reads images stays in float; quantize with "
                f"ignore={[f're:.*{tower}.*' for tower in TOWERS]}, too"
            )


def _missing_modules(weights: StoredSet) -> Iterator[str]:
    """Find decoder layers that lack a module that others have, or have no tensor at all."""
    count = text_config(weights.checkpoint.config).get("num_hidden_layers")
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= MOST_LAYERS:
        yield f"{CONFIG}: num_hidden_layers: {shown(count)} is not a number from 1 to {MOST_LAYERS}"
        return
    for prefix, indices in _decoders(weights.layers).items():
        extra = sorted(i for i in indices if i >= count)
        if extra:
            yield f"{prefix}{extra[0]}: is beyond num_hidden_layers = {count} of {CONFIG}"
        for alike in _kinds(weights, count):
            needed = set().union(*(indices.get(i, set()) for i in alike))
            for i in alike:
                if i not in indices:
                    yield f"{prefix}{i}: has no tensors at all; {_REMEDY}"
                    continue
                for module in sorted(needed - indices[i]):
                    yield f"{prefix}{i}.{module}: missing, other layers have it; {_REMEDY}"


def _decoders(layers: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    """Group the decoder layers: prefix -> index -> modules.

    Vision towers are left out: they have a `layers.` of their own, whose length another key gives.
    """
    found: dict[str, dict[int, set[str]]] = {}
    for name in layers:
        place = split_decoder(name)
        if place is not None and "vision" not in place[0] and "visual" not in place[0]:
            found.setdefault(place[0], {}).setdefault(place[1], set()).add(place[2])
    return found


def _kinds(weights: StoredSet, count: int) -> Iterable[list[int]]:
    """Group the indices of decoder layers by kind: hybrid models mix kinds of other modules."""
    types = text_config(weights.checkpoint.config).get("layer_types")
    if not isinstance(types, list) or len(types) != count:
        return [list(range(count))]
    kinds: dict[str, list[int]] = defaultdict(list)
    for index, kind in enumerate(types):
        kinds[str(kind)].append(index)
    return kinds.values()


def _unlike_layers(weights: StoredSet) -> Iterator[str]:
    """Find layers that lack a tensor which the same module has elsewhere in the decoder."""
    by_module: dict[tuple[str, str], dict[str, frozenset[str]]] = defaultdict(dict)
    for name, tensors in weights.layers.items():
        place = split_decoder(name)
        if place is not None:
            by_module[place[0], place[2]][name] = frozenset(tensors)
    has_schemes = len(weight_args(weights.config)) > 1 or any(
        weights.config.get(key) for key in ("dynamic", "extra_config")
    )
    for layers in by_module.values():
        groups: dict[bool, dict[str, frozenset[str]]] = {True: {}, False: {}}
        for layer, leaves in layers.items():
            groups[layer in weights.quantized][layer] = leaves
        for is_quantized, group in groups.items():
            if is_quantized and has_schemes:
                continue  # In mixed precision, `layout` has looked at each layer alone.
            # Which layers carry a ratio is listed in the section, and `verify` looks for those.
            every = frozenset().union(*group.values()) - {INPUT_RATIO}
            for layer, leaves in sorted(group.items()):
                for leaf in sorted(every - leaves):
                    yield f"{layer}.{leaf}: missing, other layers have it; {_REMEDY}"

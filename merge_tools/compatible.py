"""Checks that the inputs are versions of one model: config, tokenizer, preprocessing, layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_tools import MergeError, preprocessing
from merge_tools.meaning import default, normal
from vllm_qoq.checkpoint.folder import read_json
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.models.config import CONFIG

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_TOKENIZER = "tokenizer.json"
_TOKENIZER_BYTES = 512 << 20
# How a text was cut or padded for calibration is saved with the tokenizer; vLLM sets its own.
_TOKENIZER_IGNORED = ("truncation", "padding")
_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


def check(sources: Sequence[StoredSet], prefill: StoredSet) -> None:
    """Raise MergeError unless all sources are the model that `prefill` is."""
    preprocessing.check_present(sources, prefill)
    for source in sources:
        if source is prefill:
            continue
        _check_config(prefill, source)
        _check_tokenizer(prefill, source)
        preprocessing.check(prefill, source)
        _check_layers(prefill, source)


def model_dtype(config: Mapping[str, Any]) -> str:
    """The safetensors name of the dtype in which the model runs, BF16 when it does not say."""
    return _DTYPES.get(str(_named_dtype(config)), "BF16")


def stored_name(dtype: str) -> str:
    """The safetensors name of a dtype's name in `config.json`."""
    return _DTYPES[dtype]


def choose_dtype(sources: Sequence[StoredSet], prefill: StoredSet, given: str | None) -> str:
    """The dtype in which all sets will run, `bfloat16`, `float16` or `float32`.

    It is `given` if there is one, else what the sets say. Of two, bfloat16 wins: it has the range
    of every model, which float16 has not.
    """
    if given is not None:
        return given
    named = [_named_dtype(source.checkpoint.config) for source in (prefill, *sources)]
    known = [name for name in named if name in _DTYPES]
    if not known:
        return "bfloat16"
    for name in ("bfloat16", "float16"):
        if name in known:
            return name
    return known[0]


def has_several_dtypes(sources: Sequence[StoredSet]) -> bool:
    """Whether the configs name more than one dtype."""
    named = {_named_dtype(source.checkpoint.config) for source in sources}
    return len(named & _DTYPES.keys()) > 1


def _named_dtype(config: Mapping[str, Any]) -> str | None:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str):
                return str(part[key]).removeprefix("torch.")
    return None


def _check_config(left: StoredSet, right: StoredSet) -> None:
    configs = [one.checkpoint.config for one in (left, right)]
    ours, theirs = (normal(config) for config in configs)
    for key in sorted({*ours, *theirs}):
        values = [ours.get(key), theirs.get(key)]
        if None in values and values != [None, None]:
            values = [normal(config).get(key, default(config, key)) for config in configs]
        if values[0] != values[1]:
            place, *differing = _innermost(key, values[0], values[1])
            raise MergeError(
                f"{CONFIG}: {place}: is {_short(differing[0])} in {left.name} and "
                f"{_short(differing[1])} in {right.name}; quantize both from the same model, or "
                "mend the config that is wrong"
            )


def _innermost(place: str, ours: object, theirs: object) -> tuple[str, object, object]:
    """Find the first key of nested objects, with dots, in which two that differ do so."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key):
                return _innermost(f"{place}.{key}", ours.get(key), theirs.get(key))
    return place, ours, theirs


def _short(value: object) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check_tokenizer(left: StoredSet, right: StoredSet) -> None:
    """Raise MergeError unless both have the same tokenizer.

    Compared is tokenizer.json or, where a set has none, every file that it could be made from.
    """
    ours, theirs = left.checkpoint.path, right.checkpoint.path
    is_whole = all((folder / _TOKENIZER).is_file() for folder in (ours, theirs))
    for file in (_TOKENIZER,) if is_whole else (_TOKENIZER, *_TOKENIZER_FILES):
        has = [(folder / file).is_file() for folder in (ours, theirs)]
        if not any(has):
            continue
        if not all(has):
            without = right.name if has[0] else left.name
            raise MergeError(
                f"{file}: missing from {without}; copy the tokenizer of the other set into it"
            )
        if _content(ours / file) != _content(theirs / file):
            raise MergeError(
                f"{file}: differs between {left.name} and {right.name}; a merged checkpoint has "
                "one tokenizer, so quantize both from the same model"
            )


def _content(path: Path) -> object:
    """The content of a tokenizer file in one spelling, whichever version of tokenizers wrote it."""
    if path.name != _TOKENIZER:
        return path.read_bytes()
    content = read_json(path, _TOKENIZER_BYTES)
    kept = {key: value for key, value in content.items() if key not in _TOKENIZER_IGNORED}
    if isinstance(kept.get("model"), dict):
        # Only some versions write options that are off, and merges are texts or pairs.
        model = {key: value for key, value in kept["model"].items() if value not in (None, False)}
        if isinstance(model.get("merges"), list):
            model["merges"] = [
                " ".join(map(str, pair)) if isinstance(pair, list) else pair
                for pair in model["merges"]
            ]
        kept["model"] = model
    return kept


def _check_layers(left: StoredSet, right: StoredSet) -> None:
    """Raise MergeError unless both have the same layers, with weights of the same size."""
    quantized = left.quantized | right.quantized
    for layer in sorted({*left.layers, *right.layers}):
        if layer not in left.layers or layer not in right.layers:
            has, lacks = (left, right) if layer in left.layers else (right, left)
            some = next(iter(has.layers[layer].values()))
            raise MergeError(
                f"{some.file}: {some.name}: is in {has.name}, but {lacks.name} has no layer "
                f"{layer}; download or quantize {lacks.name} again"
            )
        if layer in quantized:
            _check_size(left, right, layer)
        else:
            _check_plain(left, right, layer)


def _check_size(left: StoredSet, right: StoredSet, layer: str) -> None:
    sizes = [one.size(layer) for one in (left, right)]
    if sizes[0] != sizes[1]:
        raise MergeError(
            f"{layer}: is {sizes[0][0]} x {sizes[0][1]} in {left.name} and {sizes[1][0]} x "
            f"{sizes[1][1]} in {right.name}; quantize both from the same model"
        )


def _check_plain(left: StoredSet, right: StoredSet, layer: str) -> None:
    ours, theirs = left.layers[layer], right.layers[layer]
    for leaf in sorted({*ours, *theirs}):
        name = f"{layer}.{leaf}"
        if leaf not in ours or leaf not in theirs:
            lacks = right.name if leaf in ours else left.name
            raise MergeError(f"{name}: missing from {lacks}; download or quantize it again")
        if ours[leaf].shape != theirs[leaf].shape:
            raise MergeError(
                f"{name}: is {list(ours[leaf].shape)} in {left.name} and "
                f"{list(theirs[leaf].shape)} in {right.name}; quantize both from the same model"
            )

"""Are the inputs versions of one model? Everything but the weights: config, tokenizer, names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge_tools import MergeError
from merge_tools.sources import WeightSet
from vllm_qoq.checkpoint import CONFIG, read_json
from vllm_qoq.format import SECTION

_IGNORED_KEYS = frozenset({"_name_or_path", "transformers_version", "use_cache", SECTION})
_TOKENIZER = "tokenizer.json"
_TOKENIZER_BYTES = 512 << 20
# How a text was cut or padded for calibration is saved with the tokenizer; vLLM sets its own.
_TOKENIZER_IGNORED = ("truncation", "padding")
_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


def check(sources: Sequence[WeightSet], prefill: WeightSet) -> None:
    """Raise MergeError unless all sources are the model that `prefill` is."""
    for source in sources:
        if source is prefill:
            continue
        _check_config(prefill, source)
        _check_tokenizer(prefill, source)
        _check_layers(prefill, source)


def model_dtype(config: dict[str, Any]) -> str:
    """The safetensors name of the dtype in which the model runs, BF16 when it does not say."""
    text = config.get("text_config")
    named = [config.get("dtype"), config.get("torch_dtype")]
    named += [text.get("dtype"), text.get("torch_dtype")] if isinstance(text, dict) else []
    name = next((_dtype(n) for n in named if n), "bfloat16")
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    return names.get(str(name), "BF16")


def _check_config(left: WeightSet, right: WeightSet) -> None:
    ours, theirs = _comparable(left.checkpoint.config), _comparable(right.checkpoint.config)
    for key in sorted({*ours, *theirs}):
        if ours.get(key) != theirs.get(key):
            raise MergeError(
                f"{CONFIG}: {key}: is {ours.get(key)!r} in {left.name} and {theirs.get(key)!r} in "
                f"{right.name}; quantize both from the same model, with one version of transformers"
            )


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The config without what may differ; `torch_dtype`, the older spelling, as `dtype`."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key in _IGNORED_KEYS:
            continue
        if key in ("torch_dtype", "dtype"):
            key, value = "dtype", _dtype(value)
        kept[key] = _comparable(value) if isinstance(value, dict) else value
    return kept


def _dtype(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _check_tokenizer(left: WeightSet, right: WeightSet) -> None:
    ours, theirs = left.checkpoint.path, right.checkpoint.path
    for file in (_TOKENIZER, *_TOKENIZER_FILES):
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


def _content(path: Path) -> Any:
    if path.name != _TOKENIZER:
        return path.read_bytes()
    content = read_json(path, _TOKENIZER_BYTES)
    return {key: value for key, value in content.items() if key not in _TOKENIZER_IGNORED}


def _check_layers(left: WeightSet, right: WeightSet) -> None:
    """Same layers, with weights of the same size."""
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


def _check_size(left: WeightSet, right: WeightSet, layer: str) -> None:
    sizes = [one.size(layer) for one in (left, right)]
    if sizes[0] != sizes[1]:
        raise MergeError(
            f"{layer}: is {sizes[0][0]} x {sizes[0][1]} in {left.name} and {sizes[1][0]} x "
            f"{sizes[1][1]} in {right.name}; quantize both from the same model"
        )


def _check_plain(left: WeightSet, right: WeightSet, layer: str) -> None:
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

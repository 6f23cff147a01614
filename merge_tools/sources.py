"""The inputs of a merge: finished checkpoints, one per set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_tools import MergeError
from vllm_qoq.checkpoint.folder import Checkpoint, error_context, read_json
from vllm_qoq.checkpoint.format import SECTION, KVSection, check_set_name, split_layer
from vllm_qoq.checkpoint.layout import KV_CACHE_LEAVES
from vllm_qoq.checkpoint.methods import parse
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.errors import FormatError, shown
from vllm_qoq.models.config import CONFIG
from vllm_qoq.models.names import split_expert
from vllm_qoq.models.table import architecture_of, with_experts
from vllm_qoq.models.vision import language_config

# Older checkpoints of compressed-tensors and of ModelOpt keep their config in these.
_COMPRESSION, _MODELOPT = "compression_config", "hf_quant_config.json"
_MODELOPT_BYTES = 16 << 20
# Older versions of AutoGPTQ and AutoAWQ keep it in these.
_BESIDE = ("quantize_config.json", "quant_config.json")


def parse_sources(arguments: Sequence[str]) -> dict[str, str]:
    """Parse `["w8a8=DIR", ...]` into {"w8a8": "DIR", ...}, in this order.

    What is for a folder may be an id of the Hugging Face Hub, so it stays text.
    """
    folders: dict[str, str] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals or not folder or not name:
            wanted = folder or argument.strip("=") or "DIR"
            raise MergeError(f"{argument!r}: write NAME=DIR, for example w8a8={wanted}")
        try:
            check_set_name(name)
        except ValueError as error:
            raise MergeError(f"{argument!r}: {error}") from None
        if name in folders:
            raise MergeError(
                f"{argument!r}: set {name!r} is given twice ({folders[name]}); each set needs its "
                "own name"
            )
        folders[name] = folder
    return folders


def check_distinct(folders: Mapping[str, Path]) -> None:
    """Raise MergeError if one folder is given for two sets."""
    owners: dict[Path, str] = {}
    for name, folder in folders.items():
        other = owners.setdefault(folder.resolve(), name)
        if other != name:
            raise MergeError(
                f"{name}={folder}: is the folder of set {other!r}, too; give each set its own"
            )


def open_sources(folders: Mapping[str, Path], takes_floats: bool = False) -> list[StoredSet]:
    """Open every folder and refuse what cannot be a set. Reads headers only.

    takes_floats  whether a model that is not quantized may be among them, with an empty config
    """
    sources = []
    for name, folder in folders.items():
        with error_context(folder):
            checkpoint = Checkpoint.open(folder)
            config = _set_config(checkpoint, takes_floats)
            _check_tensors(checkpoint)
        sources.append(StoredSet(name, checkpoint, config, checkpoint.tensors))
    for source in sources:
        _check_names(source, folders)
    return sources


def _set_config(checkpoint: Checkpoint, takes_floats: bool) -> dict[str, Any]:
    config = _quantization(checkpoint)
    if config is None and takes_floats:
        return {}
    if isinstance(checkpoint.section, KVSection):
        raise FormatError(
            f"{CONFIG}: {SECTION}: quantizes the KV cache alone; merge the model without it, then "
            "run `vllm-qoq calibrate-kv` on what was merged"
        )
    if checkpoint.section is not None:
        raise FormatError(
            f"{CONFIG}: {SECTION}: made by vllm-qoq already, with all its sets in it, and served "
            f"as it is: vllm serve {checkpoint.path} --quantization qoq; for other sets, merge the "
            "folders that it was made of, or quantize the model with other --sets"
        )
    for name in _BESIDE if config is None else ():
        if (checkpoint.path / name).exists():
            raise FormatError(
                f"{CONFIG}: {SECTION}: missing; vLLM does not look into {name} by itself, so copy "
                "its content there, with a quant_method such as 'gptq' or 'awq'"
            )
    if not isinstance(config, dict) or not isinstance(config.get("quant_method"), str):
        raise FormatError(
            f"{CONFIG}: {SECTION}: missing, so this model is not quantized; quantize it first, "
            "for example with llmcompressor"
        )
    if config.get("kv_cache_scheme"):
        raise FormatError(
            f"{CONFIG}: {SECTION}.kv_cache_scheme: all sets share one KV cache, whose precision "
            "is chosen when serving (--kv-cache-dtype); quantize without a kv_cache_scheme"
        )
    parse(config)
    _check_transforms(config.get("transform_config"))
    return config


def _quantization(checkpoint: Checkpoint) -> object:
    """The quantization config of a set, from where vLLM looks for it; None if there is none."""
    text = checkpoint.config.get("text_config")
    nested = text.get(SECTION) if isinstance(text, dict) else None
    for found in (checkpoint.config.get(SECTION), nested, checkpoint.config.get(_COMPRESSION)):
        if found is not None:
            return found
    modelopt = checkpoint.path / _MODELOPT
    if not modelopt.exists():
        return None
    return {"quant_method": "modelopt", **read_json(modelopt, _MODELOPT_BYTES)}


def _check_transforms(transforms: object) -> None:
    # compressed-tensors applies these to K after RoPE, so K is in another basis.
    text = str(transforms or "")
    if "k_cache" in text or "q_attn" in text:
        raise FormatError(
            f"{CONFIG}: {SECTION}.transform_config: rotates keys while serving (R3), but all sets "
            "share one KV cache; quantize without R3"
        )


def _check_tensors(checkpoint: Checkpoint) -> None:
    known = architecture_of(language_config(checkpoint.config))
    for name, info in checkpoint.tensors.items():
        layer, leaf = split_layer(name)
        if leaf in KV_CACHE_LEAVES and "attn" in layer:
            raise FormatError(
                f"{info.file}: {name}: the scale of a quantized KV cache, but all sets share one "
                "cache, whose precision is chosen when serving; quantize without a kv_cache_scheme"
            )
        if ".experts." not in name:
            continue
        if known is None or known.experts is None:
            raise FormatError(
                f"{info.file}: {name}: an expert, but {CONFIG}: architectures: "
                f"{shown(checkpoint.config.get('architectures'))} is not one whose experts can be "
                f"merged; these are {', '.join(with_experts())}"
            )
        if split_expert(layer) is None:
            raise FormatError(
                f"{info.file}: {name}: holds all experts of a layer at once; save each expert's "
                "gate, up and down projection for itself, as llmcompressor does"
            )


def _check_names(source: StoredSet, names: Mapping[str, Path]) -> None:
    for tensor, info in source.tensors.items():
        first = tensor.partition(".")[0]
        if first in names:
            raise MergeError(
                f"{source.checkpoint.path}: {info.file}: {tensor}: begins like the set {first!r}; "
                "give the set another name"
            )

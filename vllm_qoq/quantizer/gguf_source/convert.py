"""A folder of Hugging Face in bf16 made of a GGUF file, once: what `quantize` reads then.

transformers reads the tensors. What it would lose is looked for: RoPE scaling (`rope`), tensors
that its model does not have, and the tokenizer (`tokenizer`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from sys import stderr
from typing import TYPE_CHECKING, Any

from vllm_qoq.checkpoint.format import SECTION
from vllm_qoq.errors import reason
from vllm_qoq.models.config import CONFIG
from vllm_qoq.models.tensors import HEAD
from vllm_qoq.progress import human_bytes
from vllm_qoq.quantizer import QuantizeError, noise

if TYPE_CHECKING:
    from vllm_qoq.quantizer.gguf_source.header import Header

SOURCE = ".gguf_source.json"
"""The file of a converted folder that says what it was made of; hidden ones are not copied."""

_SUFFIX = ".gguf"
_UNUSED_KEYS = (SECTION, "_name_or_path", "_model_name_or_path")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_BYTES = 2  # of a weight in bf16
# Keys of the file that change what a layer computes, and what the models here do without them.
_UNSUPPORTED = ("expert_count", "attention.sliding_window", "logit_scale", "attn_logit_softcapping")


def gguf_file(model: Path) -> Path | None:
    """Find the GGUF file that `model` is, or that it has in the place of other weights.

    Raises QuantizeError for a folder with several.
    """
    if model.is_file() and model.suffix == _SUFFIX:
        return model
    if not model.is_dir() or any(model.glob("*.safetensors")):
        return None
    found = sorted(model.glob(f"*{_SUFFIX}"))
    if len(found) > 1:
        raise QuantizeError(
            f"{model}: has {len(found)} GGUF files, {found[0].name} and others; give one of them "
            "(parts of one model have to be joined: llama-gguf-split --merge)"
        )
    return found[0] if found else None


def source_of(folder: Path) -> dict[str, Any] | None:
    """Read what a converted folder was made of; None for any other folder."""
    file = folder / SOURCE
    return json.loads(file.read_text()) if file.is_file() else None


def note(source: Mapping[str, Any]) -> str:
    """Say what a GGUF source means for the errors that are measured against it."""
    types = ", ".join(f"{count} {kind}" for kind, count in source["types"].items())
    return (
        f"source: GGUF with {types} tensors; errors are those against these weights, not against "
        "the model that they were rounded from, and 4-bit types lie on a grid of 32 already"
    )


def convert(file: Path, folder: Path, quiet: bool) -> None:
    """Make `folder` of a GGUF file, unless it was made of the same file already.

    Raises QuantizeError for what would be lost, and for a `folder` that is something else.
    """
    if find_spec("gguf") is None:
        raise QuantizeError(
            f"{file}: reading GGUF needs the package gguf; install it: pip install 'vllm-qoq[gguf]'"
        )
    from vllm_qoq.quantizer.gguf_source.header import read_header
    from vllm_qoq.quantizer.gguf_source.tokenizer import check_tokenizer

    stat = file.stat()
    identity = {"file": file.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    present = source_of(folder)
    if present is not None and identity.items() <= present.items():
        return
    if folder.exists():
        raise QuantizeError(
            f"{folder}: is there already and was not made of {file}; move it, or choose another "
            "--output"
        )
    noise.hide_bars()
    header = read_header(file)
    _check(header)
    has_tokenizer = all((file.parent / name).is_file() for name in _TOKENIZER_FILES)
    if not has_tokenizer:
        check_tokenizer(header)
    if not quiet:
        size = human_bytes(header.parameters * _BYTES)
        print(f"converting {file.name} into {folder} ({size} in bf16)", file=stderr, flush=True)
    source = identity | {"types": header.types, "license": header.keys.get("general.license")}
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with redirect_stdout(stderr):
            _write(header, part, has_tokenizer)
        (part / SOURCE).write_text(json.dumps(source, indent=2) + "\n")
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check(header: Header) -> None:
    """Raise QuantizeError for a model that is not converted as it is."""
    if header.architecture not in _ARCHITECTURES:
        raise QuantizeError(
            f"{header.path}: general.architecture: {header.architecture!r} is not supported; "
            f"supported are {', '.join(_ARCHITECTURES)}"
        )
    for key in _UNSUPPORTED:
        if header.of_model(key):
            raise QuantizeError(
                f"{header.path}: {header.architecture}.{key}: {header.of_model(key)} would be "
                "lost; give the model in the format of Hugging Face"
            )


def _write(header: Header, folder: Path, has_tokenizer: bool) -> None:
    """Write config, weights, tokenizer and generation config."""
    from vllm_qoq.quantizer.gguf_source.rope import scaling
    from vllm_qoq.quantizer.gguf_source.tokenizer import load_tokenizer

    rope = scaling(header)
    file = header.path
    try:
        model = _load(header)
        if rope is not None:
            model.config.rope_parameters = {**model.config.rope_parameters, **rope}
        eos = header.keys.get("tokenizer.ggml.eos_token_id")
        bos = header.keys.get("tokenizer.ggml.bos_token_id")
        for config in (model.config, model.generation_config):
            config.bos_token_id, config.eos_token_id = bos, eos
        _save(model, folder)
        if has_tokenizer:
            for name in _TOKENIZER_FILES:
                shutil.copyfile(file.parent / name, folder / name)
        else:
            load_tokenizer(header, file).save_pretrained(folder)
    except (KeyboardInterrupt, SystemExit, MemoryError, QuantizeError):
        raise
    except Exception as error:  # whatever transformers raises at a stranger's file
        raise QuantizeError(
            f"{file}: transformers cannot read it: {reason(error)}; give the model in the format "
            "of Hugging Face"
        ) from error


def _save(model: Any, folder: Path) -> None:
    """Write the model as `save_pretrained` would, which refuses one that came from GGUF."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir()
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors[HEAD]
    save_torch_state_dict(tensors, folder)
    values = model.config.to_diff_dict()
    values = {key: value for key, value in values.items() if key not in _UNUSED_KEYS}
    values |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    model.generation_config.save_pretrained(folder)


def _load(header: Header) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_qoq.quantizer.gguf_source.rope import FREQUENCIES

    file = header.path
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    model, info = loaded
    for what, names in info.items():
        if names:
            raise QuantizeError(
                f"{file}: {what.replace('_', ' ')}: {sorted(map(str, names))[0]}; download the "
                "file again"
            )
    kept = len(model.state_dict()) - bool(model.config.tie_word_embeddings)
    stored = header.tensors.keys() - {FREQUENCIES}
    if len(stored) != kept:
        suspects = sorted(name for name in stored if name.endswith(".bias")) or sorted(stored)
        raise QuantizeError(
            f"{file}: has {len(stored)} tensors, of which the model that transformers makes has "
            f"{kept}, for example not {suspects[0]}; give the model in the format of Hugging Face"
        )
    return model

"""A folder of Hugging Face in bf16 made of a GGUF file, once: what `quantize` reads then.

transformers reads the tensors. What it would lose is looked for: RoPE scaling (`rope`), tensors
that its model does not have, and the tokenizer (`tokenizer`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from sys import stderr
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from vllm_qoq.checkpoint.folder import GGUF
from vllm_qoq.checkpoint.format import SECTION
from vllm_qoq.errors import reason, shown
from vllm_qoq.models.config import CONFIG
from vllm_qoq.models.tensors import HEAD
from vllm_qoq.progress import human_bytes
from vllm_qoq.quantizer import QuantizeError, noise

if TYPE_CHECKING:
    from vllm_qoq.quantizer.gguf_source.header import Header

SOURCE = ".gguf_source.json"
"""The file of a converted folder that says what it was made of; hidden ones are not copied."""

_UNUSED_KEYS = (SECTION, "_name_or_path", "_model_name_or_path")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_BYTES = 2  # of a weight in bf16
_PART_BYTES = 1 << 20
# Keys of the file that change what a layer computes, and what the models here do without them.
_UNSUPPORTED = (
    *("expert_count", "attention.sliding_window", "attention.clamp_kqv", "attention.scale"),
    *("logit_scale", "attn_logit_softcapping", "final_logit_softcapping"),
    *("embedding_scale", "residual_scale"),
)
_PART, _LOCK = ".part", ".gguf_conversion.lock"


def gguf_file(model: Path) -> Path | None:
    """Find the GGUF file that `model` is, or that it has in the place of other weights.

    Raises QuantizeError for a folder with several.
    """
    if model.is_file() and is_gguf(model):
        return model
    if not model.is_dir() or any(model.glob("*.safetensors")):
        return None
    found = sorted(path for path in model.iterdir() if is_gguf(path))
    if len(found) > 1:
        raise QuantizeError(
            f"{model}: has {len(found)} GGUF files, {found[0].name} and others; give one of them "
            "(parts of one model have to be joined: llama-gguf-split --merge)"
        )
    return found[0] if found else None


def is_gguf(path: Path) -> bool:
    """Whether a path has the name of a GGUF file."""
    return path.suffix.lower() == GGUF


def source_of(folder: Path) -> dict[str, Any] | None:
    """Read what a converted folder was made of; None for any other folder."""
    file = folder / SOURCE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        found = error
    if not (isinstance(found, dict) and isinstance(found.get("types"), dict)):
        raise QuantizeError(
            f"{file}: damaged; remove {folder}, which is converted again, or choose another "
            "--output"
        )
    return found


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

    beside = _tokenizer_beside(file)
    present = source_of(folder)
    if present is not None and _is_made_of(present, file, beside):
        return
    if folder.exists():
        raise QuantizeError(
            f"{folder}: is there already and was not made of {file} and the tokenizer beside it as "
            "they are now; move it, or choose another --output"
        )
    noise.hide_bars()
    header = read_header(file)
    _check(header)
    if not beside:
        check_tokenizer(header)
    if not quiet:
        size = human_bytes(header.parameters * _BYTES)
        print(f"converting {file.name} into {folder} ({size} in bf16)", file=stderr, flush=True)
    source = _identity(file, beside) | {
        "types": header.types,
        "license": header.text_of("general.license"),
    }
    with _part_of(folder) as part:
        with redirect_stdout(stderr):
            _write(header, part, beside)
        (part / SOURCE).write_text(json.dumps(source, indent=2) + "\n")
        (part / _LOCK).unlink()
        part.rename(folder)


def _identity(file: Path, beside: list[Path]) -> dict[str, Any]:
    """Describe the content of a GGUF file, which is read as a whole, and of a tokenizer."""
    stat = file.stat()
    return {
        "file": file.name,
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": _sha256(file),
        "tokenizer": {path.name: _sha256(path) for path in beside},
    }


def _is_made_of(present: Mapping[str, Any], file: Path, beside: list[Path]) -> bool:
    """Whether a folder was made of these files; time alone makes no file another one."""
    stat = file.stat()
    if (present.get("file"), present.get("bytes")) != (file.name, stat.st_size):
        return False
    if present.get("tokenizer") != {path.name: _sha256(path) for path in beside}:
        return False
    # The time spares reading the file again where it is as it was.
    return present.get("mtime_ns") == stat.st_mtime_ns or present.get("sha256") == _sha256(file)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(_PART_BYTES):
            digest.update(part)
    return digest.hexdigest()


def _tokenizer_beside(file: Path) -> list[Path]:
    """Find the tokenizer of the original model beside a GGUF file: both of its files, or none."""
    found = [path for name in _TOKENIZER_FILES if (path := file.parent / name).is_file()]
    if len(found) == 1:
        (missing,) = {*_TOKENIZER_FILES} - {found[0].name}
        raise QuantizeError(
            f"{found[0]}: is beside {file.name} without {missing}; put both there, or none"
        )
    return found


@contextmanager
def _part_of(folder: Path) -> Iterator[Path]:
    """Make the folder in which `folder` is made, which is gone in the end.

    Raises QuantizeError where somebody else has one of that name, or another run works in it.
    """
    part = folder.with_name(folder.name + _PART)
    lock = part / _LOCK
    if part.exists() and not lock.is_file():
        raise QuantizeError(
            f"{part}: is there already and is not ours; move it, or choose another --output"
        )
    part.mkdir(exist_ok=True)
    with lock.open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise QuantizeError(
                f"{part}: another run converts the model there; wait for it, or choose another "
                "--output"
            ) from error
        for path in part.iterdir():  # what a run has left that was killed
            if path.name != _LOCK:
                path.unlink()
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _check(header: Header) -> None:
    """Raise QuantizeError for a model that is not converted as it is."""
    from vllm_qoq.quantizer.gguf_source.sizes import check_sizes

    if header.architecture not in _ARCHITECTURES:
        raise QuantizeError(
            f"{header.path}: general.architecture: {shown(header.architecture)} is not supported; "
            f"supported are {', '.join(_ARCHITECTURES)}"
        )
    for key in _UNSUPPORTED:
        if header.of_model(key):
            raise QuantizeError(
                f"{header.path}: {header.architecture}.{key}: {shown(header.of_model(key))} would "
                "be lost; give the model in the format of Hugging Face"
            )
    check_sizes(header)


def _write(header: Header, folder: Path, beside: list[Path]) -> None:
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
        tokenizer = None if beside else load_tokenizer(header, file)
    except (KeyboardInterrupt, SystemExit, MemoryError, QuantizeError):
        raise
    except Exception as error:  # whatever transformers raises at a stranger's file
        raise QuantizeError(
            f"{file}: transformers cannot read it: {reason(error)}; give the model in the format "
            "of Hugging Face"
        ) from error
    try:
        _save(model, folder)
        for path in beside:
            shutil.copyfile(path, folder / path.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise QuantizeError(f"{folder}: cannot be written: {reason(error)}") from error


def _save(model: Any, folder: Path) -> None:
    """Write the model as `save_pretrained` would, which refuses one that came from GGUF."""
    from huggingface_hub import save_torch_state_dict

    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors[HEAD]
    save_torch_state_dict(tensors, folder)
    values = model.config.to_diff_dict()
    values = {key: value for key, value in values.items() if key not in _UNUSED_KEYS}
    values |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    for weights in folder.glob("*.safetensors"):  # which safetensors lets only its user read
        shutil.copymode(folder / CONFIG, weights)
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

"""Opening of the files of an import. Nothing in them is executed.

Pickles are loaded with `weights_only=True`: PyTorch then builds tensors and plain
containers and refuses everything else. Tensors of all files are mapped, not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_qoq.checkpoint.folder import (
    INDEX,
    ITEM_BYTES,
    Checkpoint,
    TensorInfo,
    check_link,
    weight_files,
)
from vllm_qoq.errors import FormatError

RAW_MODEL, RAW_SCALES = "model.pt", "scale.pt"
# The first of these patterns that matches has the weights. QServe writes pytorch_model.bin,
# the converter of deepcompressor quant_model.pt.
_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "quant_model.pt")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Source:
    """The tensors of some files of one folder; `tensors` describes them, `get` maps one."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors

    def get(self, name: str) -> torch.Tensor:
        """Map the tensor `name` as stored. Do not write to it."""
        raise NotImplementedError


class _Safetensors(Source):
    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
        super().__init__(tensors)
        self._files = Checkpoint(folder, {}, dict(tensors))

    def get(self, name: str) -> torch.Tensor:
        return self._files.get(name)


class _Pickled(Source):
    def __init__(
        self, tensors: Mapping[str, TensorInfo], loaded: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__(tensors)
        self._loaded = loaded

    def get(self, name: str) -> torch.Tensor:
        return self._loaded[name].detach()


def is_raw(folder: Path) -> bool:
    """Whether `folder` holds raw outputs of deepcompressor (or LMQuant), not a packed model."""
    if not folder.is_dir():
        raise FormatError(f"{folder}: not a folder; give the folder of a QServe checkpoint")
    return (folder / RAW_MODEL).exists() or (folder / RAW_SCALES).exists()


def open_packed(folder: Path) -> Source:
    """Open a packed checkpoint."""
    if any((folder / name).exists() for name in (INDEX, "model.safetensors")):
        # In Hugging Face's format, a folder says which of its files hold the model.
        return _open_safetensors(folder, [folder / file for file in weight_files(folder)])
    for pattern in _PATTERNS:
        if files := sorted(folder.glob(pattern)):
            is_pickled = pattern != _PATTERNS[0]
            return _open_pickles(files) if is_pickled else _open_safetensors(folder, files)
    raise FormatError(
        f"{folder}: has no {', '.join(_PATTERNS)}, nor {RAW_MODEL} and {RAW_SCALES}; "
        "give the folder with the weights"
    )


def open_raw(folder: Path) -> tuple[Source, Source]:
    """Open `model.pt` and `scale.pt`, in this order."""
    return _open_pickles([folder / RAW_MODEL]), _open_pickles([folder / RAW_SCALES])


def _open_safetensors(folder: Path, files: list[Path]) -> Source:
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        _require_regular(path)
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    header = file.get_slice(name)
                    info = TensorInfo(
                        name, header.get_dtype(), tuple(header.get_shape()), path.name
                    )
                    _add(tensors, info)
        except (SafetensorError, OSError) as error:
            raise FormatError(
                f"{path.name}: {error}; the file is damaged or cut off, download it again"
            ) from None
    return _Safetensors(folder, tensors)


def _open_pickles(files: list[Path]) -> Source:
    tensors: dict[str, TensorInfo] = {}
    loaded: dict[str, torch.Tensor] = {}
    for path in files:
        for name, tensor in _load(path).items():
            if not isinstance(name, str):
                raise FormatError(f"{path.name}: {name!r}: is not the name of a tensor")
            if path.name == RAW_SCALES and _is_no_zero_point(name, tensor):
                continue
            if not _is_plain(tensor):
                raise FormatError(
                    f"{path.name}: {name}: is not a plain tensor; save a dict of tensors again"
                )
            dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype))
            _add(tensors, TensorInfo(name, dtype, tuple(tensor.shape), path.name))
            loaded[name] = tensor
    return _Pickled(tensors, loaded)


def _load(path: Path) -> Mapping[str, Any]:
    _require_regular(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        if error.filename is not None:
            raise
        # The mapping failed, as it does for an empty file.
        raise FormatError(
            f"{path.name}: {error.strerror or error}; the file is damaged or cut off, download it "
            "again"
        ) from None
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise FormatError(
            f"{path.name}: needs more than tensors{what}, which could run code, so it was not "
            "loaded and nothing in it was run; do not use this file unless you know why"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        first = (str(error).splitlines() or [""])[0]
        raise FormatError(
            f"{path.name}: {first}; the file is damaged, cut off or older than PyTorch 1.6, "
            "download it again"
        ) from None
    if not isinstance(content, Mapping):
        raise FormatError(f"{path.name}: holds no dict of tensors; give the state dict of a model")
    return content


def _is_no_zero_point(name: str, value: object) -> bool:
    # deepcompressor stores None or a number for weights without a zero point.
    if not name.endswith("zero"):
        return False
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and _is_plain(value) and value.item() == 0
    return value is None or (isinstance(value, (int, float)) and value == 0)


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _add(tensors: dict[str, TensorInfo], info: TensorInfo) -> None:
    if info.dtype not in ITEM_BYTES:
        raise FormatError(f"{info.file}: {info.name}: dtype {info.dtype} is not supported")
    if info.name in tensors:
        raise FormatError(
            f"{info.file}: {info.name}: is also in {tensors[info.name].file}; remove the file "
            "that is not part of this checkpoint"
        )
    tensors[info.name] = info


def _require_regular(path: Path) -> None:
    check_link(path.parent, path)
    if not path.exists():
        raise FormatError(f"{path.name}: missing from {path.parent}; copy it there")
    if not path.is_file():
        raise FormatError(f"{path.name}: not a regular file; replace it with the real file")

"""Opening a Hugging Face folder that nobody vouches for.

Nothing is unpickled, imported or executed, and nothing outside the folder is
opened because a file in it says so: entries of the index are base names of
`*.safetensors` files. Only regular files are read (a FIFO would hang), through
symbolic links too, because a snapshot in the Hugging Face cache is made of them.

Tensors are described from the headers at `open` and read on demand, memory-mapped,
one file at a time. Headers are parsed by the safetensors library alone, which
guarantees that the tensors of a file lie within it and do not overlap.

Every error is a FormatError `FILE: TENSOR or KEY: what is wrong; remedy`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from vllm_qoq.format import QUANT_METHOD, SECTION, FormatError, Section

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
"""Bytes per element of every dtype that a checkpoint may have, by safetensors' name."""

_CONFIG_BYTES = 16 << 20
_INDEX_BYTES = 256 << 20
_JSON_DEPTH = 64


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header of `file` (a base name) says of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Checkpoint:
    """The config and the tensors of one folder. `open` makes it."""

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.config = config
        self.tensors = tensors
        self._open_file: tuple[str, Any] | None = None

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read `config.json`, the index and every header of the folder `path`."""
        path = Path(path)
        config = read_config(path)
        weight_map = _read_index(path)
        files = sorted(set(weight_map.values())) if weight_map else _weight_files(path)
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for info in _read_header(path / file):
                if info.name in tensors:
                    other = tensors[info.name].file
                    raise FormatError(
                        f"{file}: {info.name}: is also in {other}; remove the shard that is not "
                        "part of this checkpoint"
                    )
                tensors[info.name] = info
        if weight_map is not None:
            _check_index(weight_map, tensors)
        return cls(path, config, tensors)

    @property
    def section(self) -> Section | None:
        """The vllm-qoq section of the config, or None for any other checkpoint."""
        section = self.config.get(SECTION)
        if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
            return None
        try:
            return Section.parse(section)
        except FormatError as error:
            raise FormatError(f"{CONFIG}: {error}") from None

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def get(self, name: str) -> torch.Tensor:
        """The tensor `name` as stored, mapped from the file and not copied. Do not write to it."""
        info = self._info(name)
        try:
            return self._handle(info.file).get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise FormatError(f"{info.file}: {name}: {error}") from None

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise FormatError(f"{self.path}: {name}: no such tensor")
        return self.tensors[name]

    def _handle(self, file: str) -> Any:
        # One mapping at a time: the address space of a process may be limited,
        # and a model may have hundreds of shards. Tensors keep their own mapping.
        if self._open_file is None or self._open_file[0] != file:
            self._open_file = None
            self._open_file = (file, safe_open(self.path / file, framework="pt"))
        return self._open_file[1]


def read_config(path: Path) -> dict[str, Any]:
    """The `config.json` of the folder `path`."""
    if not path.is_dir():
        raise FormatError(f"{path}: not a folder; give the folder of a Hugging Face checkpoint")
    return read_json(path / CONFIG, _CONFIG_BYTES)


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in the regular file `path` of at most `limit` bytes."""
    _require_regular(path)
    if path.stat().st_size > limit:
        raise FormatError(f"{path.name}: is larger than {limit} bytes; not what its name says")
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise FormatError(f"{path.name}: is nested too deeply") from None
    except ValueError as error:  # also bad UTF-8 and integers of thousands of digits
        raise FormatError(f"{path.name}: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path.name}: is not a JSON object")
    if _depth_exceeds(value, _JSON_DEPTH):
        raise FormatError(f"{path.name}: is nested more than {_JSON_DEPTH} levels deep")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Parsers differ in which of two equal keys they keep, so nobody gets to choose.
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise FormatError(f"{twice}: the key occurs twice")
    return values


def _depth_exceeds(value: Any, limit: int) -> bool:
    if limit == 0:
        return True
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and any(_depth_exceeds(item, limit - 1) for item in value)


def _require_regular(path: Path) -> None:
    if not path.exists():
        raise FormatError(f"{path.name}: missing from {path.parent}; download the folder again")
    if not path.is_file():
        raise FormatError(f"{path.name}: not a regular file; replace it with the real file")


def _read_index(path: Path) -> dict[str, str] | None:
    """The weight map (tensor name to file name) of the index; None without an index."""
    index = path / INDEX
    if not index.exists() and not index.is_symlink():
        return None
    weight_map = read_json(index, _INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{INDEX}: weight_map: missing or empty; download the index again")
    for name, file in weight_map.items():
        if not _is_weight_file_name(file):
            raise FormatError(
                f"{INDEX}: {name}: {file!r} is not the name of a .safetensors file in the folder; "
                "do not use this checkpoint unless you know why"
            )
    return weight_map


def _is_weight_file_name(file: object) -> bool:
    # A backslash separates folders on Windows; a NUL byte ends the name early for C.
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and not any(c in file for c in "/\\\0")
    )


def _weight_files(path: Path) -> list[str]:
    files = sorted(item.name for item in path.iterdir() if item.name.endswith(".safetensors"))
    if files:
        return files
    pickles = sorted(item.name for item in path.iterdir() if item.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise FormatError(
            f"{pickles[0]}: pickle files can run code and are not read; convert the checkpoint to "
            "safetensors (transformers: save_pretrained) on a machine that may run it"
        )
    raise FormatError(f"{path}: has no .safetensors file; download the weights")


def _read_header(path: Path) -> Iterator[TensorInfo]:
    _require_regular(path)
    try:
        # "numpy" only so that reading headers does not import torch.
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_slice(name)
                dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                if dtype not in ITEM_BYTES:
                    raise FormatError(f"{path.name}: {name}: dtype {dtype} is not supported")
                yield TensorInfo(name, dtype, shape, path.name)
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path.name}: {error}; the file is damaged or cut off, download it again"
        ) from None


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise FormatError(f"{file}: {name}: the index puts it here, the file lacks it")
    for name, info in tensors.items():
        if name not in weight_map:
            raise FormatError(f"{info.file}: {name}: the index does not list it")

"""Opening a Hugging Face folder that nobody vouches for.

Nothing is unpickled, imported or executed, and nothing outside the folder is
opened because a file in it says so: entries of the index are base names of
`*.safetensors` files. Only regular files are read (a FIFO would hang), through
symbolic links too, because a snapshot in the Hugging Face cache is made of them.
What is copied into an output is held to more: `side_files` and `Checkpoint.check_links`
refuse a link that leaves the folder for anything but that cache.

Which files hold the weights is decided by `weights_entry` alone:

    1. `model.safetensors.index.json`, where there is one: the files that it names;
    2. else `model.safetensors`;
    3. else the only `*.safetensors` file, whatever its name (AutoGPTQ chose its own).

Adapters (`adapter_*`) and Mistral's own format (`consolidated*`) do not count, and nothing
else is read. Pickles never are.

Tensors are described from the headers at `open` and read on demand, memory-mapped,
one file at a time. Headers are parsed by the safetensors library alone, which
guarantees that the tensors of a file lie within it and do not overlap.

Every error is a FormatError `FILE: TENSOR or KEY: what is wrong; remedy`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from vllm_qoq.checkpoint.format import QUANT_METHOD, SECTION, KVSection, Section
from vllm_qoq.errors import FormatError, shown
from vllm_qoq.models.config import CONFIG

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
"""Bytes per element of every dtype that a checkpoint may have, by safetensors' name."""

CODE_KEYS = frozenset({"auto_map", "transformers_weights"})
"""Keys of a config.json that name code or weights beside it, and do not go into an output."""

NO_SIDE_FILES = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5"),
    *(".msgpack", ".onnx", ".onnx_data", ".ot", ".npy", ".npz", ".pkl", ".pickle", ".joblib"),
)
"""Ends of the names of weights, of pickles, and of what only describes either."""

GGUF = ".gguf"
"""The end of the name of a file in GGUF, in small letters."""

_CONFIG_BYTES = 16 << 20
_INDEX_BYTES = 32 << 20
_JSON_DEPTH = 64
_JSON_REMEDY = "mend the file, or download or write it again"
_MOST_TENSORS = 1 << 19
_LONGEST_NAME = 512
_MOST_OPEN = 2

_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./+-]+))?")
_OTHER_WEIGHTS = ("consolidated", "adapter_")
_SHARD = re.compile(r".*-\d+-of-(\d+)\.safetensors")
_ABOUT_WEIGHTS = frozenset(
    {
        *("adapter_config.json", "params.json"),
        *("quantize_config.json", "quant_config.json", "hf_quant_config.json"),
    }
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header of `file`, a base name, describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Checkpoint:
    """The config and the tensors of one folder, as `open` finds them."""

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.config = config
        self.tensors = tensors
        self._open_files: dict[str, safe_open] = {}

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read `config.json`, the index and every header of the folder `path`."""
        path = Path(path)
        config = read_config(path)
        weight_map = _read_index(path) if weights_entry(path) == INDEX else None
        files = sorted(set(weight_map.values())) if weight_map else [weights_entry(path)]
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for info in read_header(path / file):
                if len(tensors) == _MOST_TENSORS:
                    raise FormatError(
                        f"{file}: has more than {_MOST_TENSORS} tensors with the files before it; "
                        "not a model that can be served"
                    )
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
    def section(self) -> Section | KVSection | None:
        """The vllm-qoq section of the config, or None for any other checkpoint."""
        section = self.config.get(SECTION)
        if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
            return None
        has_sets = "sets" in section or "kv_cache" not in section
        try:
            return Section.parse(section) if has_sets else KVSection.parse(section)
        except FormatError as error:
            raise FormatError(f"{CONFIG}: {error}") from None

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def check_links(self) -> None:
        """Raise FormatError if config.json or a weight file is a link that leaves the folder."""
        for file in (CONFIG, INDEX, *sorted({info.file for info in self.tensors.values()})):
            check_link(self.path, self.path / file)

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

    def _handle(self, file: str) -> safe_open:
        # Only two files are mapped at a time: the address space of a process may be limited,
        # and a model may have hundreds of shards. Layers of a nested set are read from its files
        # and its base's in turn. Tensors keep their own mapping.
        if file in self._open_files:
            self._open_files[file] = self._open_files.pop(file)  # the last one that was read
        else:
            while len(self._open_files) >= _MOST_OPEN:
                del self._open_files[next(iter(self._open_files))]
            self._open_files[file] = safe_open(self.path / file, framework="pt")
        return self._open_files[file]


def read_config(path: Path) -> dict[str, Any]:
    """Read the `config.json` of the folder `path`; a `quantization_config` of null is left out."""
    require_folder(path)
    config = read_json(path / CONFIG, _CONFIG_BYTES)
    if SECTION in config and config[SECTION] is None:
        del config[SECTION]
    return config


@contextmanager
def error_context(folder: Path) -> Iterator[None]:
    """Put the folder in front of what a FormatError says, for commands that read several."""
    try:
        yield
    except FormatError as error:
        if str(error).startswith((f"{folder}: ", f"{folder}/")):
            raise
        raise FormatError(f"{folder}: {error}") from None


def require_folder(path: Path) -> None:
    """Raise FormatError unless `path` is a folder, of a model that is not in GGUF alone."""
    if (gguf := _gguf_in(path)) is not None:
        raise FormatError(
            f"{gguf}: is GGUF, of which `vllm-qoq quantize {path} -o OUT` makes a checkpoint; give "
            "that"
        )
    if path.is_dir():
        return
    if path.exists():
        raise FormatError(f"{path}: not a folder; give the folder that has {CONFIG} in it")
    if (named := _HUB_NAME.fullmatch(str(path))) and not path.parent.exists():
        repository, revision = named.groups()
        folder = repository.partition("/")[2]
        of_revision = f" --revision {revision}" if revision is not None else ""
        raise FormatError(
            f"{path}: not a folder; if you mean the model of that name on the Hugging Face Hub, "
            f"run `hf download {repository}{of_revision} --local-dir {folder}` and give {folder}"
        )
    raise FormatError(
        f"{path}: not a folder, nothing is there; give the folder of a Hugging Face checkpoint"
    )


def _gguf_in(path: Path) -> Path | None:
    """Find the GGUF file that `path` is, or that a folder has in the place of a config.json."""
    if path.is_file():
        return path if path.suffix.lower() == GGUF else None
    if not path.is_dir() or (path / CONFIG).exists():
        return None
    return min((item for item in path.iterdir() if item.suffix.lower() == GGUF), default=None)


def weights_entry(path: Path) -> str:
    """Name the file in the folder `path` that says where the weights are: index or weights.

    The rule stands at the top of this module. Raises FormatError where it finds nothing.
    """
    return weights_among([item.name for item in path.iterdir()], str(path))


def weights_among(names: Iterable[str], place: str) -> str:
    """Name the one of `names`, the files in `place`, that says where the weights are.

    The names may be those of a repository, of which nothing is here yet: paths with a `/`, in a
    sub-folder, are passed over.
    """
    names = sorted(name for name in names if "/" not in name)
    for name in (INDEX, "model.safetensors"):
        if name in names:
            return name
    found = [name for name in names if name.endswith(".safetensors")]
    files = [name for name in found if not name.startswith(_OTHER_WEIGHTS)]
    shard = _SHARD.fullmatch(files[0]) if files else None
    if len(files) > 1 or (shard and int(shard[1]) > 1):
        raise FormatError(
            f"{files[0]}: is one of several files, and {INDEX}, which lists them, is missing; "
            "download it"
        )
    if files:
        return files[0]
    if found:
        raise FormatError(
            f"{found[0]}: holds no whole model in the format of Hugging Face; give the folder "
            "with model.safetensors, or its shards and their index"
        )
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        raise FormatError(
            f"{pickles[0]}: pickle files can run code and are not read; convert the checkpoint to "
            "safetensors (transformers: save_pretrained) on a machine that may run it"
        )
    raise FormatError(
        f"{place}: has no .safetensors file; give a model that has its weights in some"
    )


def weight_files(path: Path) -> list[str]:
    """List the names of the files in the folder `path` that hold its weights."""
    entry = weights_entry(path)
    return sorted(set(_read_index(path).values())) if entry == INDEX else [entry]


def side_files(folder: Path) -> list[Path]:
    """List the files of a model beside config.json and weights: sorted paths relative to `folder`.

    They are tokenizer, chat templates, generation config, licence and the like, in sub-folders
    too. Not among them are README.md, which every tool writes anew; hidden files; code (`*.py`),
    which nobody here runs; what is no regular file; what describes how weights are stored; and
    sub-folders with weights of their own (`original/`, `onnx/`, states of a training).

    Raises FormatError for a symbolic link that leads nowhere, or out of the folder and not to the
    blobs of the Hugging Face cache in which the folder is a snapshot.
    """
    return sorted(_side_files(folder, folder))


def _side_files(folder: Path, where: Path) -> Iterator[Path]:
    for item in where.iterdir():
        name = item.name
        if name.startswith((".", "__")) or name.endswith((*NO_SIDE_FILES, ".py")):
            continue
        if where == folder and name in (CONFIG, "README.md", *_ABOUT_WEIGHTS):
            continue
        check_link(folder, item)
        if item.is_file():
            yield item.relative_to(folder)
        elif item.is_dir() and not item.is_symlink() and not _has_weights(item):
            yield from _side_files(folder, item)


def _has_weights(folder: Path) -> bool:
    names = (name for _, _, files in os.walk(folder) for name in files)
    return any(name.endswith(NO_SIDE_FILES) for name in names)


def check_link(folder: Path, item: Path) -> None:
    """Raise FormatError if `item` of `folder` is a symbolic link that leaves the folder.

    A snapshot in the Hugging Face cache may link to the blobs there.
    """
    if not item.is_symlink():
        return
    name = item.relative_to(folder)
    root, target = folder.resolve(), _target(item)
    if target is None:
        raise FormatError(f"{name}: is a symbolic link to nothing; replace it with the real file")
    if root in target.parents or any(blobs in target.parents for blobs in _blobs(root)):
        return
    raise FormatError(
        f"{name}: is a symbolic link to {target}, outside of {folder}; if that file belongs to "
        "the model, replace the link with it, else remove the link"
    )


def _blobs(root: Path) -> Iterator[Path]:
    """Find where the Hugging Face cache keeps the files of a snapshot, if `root` is in one.

    A file there is a link: models--ORG--NAME/snapshots/COMMIT/config.json -> ../../blobs/HASH

    No more than these blobs is allowed: they hold what was downloaded of this one repository, so a
    link to them cannot bring in a file of the user. A repository cannot make such a link itself:
    the Hub client writes regular files into blobs, and makes all links.
    """
    for snapshots in root.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            yield snapshots.parent / "blobs"


def _target(link: Path) -> Path | None:
    """Follow a link to its end; None where there is nothing, or a circle."""
    try:
        return link.resolve(strict=True)
    except (OSError, RuntimeError):  # Python 3.10 to 3.12 tell of a circle by RuntimeError
        return None


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """Read the JSON object in the regular file `path` of at most `limit` bytes."""
    _require_regular(path)
    if path.stat().st_size > limit:
        raise FormatError(
            f"{path.name}: is larger than {limit} bytes, so it is not what its name says; "
            f"{_JSON_REMEDY}"
        )
    try:
        # vLLM and transformers refuse UTF-16 and a byte order mark, too.
        value = json.loads(path.read_bytes().decode(), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise FormatError(f"{path.name}: is nested too deeply; {_JSON_REMEDY}") from None
    except FormatError as error:
        raise FormatError(f"{path.name}: {error}; {_JSON_REMEDY}") from None
    except ValueError as error:  # also bad UTF-8 and integers of thousands of digits
        raise FormatError(f"{path.name}: is not JSON: {error}; {_JSON_REMEDY}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path.name}: is not a JSON object, {{...}}; {_JSON_REMEDY}")
    if _depth_exceeds(value, _JSON_DEPTH):
        raise FormatError(
            f"{path.name}: is nested more than {_JSON_DEPTH} levels deep; {_JSON_REMEDY}"
        )
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Parsers differ in which of two equal keys they keep, so nobody gets to choose.
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise FormatError(f"{shown(twice)}: the key occurs twice")
    return values


def _depth_exceeds(value: object, limit: int) -> bool:
    if limit == 0:
        return True
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and any(_depth_exceeds(item, limit - 1) for item in value)


def _require_regular(path: Path) -> None:
    if not path.exists():
        raise FormatError(f"{path.name}: missing from {path.parent}; put the file there")
    if not path.is_file():
        raise FormatError(f"{path.name}: not a regular file; replace it with the real file")


def _read_index(path: Path) -> dict[str, str]:
    """Read the weight map of the index: tensor name -> file name."""
    weight_map = read_json(path / INDEX, _INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{INDEX}: weight_map: missing or empty; download the index again")
    for name, file in weight_map.items():
        if not _is_weight_file_name(file):
            raise FormatError(
                f"{INDEX}: {shown(name)}: {shown(file)} is not the name of a .safetensors file in "
                "the folder; do not use this checkpoint unless you know why"
            )
    return weight_map


def _is_weight_file_name(file: object) -> bool:
    # A backslash separates folders on Windows; a NUL byte ends the name early for C.
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and not any(c in file for c in "/\\\0")
    )


def read_header(path: Path) -> Iterator[TensorInfo]:
    _require_regular(path)
    try:
        # The framework is numpy only so that reading headers does not import torch.
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if len(name) > _LONGEST_NAME:
                    raise FormatError(
                        f"{path.name}: {name[:60]}...: a name of {len(name)} characters, more than "
                        f"{_LONGEST_NAME}; not a file of a model"
                    )
                tensor = file.get_slice(name)
                dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                if dtype not in ITEM_BYTES:
                    raise FormatError(
                        f"{path.name}: {name}: dtype {dtype} is not supported; "
                        f"supported are {', '.join(ITEM_BYTES)}"
                    )
                yield TensorInfo(name, dtype, shape, path.name)
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path.name}: {error}; the file is damaged or cut off, download it again"
        ) from None


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise FormatError(
                f"{file}: {name}: the index puts it here, the file lacks it; download both again"
            )
    for name, info in tensors.items():
        if name not in weight_map:
            raise FormatError(
                f"{info.file}: {name}: the index does not list it; download both again"
            )

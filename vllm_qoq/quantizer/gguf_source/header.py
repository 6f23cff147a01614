"""The header of a GGUF file: its keys, and name, type, shape and place of each tensor.

Libraries that read GGUF trust its numbers: a count of 2^60 elements makes them work for ever. This
reads every number within the bounds of the file first, and refuses what cannot be.

Source: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vllm_qoq.errors import shown
from vllm_qoq.quantizer import QuantizeError

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Type of a value -> its format in `struct`.
_SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}
_MOST_KEYS, _MOST_TENSORS, _MOST_ELEMENTS = 1 << 16, 1 << 16, 1 << 22
_LONGEST_NAME, _LONGEST_TEXT, _MOST_DIMENSIONS = 256, 1 << 20, 4
_ALIGNMENT = 32  # where the file does not say


class Array(NamedTuple):
    """An array among the keys, which is not read: how many elements, and whether they are texts."""

    length: int
    has_texts: bool


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file.

    type   the type in which ggml stores it: "F32", "Q4_1"
    shape  in the order of torch
    start  byte of the file at which it begins
    """

    type: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself; `keys` that are arrays are an `Array`."""

    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """The architecture by the name of llama.cpp."""
        return str(self.keys.get("general.architecture"))

    def of_model(self, key: str) -> Any:
        """The value of a key of the architecture, such as "rope.freq_base"; None without it."""
        return self.keys.get(f"{self.architecture}.{key}")

    def text_of(self, key: str) -> str | None:
        """The value of a key that is a text; None without it."""
        value = self.keys.get(key)
        return value if isinstance(value, str) else None

    @property
    def types(self) -> dict[str, int]:
        """Count the tensors of each type, the most frequent first."""
        return dict(Counter(tensor.type for tensor in self.tensors.values()).most_common())

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file; QuantizeError names what cannot be.

    Needs the package gguf for the sizes of ggml's types.
    """
    try:
        if not path.stat().st_size:
            raise ValueError("it is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except (ValueError, OSError) as error:  # an unreadable file, too
        raise QuantizeError(
            f"{path}: not a GGUF file that can be read: {error}; download it again"
        ) from None


class _Reader:
    """A reader of the header, whose place in the file moves on; ValueError for what cannot be."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._place = path, data, 0

    def header(self) -> Header:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._place = 4
        version = self._number("<I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, not one of {', '.join(map(str, _VERSIONS))}")
        tensors = self._count("tensors", _MOST_TENSORS)
        keys = dict(self._key() for _ in range(self._count("keys", _MOST_KEYS)))
        entries = [self._tensor() for _ in range(tensors)]
        alignment = keys.get("general.alignment", _ALIGNMENT)
        if (
            not isinstance(alignment, int)
            or isinstance(alignment, bool)
            or not 1 <= alignment <= 1 << 16
        ):
            raise ValueError(f"general.alignment: {shown(alignment)} cannot be")
        start = -(-self._place // alignment) * alignment
        return Header(self._path, keys, self._placed(entries, start))

    def _placed(
        self, entries: list[tuple[str, int, tuple[int, ...], int]], start: int
    ) -> dict[str, StoredTensor]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        tensors: dict[str, StoredTensor] = {}
        for name, number, shape, offset in entries:
            if name in tensors:
                raise ValueError(f"{shown(name)}: occurs twice")
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                raise ValueError(f"{shown(name)}: type {number} is not known") from None
            block, size = GGML_QUANT_SIZES[kind]
            count = math.prod(shape)
            if (
                not count
                or shape[-1] % block
                or start + offset + count // block * size > len(self._data)
            ):
                raise ValueError(f"{shown(name)}: {kind.name} {list(shape)} leaves the file")
            tensors[name] = StoredTensor(kind.name, shape, start + offset)
        return tensors

    def _key(self) -> tuple[str, Any]:
        key = self._text(_LONGEST_NAME)
        kind = self._number("<I")
        if kind == _STRING:
            return key, self._text(_LONGEST_TEXT)
        if kind != _ARRAY:
            return key, self._number(self._format(key, kind))
        element = self._number("<I")
        count = self._count(shown(key), _MOST_ELEMENTS)
        if element == _STRING:
            for _ in range(count):
                self._skip(self._number("<Q"))
        else:
            self._skip(count * struct.calcsize(self._format(key, element)))
        return key, Array(count, element == _STRING)

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._text(_LONGEST_NAME)
        dimensions = self._number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{shown(name)}: {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))
        kind, offset = self._number("<I"), self._number("<Q")
        return name, kind, shape[::-1], offset

    def _format(self, key: str, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"{shown(key)}: type {kind} of a value is not known")
        return _SCALARS[kind]

    def _number(self, form: str) -> Any:
        begin = self._place
        self._skip(struct.calcsize(form))
        (value,) = struct.unpack_from(form, self._data, begin)
        return value

    def _count(self, what: str, most: int) -> int:
        count = int(self._number("<Q"))
        if count > most:
            raise ValueError(f"{what}: {count}, more than {most}")
        return count

    def _text(self, most: int) -> str:
        length = int(self._number("<Q"))
        if length > most:
            raise ValueError(f"a text of {length} bytes at byte {self._place}, more than {most}")
        begin = self._place
        self._skip(length)
        try:
            return bytes(self._data[begin : self._place]).decode()
        except UnicodeDecodeError:
            raise ValueError(f"a text at byte {begin} is not UTF-8") from None

    def _skip(self, length: int) -> None:
        self._place += length
        if self._place > len(self._data):
            raise ValueError(f"it is cut off: it has {len(self._data)} bytes, and its header more")

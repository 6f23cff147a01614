"""The samples of a shard, one after the other, from a tar file that nobody vouches for.

Which files are one sample, and what its key is, decides the webdataset library. The members are
read here, because the library reads each into memory whatever its size, and takes a damaged header
for the end. Names are keys and nothing else: no file is opened by one. Nothing is decompressed.
"""

from __future__ import annotations

import errno
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal

from vllm_qoq.caption.errors import Uncaptioned
from vllm_qoq.errors import reason

MOST_BYTES = 64 << 20
"""The largest file of an image that is read."""

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
"""Endings of files that are taken for a sample's image, in small letters."""

# All headers of a member, which are read whole and take up to 20 times as much as objects; real
# ones have some hundred bytes.
_HEADER_BYTES = 1 << 20
_GLOBAL_HEADERS = 64  # which stay for all members that follow
_MOST_FILES = 1000  # of a sample, which are kept until it ends
_END = bytes(tarfile.BLOCKSIZE)

StrayKind = Literal["no_key", "repeated"]
"""Why an image is of no sample: its name gives no key, or the sample has one of the name."""


@dataclass(frozen=True)
class Member:
    """A regular file in a shard: its name and the place of its bytes.

    is_whole  whether the shard has all of them
    """

    name: str
    offset: int
    bytes: int
    is_whole: bool


@dataclass(frozen=True)
class Stray:
    """An image that is of no sample: its name, and the key that the name gives, if any."""

    kind: StrayKind
    name: str
    key: str | None


@dataclass(frozen=True)
class Sample:
    """A sample: its place in the order of the shard, from 0, its key, and the file of its image.

    member  None where it has no image
    end     byte of the shard at which the search for it ended
    """

    position: int
    key: str
    member: Member | None
    end: int


class Reader:
    """Reads the samples of an opened shard, in order; OSError where the disk does not give them.

    ignored  kind -> members that are no part of a sample: `links`, `special` (devices and sparse
             files), `apple_double` (what macOS adds to a file), `no_key` (without one, and no
             image), `repeated` (of one name, and no image) and `excess` (of a sample of more than
             1000 files)
    strays   images without a key, and second ones of one name
    damage   why nothing is read behind the last sample; None where the shard is whole
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._end = 0
        self._given = "", ""
        self.ignored: Counter[str] = Counter()
        self.strays: list[Stray] = []
        self.damage: str | None = None

    def __iter__(self) -> Iterator[Sample]:
        from webdataset.tariterators import group_by_keys

        groups = group_by_keys(self._named(), handler=self._repeated)
        for position, group in enumerate(groups):
            yield Sample(position, group["__key__"], _image(group), self._end)

    def read(self, member: Member) -> bytes:
        """Read the bytes of a member; Uncaptioned where they are too many, or not all there."""
        if member.bytes > MOST_BYTES:
            raise Uncaptioned("too_large", f"{member.bytes} bytes; {MOST_BYTES} are read")
        content = os.pread(self._file.fileno(), member.bytes, member.offset)
        if not member.is_whole or len(content) != member.bytes:
            raise Uncaptioned("damaged", "the shard ends within it")
        return content

    def _named(self) -> Iterator[dict[str, Any]]:
        """The members in the form that the library groups; their data is the Member."""
        from webdataset.tariterators import base_plus_ext

        key, files = None, 0
        for info in self._infos():
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                self.ignored["links" if info.issym() or info.islnk() else "special"] += 1
                continue
            if info.name.rpartition("/")[2].startswith("._"):
                self.ignored["apple_double"] += 1
                continue
            own, ending = base_plus_ext(info.name)
            if ending is None or ending.startswith("__"):
                # The library has keys of its own like `__key__`.
                self._leave_out("no_key", info.name, None)
                continue
            key, files = own, files + 1 if own == key else 1
            if files > _MOST_FILES:
                self.ignored["excess"] += 1
            else:
                whole = info.offset_data + info.size <= self._size
                member = Member(info.name, info.offset_data, info.size, whole)
                self._given = info.name, own
                yield {"fname": info.name, "data": member, "__url__": ""}

    def _infos(self) -> Iterator[tarfile.TarInfo]:
        """The headers of the archive; ends at damage, which it notes."""
        try:
            headers = _Headers(self._file)
            archive = tarfile.open(fileobj=headers, mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
            last = -1
            while (info := archive.next()) is not None:
                headers.left = _HEADER_BYTES
                if len(archive.pax_headers) > _GLOBAL_HEADERS:
                    raise tarfile.ReadError(f"more than {_GLOBAL_HEADERS} global headers")
                archive.members.clear()  # the list would grow with the shard
                if info.size < 0 or archive.offset <= last:
                    raise tarfile.ReadError("a size below zero")
                last = archive.offset
                self._end = min(last, self._size)  # of a file that is cut off
                yield info
        except Exception as error:  # The file may hold anything.
            is_of_disk = isinstance(error, OSError) and error.errno != errno.EINVAL
            if is_of_disk or isinstance(error, MemoryError):
                raise  # the next run may be able to read it
            self.damage = f"not readable behind byte {self._end}: {reason(error)}"
            return
        self._file.seek(archive.offset)
        if self._file.read(tarfile.BLOCKSIZE) != _END:
            place = min(archive.offset, self._size)
            self.damage = f"cut off, or damaged, at byte {place}: no end is there"
        self._end = self._size

    def _repeated(self, _: Exception) -> bool:
        """Leave out the file that the library was given last."""
        self._leave_out("repeated", *self._given)
        return True

    def _leave_out(self, kind: StrayKind, name: str, key: str | None) -> None:
        """Note a file that is of no sample: an image by name, of others the number."""
        if _is_image(name):
            self.strays.append(Stray(kind, name, key))
        else:
            self.ignored[kind] += 1


def _is_image(name: str) -> bool:
    _, dot, ending = name.lower().rpartition(".")
    return bool(dot) and ending in IMAGES


def _image(group: dict[str, Any]) -> Member | None:
    """Choose the image of a sample: `key.jpg` before `key.mask.png`, then the first."""
    images = [
        (ending.count("."), member)
        for ending, member in group.items()
        if isinstance(member, Member) and _is_image(member.name)
    ]
    return min(images, key=lambda image: image[0])[1] if images else None


class _Headers:
    """A file from which tarfile reads headers, and nothing larger.

    left  bytes that it may still read for the next member
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell
        self.left = _HEADER_BYTES

    def read(self, count: int = -1) -> bytes:
        self.left -= count
        if count < 0 or self.left < 0:
            raise tarfile.ReadError(f"headers of more than {_HEADER_BYTES} bytes for a member")
        return self._file.read(count)

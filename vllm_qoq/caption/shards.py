"""The shards that a user names: a folder, a pattern, a tar file, or a list of shards in JSON.

A list has the form of WebDataset's indexes: `{"shardlist": [{"url": "00000.tar", "nsamples": 1000,
"filesize": 123}, ...]}`, of which counts and sizes may be missing. `metadata_info.json` in a
folder is such a list.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_qoq.caption.errors import CaptionError
from vllm_qoq.errors import one_line, shown

METADATA = "metadata_info.json"
_SUFFIX = ".tar"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MOST = 1_000_000
_LIST_BYTES = 1 << 28
# Files of the output that are of no shard (`vllm_qoq.caption.folder`).
_PREFIX = "vllm-qoq-caption"
# Names of files beside those of a shard (`vllm_qoq.caption.journal`).
_TAKEN = (".failures", ".partial")
_ENDINGS = (".json", ".jsonl", ".failures.json", ".partial.jsonl")
_LONGEST_FILE = ".{}.failures.json.partial"
_LONGEST_NAME = 255
_PIECES, _PIECE_BYTES = 16, 4096
Count = Annotated[int, Field(ge=0, lt=1 << 62, strict=True)]


@dataclass(frozen=True)
class Shard:
    """One tar file.

    name         its path below the folder that was named, without `.tar`; also of its output
    path         where it is
    bytes        its size
    modified_ns  when it was changed last, in nanoseconds since 1970
    samples      how many samples a list says that it has; None where no list does
    """

    name: str
    path: Path
    bytes: int
    modified_ns: int
    samples: int | None = None

    def fingerprint(self) -> str:
        """Digest 16 pieces of 4 KiB, from the first to the last of the file.

        Images are compressed, so two shards hardly agree in a piece, also where one lacks a sample.
        """
        digest = hashlib.sha256()
        last = max(0, self.bytes - _PIECE_BYTES)
        with self.path.open("rb") as file:
            for piece in range(_PIECES):
                file.seek(last * piece // (_PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
        return digest.hexdigest()


class _Listed(BaseModel):
    model_config = ConfigDict(extra="ignore")

    url: str = Field(min_length=1, max_length=4096)
    nsamples: Count | None = None
    filesize: Count | None = None


class _List(BaseModel):
    model_config = ConfigDict(extra="ignore")

    shardlist: Annotated[list[_Listed], Field(max_length=_MOST)]


def find(named: str) -> tuple[Shard, ...]:
    """Find the shards, sorted by name.

    Raises CaptionError where there are none, where one is no regular file, and where a list and
    what is there disagree.
    """
    path = Path(named)
    if path.is_dir():
        shards = _in_folder(path)
    elif path.suffix == ".json":
        shards = list(_in_list(path).values())
    else:
        shards = _of_pattern(named)
    if not shards:
        raise CaptionError(f"{named}: no shards are there; give a folder with .tar files")
    _check_names(shards)
    return tuple(sorted(shards, key=lambda shard: shard.name))


def _check_names(shards: list[Shard]) -> None:
    """Raise CaptionError for a name whose files in the output could not be written."""
    names = {shard.name for shard in shards}
    for shard in shards:
        if shard.name.endswith(_TAKEN) or shard.name.startswith(_PREFIX):
            raise CaptionError(f"{shard.path}: is called like files of the output; rename it")
        place = PurePosixPath(shard.name)
        length = len(os.fsencode(_LONGEST_FILE.format(place.name)))
        if length > _LONGEST_NAME:
            raise CaptionError(
                f"{shard.path}: has a name too long for files of the output by "
                f"{length - _LONGEST_NAME} bytes; rename it"
            )
        for parent in map(str, place.parents):
            for ending in _ENDINGS:
                if parent.endswith(ending) and parent.removesuffix(ending) in names:
                    raise CaptionError(
                        f"{shard.path}: is in a folder that is called like a file of the output "
                        f"for {shown(parent.removesuffix(ending))}; rename one of both"
                    )


def _in_folder(folder: Path) -> list[Shard]:
    listed = _in_list(folder / METADATA) if (folder / METADATA).exists() else {}
    paths = itertools.islice(sorted(_files_below(folder)), _MOST)
    found = [_shard(path, folder) for path in paths if path.suffix == _SUFFIX]
    return [listed.get(shard.name, shard) for shard in found]


def _files_below(folder: Path) -> Iterator[Path]:
    """Go through all files below a folder; CaptionError for what would be left out unseen."""

    def fail(error: OSError) -> None:
        raise CaptionError(f"{error.filename}: {error.strerror}; get the right to read it")

    for parent, folders, files in os.walk(folder, onerror=fail):
        for name in folders:
            if (Path(parent) / name).is_symlink():
                raise CaptionError(
                    f"{Path(parent) / name}: is a link to a folder, and these are not followed; "
                    "name its shards by a pattern"
                )
        for name in files:
            if name.lower().endswith(_COMPRESSED) or (
                name.lower().endswith(_SUFFIX) and not name.endswith(_SUFFIX)
            ):
                raise CaptionError(
                    f"{Path(parent) / name}: does not end in {_SUFFIX}; unpack or rename it, or "
                    "name the other shards by a pattern"
                )
            yield Path(parent) / name


def _of_pattern(named: str) -> list[Shard]:
    from braceexpand import braceexpand

    try:
        patterns = list(itertools.islice(braceexpand(named), _MOST + 1))
    except ValueError as error:
        raise CaptionError(f"{named}: not a pattern: {error}; close its braces") from None
    if len(patterns) > _MOST:
        raise CaptionError(f"{named}: more than {_MOST} names; name fewer shards")
    root = _fixed_part(named)
    found = {}
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches and not glob.has_magic(pattern):
            raise CaptionError(f"{pattern}: no such file; check the path")
        for match in matches:
            if not match.endswith(_SUFFIX):
                raise CaptionError(
                    f"{match}: does not end in {_SUFFIX}; name shards, which are unpacked if they "
                    "are compressed"
                )
            found[match] = _shard(Path(match), root)
    return list(found.values())


def _fixed_part(named: str) -> Path:
    """The folder that all names of a pattern are in."""
    magic = re.search(r"[*?\[{]", named)
    start = named if magic is None else named[: magic.start()]
    return Path(start.rpartition("/")[0] or ("/" if start.startswith("/") else "."))


def _shard(path: Path, root: Path, samples: int | None = None) -> Shard:
    try:
        if not path.is_file():  # a FIFO would be waited for
            raise CaptionError(f"{path}: not a regular file; give a tar file")
        found = path.stat()
    except PermissionError:
        found = None
    if found is None or not os.access(path, os.R_OK):
        raise CaptionError(f"{path}: not readable; get the right to read it")
    name = path.relative_to(root).as_posix().removesuffix(_SUFFIX)
    if ".." in path.relative_to(root).parts:  # the files of the output would be outside of it
        raise CaptionError(f"{path}: has .. behind the fixed part of the pattern; leave it out")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CaptionError(f"{path}: is not UTF-8; rename it") from None
    return Shard(name, path.absolute(), found.st_size, found.st_mtime_ns, samples)


def _in_list(path: Path) -> dict[str, Shard]:
    """Read a list of shards; name -> shard."""
    if not path.is_file():
        raise CaptionError(f"{path}: no such file; give a list of shards in JSON")
    if path.stat().st_size > _LIST_BYTES:
        raise CaptionError(f"{path}: larger than {_LIST_BYTES} bytes; give a list of shards")
    try:
        document = _List.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CaptionError(one_line(error, str(path))) from None
    found: dict[str, Shard] = {}
    for entry in document.shardlist:
        place = PurePosixPath(entry.url)
        if ":" in entry.url or place.is_absolute() or ".." in place.parts or "\0" in entry.url:
            raise CaptionError(
                f"{path}: {shown(entry.url)} is no shard below the folder of the list; put the "
                "list beside the shards, with their paths from there"
            )
        file = path.parent / place
        if place.suffix != _SUFFIX or not os.path.lexists(file):
            raise CaptionError(
                f"{path}: lists {shown(entry.url)}, which is no {_SUFFIX} file there; get the "
                "shard, or take it off the list"
            )
        shard = _shard(file, path.parent, entry.nsamples)
        if entry.filesize not in (None, shard.bytes):
            raise CaptionError(
                f"{file}: has {shard.bytes} bytes, and {path} says {entry.filesize}; download it "
                "again, or mend the list"
            )
        found[shard.name] = shard
    return found

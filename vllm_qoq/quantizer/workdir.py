"""The work folder: results of a quantization on the disk, so that a stopped run goes on.

A work folder is known by its `fingerprint.json`, which names the model, text, options and versions
that the results depend on. Each finished piece is a safetensors file whose header has the run (a
digest of the fingerprint) and a digest of the tensors. Files get their name when they are
complete. Only a file whose name or header has the run of the folder's fingerprint is ever deleted;
other people's files stay, and a folder of theirs is refused before anything in it changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_qoq.checkpoint.folder import read_json
from vllm_qoq.checkpoint.replace import NO_LOCKS
from vllm_qoq.checkpoint.writer import sync_folder, write_bytes
from vllm_qoq.errors import FormatError
from vllm_qoq.quantizer import QuantizeError

Resume = Literal["auto", "required", "never"]
_FINGERPRINT = "fingerprint.json"
_FINGERPRINT_BYTES = 1 << 20
_LOCK = "vllm-qoq.lock"
_PIECE = ".safetensors"
_HEADER_BYTES = 100 << 20
# The first key of fingerprint.json, by which a folder is known as one of ours.
_MARK, _VERSION = "vllm-qoq work folder", 2


class WorkDir:
    """A work folder: finished pieces by name. `open` makes it.

    made_folder  whether a run made the folder, which is then removed with the pieces
    """

    def __init__(self, path: Path, run: str, made_folder: bool) -> None:
        self.path, self._run, self._made_folder = path, run, made_folder

    @classmethod
    @contextmanager
    def open(cls, path: Path, fingerprint: dict[str, Any], resume: Resume) -> Iterator[WorkDir]:
        """Go on with the folder or begin it, for this process alone.

        Raises QuantizeError if the folder belongs to another run or is not one of ours, or if a
        piece is damaged. A folder in which nothing was finished is removed.
        """
        check(path, fingerprint, resume)
        # A run that was killed before it had a fingerprint left files only in a folder it made.
        made_folder = not path.exists() or any(path.iterdir())
        path.mkdir(exist_ok=True)
        with _lock(path):
            # Another process may have ended since, so this is checked again.
            check(path, fingerprint, resume)
            found = _find(path)
            if found is not None and resume == "never":
                for file in _files_of(path, found.run):
                    file.unlink()
            is_new = found is None or resume == "never"
            made_folder = found.made_folder if found is not None else made_folder
            work = cls(path, _run(fingerprint), made_folder)
            try:
                if is_new:
                    for file in filter(_is_begun_fingerprint, list(path.iterdir())):
                        file.unlink()
                    work._write_fingerprint(fingerprint)
                else:
                    work._check_pieces()
                yield work
            except BaseException:
                if not any(_pieces(path)):
                    work.remove()
                raise

    def has(self, name: str) -> bool:
        """Whether the piece is finished."""
        return self.file(name).exists()

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], facts: object) -> None:
        """Store a piece: `tensors`, which may share memory, and `facts` as JSON."""
        from safetensors.torch import save

        alone = _unshared(tensors)
        metadata = {
            "format": "pt",
            "run": self._run,
            "sha256": _digest(alone),
            "facts": json.dumps(facts),
        }
        self._write(self.file(name).name, save(alone, metadata))

    def facts(self, name: str) -> Any:
        """Read the facts of a finished piece, and none of its tensors."""
        return json.loads(_metadata(self.file(name))["facts"])

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """Read the tensors of a finished piece."""
        return _read(self.file(name))[0]

    def remove(self) -> None:
        """Delete the pieces, and the folder if a run made it and it holds nothing else."""
        for file in _files_of(self.path, self._run):
            file.unlink(missing_ok=True)
        (self.path / _LOCK).unlink(missing_ok=True)
        if self._made_folder:
            with suppress(OSError):
                self.path.rmdir()

    def file(self, name: str) -> Path:
        """The path where the piece is, or will be."""
        return self.path / f"{name}{_PIECE}"

    def _check_pieces(self) -> None:
        """Raise QuantizeError for pieces that are not what was written: a disk may lose some."""
        for file in _pieces(self.path):
            try:
                tensors, metadata = _read(file)
                is_whole = _digest(tensors) == metadata["sha256"]
            except Exception as error:  # The file may hold anything.
                raise _damaged(file, str(error)) from None
            if not is_whole:
                raise _damaged(file, "its tensors are not those that were stored")

    def _write_fingerprint(self, fingerprint: dict[str, Any]) -> None:
        document = {_MARK: _VERSION, "made_folder": self._made_folder, "run": fingerprint}
        self._write(_FINGERPRINT, json.dumps(document, indent=2).encode())

    def _write(self, name: str, content: bytes) -> None:
        partial = self.path / _partial(name, self._run)
        partial.unlink(missing_ok=True)  # A run that was killed may have left it.
        try:
            write_bytes(partial, content)
            partial.rename(self.path / name)
        except BaseException:
            partial.unlink(missing_ok=True)  # The next run needs the room on a full disk.
            raise
        sync_folder(self.path)


@dataclass(frozen=True)
class _Found:
    """The content of the fingerprint.json of a work folder."""

    fingerprint: dict[str, Any]
    made_folder: bool

    @property
    def run(self) -> str:
        """The name of the run in its pieces."""
        return _run(self.fingerprint)


def check(path: Path, fingerprint: dict[str, Any], resume: Resume) -> None:
    """Raise QuantizeError for a folder that `WorkDir.open` would refuse; nothing is written."""
    found = _find(path)
    if found is None:
        if resume == "required":
            raise QuantizeError(f"{path}: nothing to resume there; leave out --resume required")
    elif resume != "never":
        _compare(found.fingerprint, fingerprint, path)


def stored_bytes(path: Path) -> int:
    """Count the bytes of the pieces in the folder; QuantizeError if it is not one of ours."""
    return 0 if _find(path) is None else sum(file.stat().st_size for file in _pieces(path))


def _find(path: Path) -> _Found | None:
    """Find the run that the folder belongs to; None if there is no folder, or an empty one.

    Raises QuantizeError for anything else. No file is opened unless it is a regular one.
    """
    if not os.path.lexists(path):
        parent = path.absolute().parent
        if not parent.is_dir():
            raise QuantizeError(f"{parent}: no such folder for --work-dir; create it first")
        _check_writable(parent)
        return None
    if not path.is_dir():
        raise QuantizeError(f"{path}: not a folder; choose another --work-dir")
    _check_writable(path)
    known = path / _FINGERPRINT
    if not os.path.lexists(known):
        for file in path.iterdir():
            if not _is_begun(file):
                raise _foreign(path, file.name)
        return None
    try:
        document = read_json(known, _FINGERPRINT_BYTES) if _is_regular(known) else {}
    except (FormatError, OSError):
        document = {}
    fingerprint = document.get("run")
    if document.get(_MARK) != _VERSION or not isinstance(fingerprint, dict):
        raise _foreign(path, _FINGERPRINT)
    found = _Found(fingerprint, document.get("made_folder") is True)
    if os.path.lexists(path / _LOCK) and not _is_empty(path / _LOCK):
        raise _foreign(path, _LOCK)
    for file in _pieces(path):
        if not _is_regular(file):
            raise _foreign(path, file.name)
        if _metadata(file).get("run") != found.run:
            raise _damaged(file, "it is not a piece of the run that fingerprint.json names")
    return found


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise QuantizeError(f"{folder}: not writable; choose another --work-dir")


def _pieces(path: Path) -> Iterator[Path]:
    return (file for file in sorted(path.iterdir()) if file.name.endswith(_PIECE))


def _files_of(path: Path, run: str) -> list[Path]:
    """List the files that a run wrote into its folder: pieces, unfinished ones, the fingerprint.

    The fingerprint is last, so that a process that is killed while it deletes them leaves a folder
    that still is one of ours.
    """
    pieces = [f for f in _pieces(path) if _is_regular(f) and _metadata(f).get("run") == run]
    partial = [f for f in path.iterdir() if f.name.endswith(_partial("", run)) and _is_regular(f)]
    return [*pieces, *partial, path / _FINGERPRINT]


def _is_begun(file: Path) -> bool:
    """Whether a run that was killed before it had a fingerprint may have left the file."""
    return _is_begun_fingerprint(file) or (file.name == _LOCK and _is_empty(file))


def _is_begun_fingerprint(file: Path) -> bool:
    if not file.name.startswith(f".{_FINGERPRINT}.partial-") or not _is_regular(file):
        return False
    with open(file, "rb") as opened:
        start, mark = opened.read(256), f'{{\n  "{_MARK}"'.encode()
    return start.startswith(mark) or mark.startswith(start)


def _partial(name: str, run: str) -> str:
    return (f".{name}" if name else "") + f".partial-{run}"


def _is_regular(file: Path) -> bool:
    return stat.S_ISREG(file.lstat().st_mode)


def _is_empty(file: Path) -> bool:
    return _is_regular(file) and file.lstat().st_size == 0


def _metadata(file: Path) -> dict[str, Any]:
    """Read the metadata of a safetensors header, also of a file that is cut off behind it."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        text = opened.read(size) if size <= _HEADER_BYTES else b""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        return tensors, opened.metadata()


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Bring tensors to the CPU, each in memory of its own, as the safetensors library wants them.

    Sets share a layer's bias, and a tensor that is on the CPU already is not copied there.
    """
    alone: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for key, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        alone[key] = tensor.clone() if storage in taken else tensor
        taken.add(storage)
    return alone


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {list(tensors[key].shape)}".encode())
        digest.update(tensors[key].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _run(fingerprint: dict[str, Any]) -> str:
    """Compute the name of a run in its pieces: a digest of the fingerprint."""
    text = json.dumps(fingerprint, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _foreign(path: Path, name: str) -> QuantizeError:
    return QuantizeError(
        f"{path}: not a work folder of this version of vllm-qoq ({name!r} is not from it); choose "
        "another --work-dir"
    )


def _damaged(file: Path, why: str) -> QuantizeError:
    return QuantizeError(
        f"{file}: cannot go on with this file: {why}; move it out of the work folder (what belongs "
        "there is computed again), or choose another --work-dir"
    )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Keep other processes out of the folder; the system lets go of the lock with the process.

    On a file system without locks two processes may meet: one of them ends with an error, because
    they write into files of one name, and none takes a piece that is not whole.
    """
    # A link or a FIFO may have taken the name: the one is not followed, nor the other waited for.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(path / _LOCK, "rb", opener=lambda name, _: os.open(name, flags, 0o666)) as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            is_held = os.path.samestat(os.fstat(file.fileno()), os.stat(path / _LOCK))
        except (BlockingIOError, FileNotFoundError):
            is_held = False
        if not is_held:
            raise QuantizeError(
                f"{path}: another process quantizes there; wait for it or choose another --work-dir"
            )
        yield


def _compare(known: dict[str, Any], fingerprint: dict[str, Any], path: Path) -> None:
    # `known` comes from JSON, so the other side is brought through JSON, too.
    wanted = json.loads(json.dumps(fingerprint))
    differing = [key for key in {**wanted, **known} if known.get(key) != wanted.get(key)]
    if differing:
        key = differing[0]
        raise QuantizeError(
            f"{path}: holds results of another run: {key} was {known.get(key)!r} and is "
            f"{wanted.get(key)!r} now; use the old value, or --resume never to begin anew"
        )

"""Results of a quantization that are already on the disk, so that a stopped run goes on.

The folder has `fingerprint.json`, which says of what model, text and options the
results are, and one safetensors file per finished piece. Files get their name when
they are complete.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_qoq.checkpoint import read_json
from vllm_qoq.quantize import QuantizeError

Resume = Literal["auto", "required", "never"]
_FINGERPRINT = "fingerprint.json"
_FINGERPRINT_BYTES = 1 << 20
_LOCK = "lock"


class WorkDir:
    """Finished pieces by name. `open` makes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @contextmanager
    def open(cls, path: Path, fingerprint: dict[str, Any], resume: Resume) -> Iterator[WorkDir]:
        """Go on with the folder or begin it, for this process alone.

        QuantizeError if the folder belongs to another run or is not one of ours.
        """
        known = path / _FINGERPRINT
        if not known.exists():
            if resume == "required":
                raise QuantizeError(f"{path}: nothing to resume there; leave out --resume required")
            if path.exists() and not (path.is_dir() and all(map(_is_ours, path.iterdir()))):
                raise QuantizeError(f"{path}: not a work folder of ours; choose another --work-dir")
            path.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            work = cls(path)
            if known.exists() and resume != "never":
                _compare(read_json(known, _FINGERPRINT_BYTES), fingerprint, path)
            else:
                work._clear()
                work._write(_FINGERPRINT, json.dumps(fingerprint, indent=2).encode())
            yield work

    def has(self, name: str) -> bool:
        """Whether the piece is finished."""
        return self.file(name).exists()

    def save(self, name: str, tensors: dict[str, torch.Tensor], facts: Any) -> None:
        """Store a piece: `tensors`, and `facts` as JSON."""
        from safetensors.torch import save

        contiguous = {key: value.contiguous().cpu() for key, value in tensors.items()}
        metadata = {"format": "pt", "facts": json.dumps(facts)}
        self._write(self.file(name).name, save(contiguous, metadata))

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], Any]:
        """The tensors and facts of a finished piece."""
        from safetensors import safe_open

        with safe_open(self.file(name), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["facts"])

    def remove(self) -> None:
        """Delete the pieces, and the folder if it holds nothing else."""
        self._clear()
        (self.path / _LOCK).unlink()
        with suppress(OSError):
            self.path.rmdir()

    def file(self, name: str) -> Path:
        """Where the piece is, or will be."""
        return self.path / f"{name}.safetensors"

    def _clear(self) -> None:
        for file in self.path.iterdir():
            if _is_ours(file) and file.name != _LOCK:
                file.unlink()

    def _write(self, name: str, content: bytes) -> None:
        partial = self.path / f".{name}.partial"
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self.path / name)


def _is_ours(file: Path) -> bool:
    return file.name in (_FINGERPRINT, _LOCK) or file.name.endswith((".safetensors", ".partial"))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Keep other processes out of the folder. The system lets go of it with the process."""
    with open(path / _LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise QuantizeError(
                f"{path}: another process quantizes there; wait for it or choose another --work-dir"
            ) from None
        yield


def _compare(known: dict[str, Any], fingerprint: dict[str, Any], path: Path) -> None:
    differing = [key for key in fingerprint if known.get(key) != fingerprint[key]]
    if differing:
        key = differing[0]
        raise QuantizeError(
            f"{path}: holds results of another run: {key} was {known.get(key)!r} and is "
            f"{fingerprint[key]!r} now; use the old value, or --resume never to begin anew"
        )

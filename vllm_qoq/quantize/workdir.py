"""Results of a quantization that are already on the disk, so that a stopped run goes on.

The folder has `fingerprint.json`, which says of what model, text and options the
results are, and one safetensors file per finished piece. Files get their name when
they are complete.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_qoq.checkpoint import read_json
from vllm_qoq.quantize import QuantizeError

Resume = Literal["auto", "required", "never"]
_FINGERPRINT = "fingerprint.json"
_FINGERPRINT_BYTES = 1 << 20


class WorkDir:
    """Finished pieces by name."""

    def __init__(self, path: Path, fingerprint: dict[str, Any], resume: Resume) -> None:
        """Open or begin the folder; QuantizeError if it belongs to another run."""
        self.path = path
        if resume == "never" and path.exists():
            self.remove()
        known = path / _FINGERPRINT
        if known.exists():
            _compare(read_json(known, _FINGERPRINT_BYTES), fingerprint, path)
        elif resume == "required":
            raise QuantizeError(f"{path}: nothing to resume there; start without --resume required")
        elif path.exists() and any(path.iterdir()):
            raise QuantizeError(f"{path}: not a work folder of vllm-qoq; choose another --work-dir")
        else:
            path.mkdir(parents=True, exist_ok=True)
            self._write(_FINGERPRINT, json.dumps(fingerprint, indent=2).encode())

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
        """Delete the folder if it is one of ours."""
        if not (self.path / _FINGERPRINT).exists():
            raise QuantizeError(f"{self.path}: not a work folder of vllm-qoq; it is left alone")
        shutil.rmtree(self.path)

    def file(self, name: str) -> Path:
        """Where the piece is, or will be."""
        return self.path / f"{name}.safetensors"

    def _write(self, name: str, content: bytes) -> None:
        partial = self.path / f".{name}.partial"
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self.path / name)


def _compare(known: dict[str, Any], fingerprint: dict[str, Any], path: Path) -> None:
    differing = [key for key in fingerprint if known.get(key) != fingerprint[key]]
    if differing:
        key = differing[0]
        raise QuantizeError(
            f"{path}: holds results of another run: {key} was {known.get(key)!r} and is "
            f"{fingerprint[key]!r} now; use the old value, or --resume never to begin anew"
        )

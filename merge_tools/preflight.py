"""What can be known before a merge begins: where the output goes and whether it fits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from merge_tools import MergeError
from merge_tools.progress import human_bytes


def check_output(out: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """Raise MergeError unless `out` may be created beside, not over, the inputs."""
    target = out.resolve()
    for folder in inputs:
        source = folder.resolve()
        if target == source or source in target.parents or target in source.parents:
            raise MergeError(f"{out}: overlaps the input {folder}; choose another output folder")
    if out.exists() and not overwrite:
        raise MergeError(f"{out}: exists already; choose another folder or add --overwrite")
    if out.exists() and not out.is_dir():
        raise MergeError(f"{out}: is not a folder; choose another output")
    parent = target.parent
    if not parent.is_dir():
        raise MergeError(f"{parent}: no such folder; create it first")
    if not os.access(parent, os.W_OK):
        raise MergeError(f"{parent}: not writable; choose another output folder")


def check_space(out: Path, needed: int) -> None:
    """Raise MergeError when the disk of `out` cannot take `needed` bytes."""
    free = shutil.disk_usage(out.resolve().parent).free
    if free < needed:
        raise MergeError(
            f"{out}: needs {human_bytes(needed)}, but {human_bytes(free)} are free; make room or "
            "choose another disk"
        )

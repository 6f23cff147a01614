"""Checks of an output folder before work begins: whether it may be written, and fits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from vllm_qoq.checkpoint import ours
from vllm_qoq.checkpoint.replace import Foreign, OutputError, is_name_short, recover
from vllm_qoq.progress import human_bytes

_REMEDY = "choose another output folder"


def check_output(
    out: Path, inputs: Iterable[Path], overwrite: bool, foreign: Foreign = ours.foreign
) -> None:
    """Raise OutputError unless `out` may be created beside, not over, the inputs.

    foreign  says why a folder that exists may not be replaced; None if it may

    An old output that a killed run had moved aside gets its name back first.
    """
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise OutputError(f"{out}: is not UTF-8; {_REMEDY}") from None
    target = out.resolve()
    here = Path.cwd()
    if target == here or target in here.parents:
        raise OutputError(f"{out}: holds the current folder; name a folder to create in it")
    for folder in inputs:
        source = folder.resolve()
        if target == source or source in target.parents or target in source.parents:
            raise OutputError(f"{out}: overlaps the input {folder}; {_REMEDY}")
    if out.is_symlink():
        raise OutputError(f"{out}: is a symbolic link to {target}; name a folder, not a link")
    parent = target.parent
    if not parent.is_dir():
        raise OutputError(f"{parent}: no such folder; create it first")
    if not is_name_short(target):
        raise OutputError(f"{out}: the name is too long to write beside it; {_REMEDY}")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{parent}: not writable; {_REMEDY}")
    recover(target)
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out}: is not a folder; {_REMEDY}")
    if out.is_mount():
        raise OutputError(f"{out}: is a mount point, which cannot be replaced; name a folder in it")
    if not overwrite:
        raise OutputError(f"{out}: exists already; choose another folder or add --overwrite")
    if reason := foreign(target):
        raise OutputError(f"{out}: {reason}; --overwrite deletes only what is ours: {_REMEDY}")


def check_space(out: Path, needed: int) -> None:
    """Raise OutputError when the disk of `out` cannot take `needed` bytes."""
    free = shutil.disk_usage(out.resolve().parent).free
    if free < needed:
        raise OutputError(
            f"{out}: needs {human_bytes(needed)}, but {human_bytes(free)} are free; make room or "
            "choose another disk"
        )

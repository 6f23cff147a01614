"""CUDA's toolkit on this machine: where it lies, and what its nvcc is and compiles for.

Nothing is imported here but the standard library, since builds read this file before torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

NEEDED = 13
"""The kernels are written for the nvcc of this version of CUDA, and later ones."""
REMEDY = f"install the toolkit of CUDA {NEEDED} or later, or set CUDA_HOME to its folder"
_USUAL = Path("/usr/local/cuda")
_RELEASE = re.compile(r"\brelease (\d+)\.(\d+)")
_SECONDS = 60.0


class ToolkitError(Exception):
    """What is wrong with the toolkit, in words that end a message."""


class Toolkit(NamedTuple):
    """A toolkit that compiles: its folder, and the version of its nvcc."""

    home: Path
    release: tuple[int, int]

    @property
    def nvcc(self) -> Path:
        """The compiler."""
        return self.home / "bin" / "nvcc"

    @property
    def version(self) -> str:
        """Write the version as NVIDIA does, as in 13.0."""
        return "{}.{}".format(*self.release)

    def architectures(self) -> str:
        """List what nvcc compiles for, as in "compute_80 compute_90"."""
        return _said(self.nvcc, "--list-gpu-arch")


def find() -> Toolkit:
    """Find the toolkit: that of CUDA_HOME, or of nvcc in PATH, or the one in its usual place.

    Raises ToolkitError where there is none, its nvcc does not run, or is older than NEEDED.
    """
    home = _home()
    found = _RELEASE.search(_said(home / "bin" / "nvcc", "--version"))
    if found is None:
        raise ToolkitError(f"{home / 'bin' / 'nvcc'} does not say which version it is; {REMEDY}")
    toolkit = Toolkit(home, (int(found[1]), int(found[2])))
    if toolkit.release < (NEEDED, 0):
        raise ToolkitError(f"{toolkit.nvcc} is of CUDA {toolkit.version}; {REMEDY}")
    return toolkit


def _home() -> Path:
    named, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    # On some systems nvcc in PATH is a script beside no headers.
    places = [Path(named)] if named else [*_parents(nvcc), _USUAL]
    for place in places:
        if _has_nvcc(place) and (place / "include" / "cuda_runtime.h").is_file():
            return place
    for place in places:
        if _has_nvcc(place):
            raise ToolkitError(f"{place} has nvcc, but no include/cuda_runtime.h; {REMEDY}")
    where = f"in CUDA_HOME={named}" if named else f"in PATH or {_USUAL}"
    raise ToolkitError(f"there is no nvcc {where}; {REMEDY}")


def _parents(nvcc: str | None) -> list[Path]:
    return [Path(nvcc).resolve().parent.parent] if nvcc else []


def _has_nvcc(place: Path) -> bool:
    return (place / "bin" / "nvcc").is_file()


def _said(nvcc: Path, option: str) -> str:
    try:
        done = subprocess.run(
            [nvcc, option], capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolkitError(f"{nvcc} does not run: {error}; {REMEDY}") from error
    if done.returncode:
        last = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise ToolkitError(f"{nvcc} {option} fails: {last}; {REMEDY}")
    return done.stdout

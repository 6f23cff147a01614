"""Folders that look like CUDA's toolkit, with an nvcc that says what a test wants."""

from __future__ import annotations

from pathlib import Path

FOR_ALL = "compute_80 compute_90 compute_100 compute_120"


def make_toolkit(
    folder: Path, known: str = FOR_ALL, release: str = "release 13.0, V13.0.88"
) -> None:
    """Make one whose nvcc compiles for `known` and says that it is of `release`."""
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo '{release}';; --list-gpu-arch) echo {known};; "
        "*) echo $0 >&2; exit 1;; esac\n"
    )
    nvcc.chmod(0o755)

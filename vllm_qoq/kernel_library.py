"""The library of CUDA kernels: where it lies, what it was built for, and whether a GPU runs that.

Nothing is loaded here: what the build wrote into the file (csrc/common/built_for.cpp) is read from
it, so that a library which torch cannot load is described like a sound one.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from vllm_qoq import cards
from vllm_qoq.toolkit import NEEDED

PATH = Path(__file__).with_name("_C.so")
BUILD = "VLLM_QOQ_CUDA=1 pip install --no-build-isolation --no-deps --force-reinstall ."


class Problem(NamedTuple):
    """What is wrong, and what helps."""

    what: str
    remedy: str

    def __str__(self) -> str:
        """Join both, for a message."""
        return f"{self.what}; {self.remedy}"


NO_LIBRARY = Problem(
    "this build of vllm-qoq has no CUDA kernels",
    f"on an NVIDIA GPU from Ampere on build them in a clone, with the nvcc of CUDA {NEEDED} and a "
    f"torch for it: {BUILD} (README, Install)",
)
OBSTRUCTED = Problem(
    f"{PATH} is no file, but should be the library of CUDA kernels", f"remove it, then {BUILD}"
)


def without(ops: Collection[str]) -> Problem:
    """Say that the library lacks ops, as one that was built before they were written does."""
    return Problem(
        "the library of CUDA kernels was built from another version of vllm-qoq: it lacks "
        f"{', '.join(ops)}",
        f"build it anew in a clone of this version, with nvcc: {BUILD}",
    )


def unloadable(error: OSError, cuda: str) -> str:
    """Say why torch, which is built for a version of CUDA, cannot load the library."""
    return (
        f"{PATH} cannot be loaded by a torch for CUDA {cuda}: {error}; the kernels need a torch "
        f"that is built for CUDA {NEEDED}, and to be built from this version of vllm-qoq: {BUILD}"
    )


_RECORD = re.compile(rb"qoq kernels are for ([\w:]+)\0")
_CODE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


@functools.cache
def built_for(path: Path = PATH) -> tuple[str, ...] | None:
    """Read for what the library was built, as in ("sm_80", "compute_80"); None where there is none.

    Names are nvcc's: machine code for sm_80, and PTX for compute_80, which the driver compiles for
    the GPU. Empty where the library does not say, as before vllm-qoq recorded it, or cannot be
    read.
    """
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            return None
        found = _RECORD.search(path.read_bytes())
    except OSError:
        return ()
    return tuple(found[1].decode().split(":")) if found else ()


def is_obstructed(path: Path = PATH) -> bool:
    """Whether a folder, a pipe, a link to nowhere or the like lies in the library's place."""
    return os.path.lexists(path) and not path.is_file()


def code_for(capability: cards.Capability, codes: Collection[str]) -> str | None:
    """Find the code that the driver takes for a GPU: its machine code, or else the latest PTX."""
    machine, ptx = [], []
    for code in codes:
        found = _CODE.fullmatch(code)
        if found is None:
            continue
        kind, is_for, exact = found[1], (int(found[2]), int(found[3])), bool(found[4])
        if kind == "compute" and is_for <= capability:
            ptx.append((is_for, code))
        # Machine code runs on the later minor versions, too; of an `a` none but its own.
        elif kind == "sm" and not exact and is_for[0] == capability[0] and is_for <= capability:
            machine.append((is_for, code))
    best = max(machine or ptx, default=None)
    return best and best[1]


class Choice(NamedTuple):
    """Which kernels run on a GPU: the code that they are, and the path of the GEMM."""

    code: str
    gemm: str

    @property
    def is_ptx(self) -> bool:
        """Whether the driver compiles the code for the GPU."""
        return self.code.startswith("compute")

    def __str__(self) -> str:
        """Say so in a line."""
        return f"w4a8_gemm by the {self.gemm} path, all others from {self.code}"


def choice(capability: cards.Capability, codes: Collection[str]) -> Choice | None:
    """Say which kernels of a library built for `codes` run on a GPU; None where none does."""
    code = code_for(capability, codes) if capability >= cards.OLDEST else None
    return Choice(code, cards.gemm_path(capability, codes)) if code else None


def problem_of(
    gpu: str,
    capability: cards.Capability,
    codes: Collection[str] | None,
    lacking: Collection[str] = (),
    beside: Collection[cards.Capability] = (),
) -> Problem | None:
    """Say why a library does not run on a GPU; None if it does.

    codes    what it was built for: the result of `built_for`
    lacking  the ops that it has no kernel for: the result of `ops.missing_ops`
    beside   compute capabilities of the other GPUs here, which a new build has to be for, too
    """
    has = f"{gpu} has compute capability {cards.name(capability)}"
    if capability < cards.OLDEST:
        return Problem(
            f"our kernels are for {cards.needed()}; {has}",
            "use one of those GPUs, or serve sets in W8A8 and W4A16 with a 16-bit KV cache",
        )
    if codes is None:
        return OBSTRUCTED if is_obstructed() else NO_LIBRARY
    if choice(capability, codes) is not None:
        return without(lacking) if lacking else None
    held = ", ".join(codes) or "GPUs that it does not name"
    return Problem(
        f"the CUDA kernels of this installation are built for {held}; {has}",
        f"build them for it in a clone, with nvcc: {build_command([capability, *beside])}",
    )


def build_command(capabilities: Collection[cards.Capability]) -> str:
    """Write the command that builds the library for GPUs, all of them that it can be for."""
    usable = sorted({one for one in capabilities if one >= cards.OLDEST})
    # A GPU between or after those of the table runs the PTX that a build for all has.
    asked = ";".join(map(cards.name, usable)) if all(map(cards.family, usable)) else "all"
    return f"VLLM_QOQ_CUDA_ARCHS={shlex.quote(asked)} {BUILD}"

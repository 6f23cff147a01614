"""Which kernels run on which NVIDIA GPU: one table for the build, the ops and what they say.

Nothing is imported here but the standard library, since setup.py reads this file before torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

Capability = tuple[int, int]


class Family(NamedTuple):
    """GPUs that run the same machine code, from one compute capability to the next family's.

    major, minors  the compute capabilities
    gpus           what they are called
    code           the architecture that nvcc compiles for, as in sm_80
    gemm           the path of csrc/gemm/ that `w4a8_gemm` takes; the other ops have one for all
    """

    major: int
    minors: range
    gpus: str
    code: str
    gemm: str


FAMILIES = (
    Family(8, range(10), "Ampere and Ada", "80", "portable"),
    Family(9, range(1), "Hopper", "90", "hopper"),
    Family(10, range(4), "Blackwell of data centres", "100", "portable"),
    Family(12, range(2), "Blackwell of workstations", "120", "portable"),
)
# The Hopper path needs instructions that only sm_90a has.
HOPPER_FILES = "csrc/gemm/hopper/"
HOPPER_CODE = "90a"


def family(capability: Capability) -> Family | None:
    """Find the family of a GPU; None if the kernels do not run there."""
    for one in FAMILIES:
        if capability[0] == one.major and capability[1] in one.minors:
            return one
    return None


def serves(capability: Capability) -> bool:
    """Whether the kernels run on a GPU."""
    return family(capability) is not None


def needed() -> str:
    """Name the GPUs that the kernels run on, for a message."""
    return ", ".join(
        f"{one.gpus} ({one.major}.{'x' if len(one.minors) > 1 else one.minors[0]})"
        for one in FAMILIES
    )


class Build(NamedTuple):
    """What nvcc is told of most files, and of those of the Hopper path (None: left out)."""

    flags: list[str]
    hopper_flags: list[str] | None


def build_for(asked: str, is_portable: bool = False) -> Build:
    """Translate compute capabilities, as in "8.0;9.0a;12.0+PTX", into flags for nvcc.

    A GPU is built for as its family; raises ValueError for one without a family. PTX, which later
    GPUs compile for themselves, is added where it is asked for. `is_portable` builds what the
    oldest GPUs run, for all: tests run it where there is a newer one only.
    """
    codes: dict[str, bool] = {}
    for name in filter(None, re.split(r"[;, ]+", asked)):
        found = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        one = found and family((int(found[1]), int(found[2])))
        if not found or not one:
            raise ValueError(
                f"{name!r} is no compute capability that the kernels are for: {needed()}"
            )
        codes[one.code] = codes.get(one.code, False) or bool(found[3])
    if not codes:
        raise ValueError(f"no compute capability is named; the kernels are for {needed()}")
    flags = []
    for code, with_ptx in codes.items():
        flags.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        if with_ptx:
            flags.append(f"-gencode=arch=compute_{code},code=compute_{code}")
    if is_portable:
        return Build([*flags, "-DQOQ_PORTABLE"], None)
    if all(one.gemm != "hopper" for one in FAMILIES if one.code in codes):
        return Build(flags, None)
    return Build(
        [*flags, "-DQOQ_HOPPER"],
        [f"-gencode=arch=compute_{HOPPER_CODE},code=sm_{HOPPER_CODE}"],
    )


def asked_for(
    environment: Mapping[str, str], present: Iterable[Capability], known_to_nvcc: str
) -> str:
    """Say what a build is for: what is asked for, or else the GPUs that are present, or else all.

    VLLM_QOQ_CUDA_ARCHS asks, or TORCH_CUDA_ARCH_LIST for everything that is built with torch; of
    the latter, what is older than our kernels is left out. `known_to_nvcc` is what
    `nvcc --list-gpu-arch` prints: an older nvcc does not know the latest GPUs.
    """
    if ours := environment.get("VLLM_QOQ_CUDA_ARCHS"):
        return ours
    if everyones := environment.get("TORCH_CUDA_ARCH_LIST"):
        names = filter(None, re.split(r"[;, ]+", everyones))
        return ";".join(n for n in names if not re.match(r"[1-7]\.", n))
    usable = sorted({capability for capability in present if serves(capability)})
    if usable:
        return ";".join(f"{major}.{minor}" for major, minor in usable)
    known = [one for one in FAMILIES if f"compute_{one.code}" in known_to_nvcc.split()]
    return ";".join(f"{one.major}.0" for one in known) + "+PTX"

"""Which kernels run on which NVIDIA GPU: one table for the build, the ops and `vllm-qoq doctor`.

Nothing is imported here but the standard library, since setup.py reads this file before torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

Capability = tuple[int, int]


class Family(NamedTuple):
    """GPUs that run the same machine code, from one compute capability to the next family's.

    major, minors  the compute capabilities
    gpus           what they are called
    code           the architecture that nvcc compiles for, as in sm_80
    gemm           the path of csrc/gemm/ that `w4a8_gemm` takes; the other ops have one for all
    was_run        whether the kernels have run on one of them, rather than on a model alone
    """

    major: int
    minors: range
    gpus: str
    code: str
    gemm: str
    was_run: bool

    @property
    def capabilities(self) -> str:
        """The compute capabilities as a text, as in 8.x."""
        return f"{self.major}.{'x' if len(self.minors) > 1 else self.minors[0]}"


FAMILIES = (
    Family(8, range(10), "Ampere and Ada", "80", "portable", False),
    Family(9, range(1), "Hopper", "90", "hopper", True),
    Family(10, range(4), "Blackwell of data centres", "100", "portable", False),
    Family(12, range(2), "Blackwell of workstations", "120", "portable", False),
)
# GPUs between and after those of the table run the portable path, where the library has PTX for
# them.
OLDEST: Capability = (8, 0)
# TOPS of int8 where there is next to none: as many as 4-bit weights need for five tokens at 8 TB/s.
LITTLE_INT8: dict[Capability, int] = {(10, 3): 157}
# The Hopper path needs instructions that only sm_90a has.
HOPPER_FILES = "csrc/gemm/hopper/"
HOPPER_CODE = "90a"


def family(capability: Capability) -> Family | None:
    """Find the family of a GPU; None if the table has none, as for a GPU that is too old or new."""
    for one in FAMILIES:
        if capability[0] == one.major and capability[1] in one.minors:
            return one
    return None


def gemm_path(capability: Capability, codes: Collection[str]) -> str:
    """Name the path that `w4a8_gemm` takes on a GPU, with a library built for `codes`."""
    found = family(capability)
    if found is None or (found.gemm == "hopper" and f"sm_{HOPPER_CODE}" not in codes):
        return "portable"
    return found.gemm


def name(capability: Capability) -> str:
    """Write a compute capability as NVIDIA does, as in 9.0."""
    return f"{capability[0]}.{capability[1]}"


def needed() -> str:
    """Name the GPUs that the kernels run on, for a message."""
    return ", ".join(f"{one.gpus} ({one.capabilities})" for one in FAMILIES)


_FORM = " (as in 8.0;9.0;12.0+PTX, or all)"


class Build(NamedTuple):
    """What nvcc is told of most files, and of those of the Hopper path (None: left out).

    codes  what the library then holds, as in sm_80, or compute_80 for PTX
    """

    flags: list[str]
    hopper_flags: list[str] | None
    codes: list[str]


def build_for(asked: str, is_portable: bool = False) -> Build:
    """Translate compute capabilities, as in "8.0;9.0a;12.0+PTX", into flags for nvcc.

    A GPU is built for as its family; raises ValueError for one without a family. PTX, which later
    GPUs compile for themselves, is added where it is asked for. `is_portable` builds what the
    oldest GPUs run, for all: tests run it where there is a newer one only.
    """
    with_ptx: dict[str, bool] = {}
    for wanted in filter(None, re.split(r"[;, ]+", asked)):
        found = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", wanted)
        one = found and family((int(found[1]), int(found[2])))
        if not found or not one:
            raise ValueError(
                f"{wanted!r} is no compute capability that the kernels are for: {needed()}{_FORM}"
            )
        with_ptx[one.code] = with_ptx.get(one.code, False) or bool(found[3])
    if not with_ptx:
        raise ValueError(f"no compute capability that the kernels are for: {needed()}")
    flags, codes = [], []
    for number, has_ptx in with_ptx.items():
        for code in [f"sm_{number}", *([f"compute_{number}"] if has_ptx else [])]:
            flags.append(f"-gencode=arch=compute_{number},code={code}")
            codes.append(code)
    if is_portable:
        return Build([*flags, "-DQOQ_PORTABLE"], None, codes)
    if all(one.gemm != "hopper" for one in FAMILIES if one.code in with_ptx):
        return Build(flags, None, codes)
    return Build(
        [*flags, "-DQOQ_HOPPER"],
        [f"-gencode=arch=compute_{HOPPER_CODE},code=sm_{HOPPER_CODE}"],
        [*codes, f"sm_{HOPPER_CODE}"],
    )


TORCH_NAMES = {
    **dict.fromkeys(("Kepler", "Maxwell", "Pascal", "Volta", "Turing"), ""),
    **dict.fromkeys(("Kepler+Tesla", "Maxwell+Tegra", "Volta+Tegra"), ""),
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
"""Generation, as TORCH_CUDA_ARCH_LIST may name it -> its capabilities that we build for."""


_OURS, _EVERYONES = "VLLM_QOQ_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"


def _variable_in_force(environment: Mapping[str, str]) -> str | None:
    """Name the variable whose capabilities a build is for; None where it looks for itself."""
    if ours := environment.get(_OURS):
        return None if ours == "all" else _OURS
    return None if environment.get(_EVERYONES, "native") in ("", "native") else _EVERYONES


def refusal(error: ValueError, environment: Mapping[str, str]) -> str:
    """Say what `build_for` refuses, which variable asked for it, and what to do."""
    variable = _variable_in_force(environment)
    without = "or set VLLM_QOQ_CUDA=0 for an installation without kernels"
    if variable is None:
        return f"nvcc knows {error}; install a newer CUDA toolkit, {without}"
    instead = "" if variable == _OURS else f", or set {_OURS}, which it gives way to"
    return f"{variable}={environment[variable]}: {error}; correct it{instead}, {without}"


def is_asked_of_us(environment: Mapping[str, str]) -> bool:
    """Whether the GPUs to build for are asked of this package, and not of all that torch builds."""
    return bool(environment.get(_OURS))


def require_known(build: Build, known_to_nvcc: str) -> None:
    """Raise ValueError unless nvcc compiles for all that is asked of it.

    known_to_nvcc  what `nvcc --list-gpu-arch` prints
    """
    known = known_to_nvcc.split()
    for code in build.codes:
        if "compute_" + re.sub(r"\D", "", code) not in known:
            raise ValueError(f"this nvcc does not compile for {code}")


def name_for(capability: Capability) -> str:
    """Name what a GPU runs, for VLLM_QOQ_CUDA_ARCHS: its family's code, or else PTX."""
    if family(capability):
        return name(capability)
    last = FAMILIES[-1]
    nearest = last if capability > (last.major, last.minors[-1]) else FAMILIES[0]
    return f"{nearest.major}.0+PTX"


def asked_for(
    environment: Mapping[str, str], present: Iterable[Capability], known_to_nvcc: str
) -> str:
    """Say what a build is for: what is asked for, or else the GPUs that are present, or else all.

    VLLM_QOQ_CUDA_ARCHS asks, where "all" is a name, too, or TORCH_CUDA_ARCH_LIST for everything
    that is built with torch, with torch's names of generations; of the latter, what is older than
    our kernels is left out, and GPUs between the families have PTX of the oldest code.
    `known_to_nvcc` is what `nvcc --list-gpu-arch` prints: an older nvcc does not know the latest
    GPUs. A build for all has PTX of the oldest code, for GPUs between the families, as of compute
    capability 11.0, and of the newest, for GPUs after them.
    """
    ours, variable = environment.get(_OURS), _variable_in_force(environment)
    if variable == _OURS:
        return environment[_OURS]
    if variable is not None:
        listed = re.split(r"[;, ]+", environment[variable])
        names = ";".join(TORCH_NAMES.get(one, one) for one in listed).split(";")
        return ";".join(dict.fromkeys(filter(None, map(_ours_of, names))))
    usable = sorted({capability for capability in present if capability >= OLDEST})
    if usable and not ours:
        return ";".join(dict.fromkeys(map(name_for, usable)))
    known = [one for one in FAMILIES if f"compute_{one.code}" in known_to_nvcc.split()]
    with_ptx = (known[0], known[-1]) if known else ()
    return ";".join(f"{one.major}.0{'+PTX' if one in with_ptx else ''}" for one in known)


def _ours_of(torchs: str) -> str:
    """Write what one of torch's capabilities is for us, as in 9.0a; empty for an older GPU."""
    found = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", torchs)
    if found is None:
        return torchs
    capability = int(found[1]), int(found[2])
    if capability < OLDEST:
        return ""
    return torchs if family(capability) else name_for(capability)

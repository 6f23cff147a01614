"""Builds the CUDA kernels of csrc/, where possible or asked for; metadata is in pyproject.toml.

VLLM_QOQ_CUDA   auto  (default) build them where nvcc and a CUDA build of torch are there
                1     build them; anything missing is an error
                0     pure Python
VLLM_QOQ_CUDA_ARCHS   the compute capabilities to build for, as in "8.0;9.0;12.0+PTX", or "all"; by
                default those of TORCH_CUDA_ARCH_LIST, or of the GPUs here, or, where there is
                none, all
VLLM_QOQ_PORTABLE   1   for tests: on every GPU the code of the oldest ones

The kernels are one library for torch 2.11 and later and every Python: `pip install
--no-build-isolation .`, because an isolated build sees no torch.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

# The oldest torch that the library runs on: 2.11.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
OPTIMIZE = "-O3"
# Some compilers link the C++ runtime into the library. Its symbols have to be private then: if
# only the data of streams (the ids of locale facets) came from torch's copy, writing a number into
# an error message would crash or cut the message short.
LINK = "-Wl,--exclude-libs,ALL"
SOURCES, HEADERS = (
    sorted(str(path) for kind in kinds for path in Path("csrc").rglob(kind))
    for kinds in (("*.cpp", "*.cu"), ("*.h", "*.cuh"))
)


def module(name: str) -> Any:
    """A module of the package, without the package, which needs torch and more."""
    path = Path(__file__).parent / "vllm_qoq" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


cards, toolkit = module("cards"), module("toolkit")


class Missing(Exception):
    """What is missing for a build of the kernels."""


def flags_of_cards() -> Any:
    """What nvcc is told of the GPUs to build for; Missing, or SystemExit for what was asked."""
    try:
        import torch
    except ImportError:
        raise Missing("torch is not installed here (with pip, use --no-build-isolation)") from None
    if torch.version.cuda is None:
        raise Missing(f"torch {torch.__version__} is built without CUDA")
    if int(torch.version.cuda.split(".")[0]) < toolkit.NEEDED:
        raise Missing(
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}; install one for "
            f"CUDA {toolkit.NEEDED}"
        )
    try:
        found = toolkit.find()
        known = found.architectures()
    except toolkit.ToolkitError as error:
        raise Missing(str(error)) from None
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise Missing("there is no C++ compiler; install g++, or name one in CXX")
    # torch looks for the toolkit itself, and not where we did.
    os.environ["CUDA_HOME"] = str(found.home)
    present = [
        torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())
    ]
    try:
        asked = cards.asked_for(os.environ, present, known)
        build = cards.build_for(asked, choice_of("VLLM_QOQ_PORTABLE", "0", "1") == "1")
        cards.require_known(build, known)
        return build
    except ValueError as error:
        message = cards.refusal(error, os.environ)
        # What is asked of all packages that are built with torch need not be for us.
        if cards.is_asked_of_us(os.environ):
            raise SystemExit(f"vllm-qoq: {message}") from error
        raise Missing(message) from error


def kernels() -> dict[str, Any]:
    """The arguments of `setup` that build the library."""
    build = flags_of_cards()
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    nvcc = ["-std=c++20", OPTIMIZE, TORCH_TARGET, "-DUSE_CUDA"]
    cxx = ["-std=c++20", OPTIMIZE, TORCH_TARGET, f"-DQOQ_BUILT_FOR={':'.join(build.codes)}"]
    sources = [
        source
        for source in SOURCES
        if build.hopper_flags is not None or not source.startswith(cards.HOPPER_FILES)
    ]

    class Build(BuildExtension):
        """Compiles the Hopper path for Hopper alone, and all else for every GPU asked for."""

        def finalize_options(self) -> None:
            super().finalize_options()
            # A library of an earlier build may be newer than all sources and for other GPUs.
            self.force = True

        def build_extension(self, extension: Any) -> None:
            compile_with = self.compiler.compile

            def compile_in_parts(files: list[str], *, extra_postargs: Any, **options: Any) -> Any:
                objects = []
                for is_hopper, flags in ((True, build.hopper_flags), (False, build.flags)):
                    part = [f for f in files if f.startswith(cards.HOPPER_FILES) == is_hopper]
                    # torch adds no architectures of its own where -gencode is given.
                    with_flags = {
                        **extra_postargs,
                        "nvcc": [*extra_postargs["nvcc"], *(flags or [])],
                    }
                    if part:
                        objects += compile_with(part, extra_postargs=with_flags, **options)
                return objects

            self.compiler.compile = compile_in_parts
            super().build_extension(extension)

    extension = CUDAExtension(
        "vllm_qoq._C",
        sources,
        include_dirs=[str(Path(__file__).parent / "csrc")],
        depends=HEADERS,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=[LINK],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def choice_of(variable: str, *choices: str) -> str:
    """The value of an environment variable, which is the first of `choices` where it is not set."""
    choice = os.environ.get(variable) or choices[0]
    if choice not in choices:
        expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise SystemExit(f"{variable}={choice}: expected {expected}")
    return choice


def arguments() -> dict[str, Any]:
    """What VLLM_QOQ_CUDA asks for."""
    choice = choice_of("VLLM_QOQ_CUDA", "auto", "0", "1")
    if choice == "0":
        return {}
    try:
        return kernels()
    except Missing as missing:
        if choice == "1":
            raise SystemExit(f"VLLM_QOQ_CUDA=1, but {missing}") from None
        # pip shows it with -v; `vllm-qoq doctor` says it at any time.
        print(f"vllm-qoq: a build without CUDA kernels: {missing}", file=sys.stderr)
        return {}


setup(**arguments())

"""What the library of kernels was built for, and what is said where that is not the GPU here."""

import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

from vllm_qoq import cards, kernel_library

NVCC = shutil.which("nvcc")
NVCC_KNOWS = "compute_80 compute_90 compute_100 compute_120"
ALL = cards.build_for(cards.asked_for({}, [], NVCC_KNOWS)).codes


def test_the_record_is_read_from_the_file(tmp_path):
    library = tmp_path / "_C.so"
    assert kernel_library.built_for(library) is None
    kernel_library.built_for.cache_clear()
    library.write_bytes(b"\x7fELF\0qoq kernels are for sm_80:sm_90a:compute_80\0\xff")
    assert kernel_library.built_for(library) == ("sm_80", "sm_90a", "compute_80")
    kernel_library.built_for.cache_clear()
    library.write_bytes(b"\x7fELF of a version without a record")
    assert kernel_library.built_for(library) == ()


@pytest.mark.parametrize(
    "put",
    [
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("nowhere"),
        os.mkfifo,
    ],
)
def test_what_is_no_file_is_no_library_and_is_named(tmp_path, monkeypatch, put):
    path = tmp_path / "_C.so"
    assert not kernel_library.is_obstructed(path)
    put(path)
    assert kernel_library.built_for(path) is None
    assert kernel_library.is_obstructed(path)
    monkeypatch.setattr(kernel_library, "is_obstructed", lambda: True)
    assert "_C.so is no file" in str(kernel_library.problem_of("GPU", (9, 0), None))


def test_a_library_that_cannot_be_read_says_nothing(tmp_path, monkeypatch):
    path = tmp_path / "_C.so"
    path.write_bytes(b"\x7fELF")

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    assert kernel_library.built_for(path) == ()
    assert not kernel_library.is_obstructed(path)


@pytest.mark.parametrize(
    ("capability", "codes", "code"),
    [
        ((8, 9), ["sm_80", "sm_90"], "sm_80"),
        ((10, 3), ALL, "sm_100"),
        ((12, 1), ALL, "sm_120"),
        ((9, 0), ["sm_90", "sm_90a", "compute_80"], "sm_90"),
        # Machine code is for one major version, and an `a` for one GPU.
        ((9, 0), ["sm_80", "sm_90a", "compute_80"], "compute_80"),
        ((9, 0), ["sm_80"], None),
        ((13, 0), ALL, "compute_120"),
        ((13, 0), ["compute_80", "compute_120", "compute_90"], "compute_120"),
        # PTX is for later GPUs, not for earlier ones.
        ((9, 0), ["compute_100"], None),
        ((8, 0), ["sm_86"], None),
        ((8, 0), [], None),
    ],
)
def test_a_gpu_takes_the_code_that_the_driver_would(capability, codes, code):
    assert kernel_library.code_for(capability, codes) == code


def test_a_library_is_for_every_gpu_that_it_is_built_for():
    for one in cards.FAMILIES:
        for minor in one.minors:
            capability = (one.major, minor)
            codes = cards.build_for(f"{one.major}.{minor}").codes
            assert kernel_library.problem_of("GPU", capability, codes) is None
            assert kernel_library.choice(capability, codes).gemm == one.gemm


@pytest.mark.parametrize(
    ("capability", "codes", "message"),
    [
        ((7, 5), ("compute_80",), r"Ampere and Ada \(8\.x\), .*; GPU has compute capability 7\.5"),
        ((8, 0), None, r"no CUDA kernels; .*VLLM_QOQ_CUDA=1 pip install .*README"),
        ((8, 0), ("sm_90", "sm_90a"), r"built for sm_90, sm_90a; GPU .* 8\.0; .*ARCHS=8\.0 V"),
        ((8, 0), (), r"built for GPUs that it does not name; .*VLLM_QOQ_CUDA_ARCHS=8\.0 V"),
        (
            (13, 0),
            ("sm_90",),
            r"GPU has compute capability 13\.0; .*VLLM_QOQ_CUDA_ARCHS=all V",
        ),
    ],
)
def test_a_library_for_other_gpus_says_for_which_and_how_to_build(capability, codes, message):
    assert re.search(message, str(kernel_library.problem_of("GPU", capability, codes)))


@pytest.mark.parametrize("codes", [(), ("sm_90", "sm_90a"), ("sm_80",), ("sm_80", "compute_120")])
@pytest.mark.parametrize(
    "name",
    ["8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1", "13.0"],
    ids=lambda name: name,
)
def test_the_build_that_a_message_asks_for_is_for_the_gpu(name, codes):
    capability = tuple(map(int, name.split(".")))
    problem = kernel_library.problem_of("GPU", capability, codes)
    assert (problem is None) == (kernel_library.choice(capability, codes) is not None)
    # Without a library the remedy names no GPU: setup.py finds those that are present.
    asked = re.search(r"VLLM_QOQ_CUDA_ARCHS=(\S+)", problem.remedy) if problem else None
    environment = {"VLLM_QOQ_CUDA_ARCHS": asked[1]} if asked else {}
    build = cards.build_for(cards.asked_for(environment, [capability], NVCC_KNOWS))
    assert kernel_library.problem_of("GPU", capability, build.codes) is None


# What the library says by itself, of a GPU that stands in for the one that it lacks.
PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include "common/built_for.h"

static int major, minor;

extern "C" const char* cudaGetErrorString(cudaError_t) { return "no kernel image"; }
extern "C" cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
extern "C" cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, "Some GPU");
  properties->major = major, properties->minor = minor;
  return cudaSuccess;
}
int main(int, char** arguments) {
  major = std::atoi(arguments[1]), minor = std::atoi(arguments[2]);
  for (auto error : {cudaErrorNoKernelImageForDevice, cudaErrorInvalidValue})
    std::printf("%s\n", qoq::error_text(error).c_str());
}
"""


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")
def test_a_launch_without_code_for_the_gpu_says_what_python_says(tmp_path):
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM)
    subprocess.run(
        [
            *(NVCC, "-std=c++20", "-O1", "-cudart=none", "-I", ROOT / "csrc"),
            *("-DQOQ_BUILT_FOR=sm_90:sm_90a", source, ROOT / "csrc/common/built_for.cpp"),
            *("-o", program),
        ],
        check=True,
    )
    codes = kernel_library.built_for(program)
    assert codes == ("sm_90", "sm_90a")
    for capability in [(8, 9), (10, 3), (10, 4), (11, 0), (12, 1), (12, 2), (13, 0)]:
        command = [program, *map(str, capability)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        no_image, other = done.stdout.splitlines()
        said = kernel_library.problem_of("Some GPU", capability, codes)
        assert no_image == f"no kernel image: {said}"
        assert other == "no kernel image"

"""The CUDA sources without a GPU: what nvcc says of them, and kernels on a model of Hopper."""

import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT

CSRC = ROOT / "csrc"
MODEL = ROOT / "tests" / "kernels" / "kernel_model"
TORCH = Path(torch.__file__).parent / "include"

NVCC = shutil.which("nvcc")
# What the model says of its launches, by what the warpgroups of a tile divide.
KINDS = {
    "Channels": {"one cluster a tile", "split", "rounds", "rounds and a cut one", "cut"},
    "Inputs": {"one cluster a tile", "split", "part of a step"},
}
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")


def needs_the_model(test):
    is_here = os.uname().machine == "x86_64"
    return needs_nvcc(pytest.mark.skipif(not is_here, reason="its fibers are for x86-64")(test))


def run(*command, **options):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_nvcc
@pytest.mark.parametrize(
    "source", sorted(path.relative_to(CSRC) for path in CSRC.rglob("*.cu")), ids=str
)
def test_kernels_compile_without_spills_or_serialised_wgmmas(source, tmp_path):
    said = run(
        *(NVCC, "-arch=sm_90a", "-std=c++20", "-O3", "-Xptxas=-v"),
        *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA", "-I", CSRC, "-I", TORCH),
        # The host's part says nothing here.
        *("-cubin", CSRC / source, "-o", tmp_path / "object.cubin"),
    )
    assert not re.findall(r"\(C75\d\d\).*", said)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert spills
    assert set(spills) == {"0"}


# What only nvcc knows, and what stands for it.
FOR_THE_MODEL = {
    "const __grid_constant__": "const",
    "extern __shared__ char unaligned[];": "char* unaligned = model::shared_begin();",
    "__shared__ Place places[kDequantizeRows];": (
        "auto* places = reinterpret_cast<Place*>(model::shared_begin());"
    ),
}


@pytest.fixture(scope="module")
def build_for_the_model(tmp_path_factory):
    """Makes a program for this machine of kernels: shared memory and all PTX are the model's."""
    folder = tmp_path_factory.mktemp("model")
    for header in (*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")):
        text = header.read_text()
        for original, ours in FOR_THE_MODEL.items():
            text = text.replace(original, ours)
        copy = folder / header.relative_to(CSRC)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(text)
    shutil.copy(MODEL / "hopper.h", folder / "common" / "ptx.cuh")
    shutil.copy(MODEL / "warp.h", folder / "common" / "mma.cuh")
    (folder / "common" / "wgmma.cuh").write_text('#include "ptx.cuh"\n')

    def build(name):
        program = folder / f"{name}.out"  # a folder of headers may have the plain name
        # Fused multiply-adds would round the expected values differently.
        run(
            *(NVCC, "-std=c++20", "-O2", "-Xcompiler=-w,-ffp-contract=off", MODEL / f"{name}.cpp"),
            *("-I", folder, "-o", program),
        )
        return program

    return build


@pytest.fixture(scope="module")
def gemm_on_the_model(build_for_the_model):
    return build_for_the_model("gemm")


@needs_the_model
@pytest.mark.parametrize("seed", [1, 2])
def test_every_tile_and_schedule_is_exact_in_any_order_of_threads(gemm_on_the_model, seed):
    said = run(gemm_on_the_model, seed, timeout=300)
    reached = defaultdict(set)
    for tile, weights, kinds in re.findall(
        r"^(\w+) (g128|per channel|nested): (.*): M", said, re.M
    ):
        reached[tile, weights] |= set(kinds.split(", "))
    config = (CSRC / "gemm" / "w4a8_config.h").read_text()
    wanted = {
        # The only tile whose clusters divide k.
        (tile, weights): KINDS[divide] | ({"idle rank"} if tile == "Inputs128Pair" else set())
        for tile, divide in re.findall(r"^using (\w+) += Tile<Divide::k(\w+),", config, re.M)
        for weights in (("nested",) if tile.startswith("Nested") else ("g128", "per channel"))
    }
    assert reached == wanted


@needs_the_model
@pytest.mark.parametrize("program", ["kv_decode", "kv_pages"])
def test_kv_kernels_are_right_in_any_order_of_threads(build_for_the_model, program):
    binary = build_for_the_model(program)
    for seed in (1, 2):
        said = run(binary, seed, timeout=300)
        # Both head sizes and bits, and query heads that share a KV head in one tile or two.
        assert len(re.findall(r"^D (?:64|128), [48] bits, .* 0 wrong", said, re.M)) >= 12

"""The CUDA sources without a GPU: what nvcc says of them, and kernels on a model of a GPU."""

import os
import re
import shutil
import subprocess
from collections import defaultdict
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from vllm_qoq import cards

CSRC = ROOT / "csrc"
MODEL = ROOT / "tests" / "kernels" / "kernel_model"
TORCH = Path(torch.__file__).parent / "include"

NVCC = shutil.which("nvcc")
# What the model says of its launches, by what the warpgroups of a tile divide.
KINDS = {
    "Channels": {"one cluster a tile", "split", "rounds", "rounds and a cut one", "cut"},
    "Inputs": {"one cluster a tile", "split", "part of a step"},
}
# The tiles that rows of experts are laid out in (`kExpertTiles`), and what is run of them.
OF_EXPERTS = {"16", "64", "128"}
EXPERT_KINDS = {"experts in rounds", "experts split", "no expert"}
FLAT = ("per channel", "g128", "g64", "g32")
NESTED = ("nested g128", "nested g64", "nested g32")
FINE = {"g64", "g32", "nested g64", "nested g32"}  # which only some tiles are run for
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


# Bytes that ptxas may spill of the GEMM on a family: beside the loop over k, of what is needed once
# for a piece of work.
MOST_SPILLED = {"100": 64}
# And of the decode attention with three warps of a scheduler: what its loop reads once a tile. GPUs
# of 12.x have no room for so many.
MOST_SPILLED_WIDE = {"100": 48, "120": 40}


def compiled(source, architecture, folder, *options):
    """What ptxas says of a source's kernels: registers, spills, serialised wgmmas."""
    return run(
        *(NVCC, f"-arch=sm_{architecture}", "-std=c++20", "-O3", "-Xptxas=-v"),
        *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA", "-I", CSRC, "-I", TORCH),
        # The host's part says nothing here.
        *(*options, "-cubin", source, "-o", folder / "object.cubin"),
    )


def spills(said):
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert found
    return {int(number) for pair in found for number in pair}


def architecture_of(source):
    """The one that a source is compiled for here: the oldest that it is for."""
    is_for_hopper = str(source).startswith("gemm/hopper/")
    return cards.HOPPER_CODE if is_for_hopper else cards.FAMILIES[0].code


@needs_nvcc
@pytest.mark.parametrize(
    "source", sorted(path.relative_to(CSRC) for path in CSRC.rglob("*.cu")), ids=str
)
def test_kernels_compile_without_spills_or_serialised_wgmmas(source, tmp_path):
    said = compiled(CSRC / source, architecture_of(source), tmp_path)
    assert not re.findall(r"\(C75\d\d\).*", said)
    if "Compiling entry function" in said:  # else there is only the host's part
        assert spills(said) == {0}


def portable_kernels(folder, *kernels):
    """A source with these kernels alone, each a tile and its weights."""
    source = folder / "kernels.cu"
    source.write_text(
        '#include "gemm/portable/kernel.cuh"\nusing namespace qoq::w4a8;\n'
        + "".join(
            f"template __global__ void portable::w4a8_gemm_portable<portable::{tile}, "
            f"Weights::{weights}, Params>(const __grid_constant__ Params);\n"
            for tile, weights in kernels
        )
    )
    return source


@needs_nvcc
@pytest.mark.parametrize("code", [one.code for one in cards.FAMILIES[1:]])
def test_the_portable_tiles_with_the_fewest_registers_to_spare_spill_on_no_family(code, tmp_path):
    tightest = (("Tile256", "kG128"), ("Tile128", "kNestedG64"), ("Tile64", "kNestedG32"))
    source = portable_kernels(tmp_path, *tightest)
    assert max(spills(compiled(source, code, tmp_path))) <= MOST_SPILLED.get(code, 0)


def decode_kernel(folder, page, tiles):
    """A source with a kernel of the decode attention: head size, bits of K and V.

    `tiles` are the head tiles, the warps, and whether sequences have several new tokens.
    """
    source = folder / "kernel.cu"
    source.write_text(
        '#include "kv/decode_kernel.cuh"\nnamespace qoq::kv {\n'
        f"template __global__ void kv_decode_kernel<Attention<Page<{page}>, {tiles}>>"
        "(const __grid_constant__ Params);\n}\n"
    )
    return source


@needs_nvcc
@pytest.mark.parametrize(
    ("page", "tiles"),
    [
        ("128, 4, 4", "1, 8, false"),
        ("256, 8, 4", "1, 8, false"),
        ("128, 4, 4", "1, 8, true"),
        ("128, 4, 4", "2, 12, true"),
    ],
)
@pytest.mark.parametrize("code", [one.code for one in cards.FAMILIES[1:]])
def test_the_decode_attention_with_the_fewest_registers_spills_as_little_as_known(
    code, page, tiles, tmp_path
):
    said = compiled(decode_kernel(tmp_path, page, tiles), code, tmp_path)
    most = MOST_SPILLED_WIDE.get(code, 0) if tiles == "2, 12, true" else 0
    assert max(spills(said)) <= most


@needs_nvcc
def test_every_gpu_has_the_instructions_of_the_portable_path(tmp_path):
    source = portable_kernels(tmp_path, ("Tile8", "kG128"))
    others = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in (86, 87, 89, 103, 121)]
    run(NVCC, *others, "-std=c++20", "-I", CSRC, "-fatbin", source, "-o", tmp_path / "all.fatbin")


@needs_nvcc
def test_a_portable_build_has_the_code_of_the_oldest_gpus_on_a_newer_one(tmp_path):
    source = decode_kernel(tmp_path, "64, 4, 4", "1, 8, false")

    def ptx(code, *options):
        out = tmp_path / "kernel.ptx"
        options = (f"-arch=compute_{code}", "-std=c++20", "-I", CSRC, *options)
        run(NVCC, *options, "-ptx", source, "-o", out)
        return re.sub(r"^\.target .*", "", out.read_text(), flags=re.M)

    portable = ptx("90", "-DQOQ_PORTABLE")
    assert portable == ptx(cards.FAMILIES[0].code)
    only_newer = re.compile(r"cp\.async\.bulk|mbarrier|griddepcontrol")
    assert only_newer.search(ptx("90")) and not only_newer.search(portable)


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
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
    shutil.copy(MODEL / "hopper.h", folder / "common" / "ptx.cuh")
    shutil.copy(MODEL / "warp.h", folder / "common" / "mma.cuh")
    shutil.copy(MODEL / "cp_async.h", folder / "common" / "cp_async.cuh")
    (folder / "common" / "wgmma.cuh").write_text('#include "ptx.cuh"\n')

    def build(name, *options):
        program = folder / f"{name}.out"  # a folder of headers may have the plain name
        # Fused multiply-adds would round the expected values differently.
        run(
            *(NVCC, "-std=c++20", "-O1", "-Xcompiler=-w,-ffp-contract=off"),
            *(MODEL / f"{name}.cpp", "-I", folder, *options, "-o", program),
        )
        return program

    return build


@pytest.fixture(scope="module")
def gemm_on_the_model(build_for_the_model):
    return build_for_the_model("gemm")


def has_experts(tile, weights):
    kind, tokens = re.fullmatch(r"(\D+)(\d+)\w*", tile).groups()
    return (
        kind in ("Tile", "Nested")
        and tokens in OF_EXPERTS
        and tile.endswith(tokens)
        and (weights not in FINE)
    )


def kinds_reached(said):
    """The kinds of schedules that a program of a GEMM has run, by tile and weights."""
    reached = defaultdict(set)
    for tile, weights, kinds in re.findall(
        rf"^(\w+) ({'|'.join((*FLAT, *NESTED))}): (.*): M", said, re.M
    ):
        reached[tile, weights] |= set(kinds.split(", "))
    return reached


@needs_the_model
@pytest.mark.parametrize("seed", [1, 2])
def test_every_tile_and_schedule_is_exact_in_any_order_of_threads(gemm_on_the_model, seed):
    said = run(gemm_on_the_model, seed, timeout=300)
    tiles = (CSRC / "gemm" / "hopper" / "tiles.h").read_text()
    wanted = {
        # The only tile whose clusters divide k.
        (tile, weights): KINDS[divide]
        | ({"idle rank"} if tile == "Inputs128Pair" else set())
        | (EXPERT_KINDS if has_experts(tile, weights) else set())
        for tile, divide in re.findall(r"^using (\w+) += Tile<Divide::k(\w+),", tiles, re.M)
        for weights in (NESTED if tile.startswith("Nested") else FLAT)
        if weights not in FINE or tile in ("Tile16", "Tile128Wide", "Inputs64", "Nested16")
    }
    assert kinds_reached(said) == wanted


@needs_the_model
def test_every_portable_tile_and_schedule_is_exact_in_any_order_of_threads(build_for_the_model):
    program = build_for_the_model("gemm_portable")
    tiles = (CSRC / "gemm" / "portable" / "tiles.h").read_text()
    wanted = {
        (tile, weights): KINDS["Channels"]
        | ({"part of a step"} if step == "2" else set())
        | (EXPERT_KINDS if has_experts(tile, weights) else set())
        for tile, step in re.findall(r"^using (\w+) += Tile<.*, (\d), \d>", tiles, re.M)
        for weights in (FLAT if tile == "Tile256" else FLAT + NESTED)
        if weights not in FINE or tile in ("Tile8", "Tile64", "Tile256")
    }
    assert kinds_reached(run(program, 1, timeout=300)) == wanted


@needs_the_model
@pytest.mark.parametrize("program", ["kv_decode", "kv_pages"])
def test_kv_kernels_are_right_in_any_order_of_threads(build_for_the_model, program):
    binary = build_for_the_model(program)
    for seed in (1, 2):
        said = run(binary, seed, timeout=300)
        # Head sizes, all widths, and query heads that share a KV head in one tile or two.
        found = re.findall(r"^D (\d+), ([48] and [48]) bits, .* 0 wrong", said, re.M)
        assert set(found) == {
            *product(("64", "128"), ("4 and 4", "8 and 8", "8 and 4")),
            *product(("96", "256"), ("4 and 4", "8 and 8")),
        }
        assert len(found) >= 26
        several = re.findall(r"^D (\d+), .* heads, [2-8] tokens, .* 0 wrong", said, re.M)
        assert program == "kv_pages" or set(several) == {"64", "96", "128", "256"}


@needs_the_model
def test_the_decode_attention_is_right_without_the_copy_engine(build_for_the_model):
    binary = build_for_the_model("kv_decode", "-DMODEL_WITHOUT_COPY_ENGINE")
    said = run(binary, 1, timeout=300)
    assert len(re.findall(r"^D \d+, [48] and [48] bits, .* 0 wrong", said, re.M)) == 35

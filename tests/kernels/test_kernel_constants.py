"""Numbers that the CUDA sources and Python both have: they are the same."""

import re

import pytest
from conftest import ROOT

from vllm_qoq.bench import attention_cases
from vllm_qoq.numerics import kv_layout, reference
from vllm_qoq.ops import expert_ops, kv_ops, linear_ops, w4a8_layout

CSRC = ROOT / "csrc"
# Header, name there, and the number in Python.
CONSTANTS = [
    ("gemm/w4a8_config.h", "kBlockN", w4a8_layout.BLOCK_N),
    ("gemm/w4a8_config.h", "kBlockK", w4a8_layout.BLOCK_K),
    ("gemm/w4a8_config.h", "kCodeBytes", w4a8_layout.CODE_BYTES),
    ("gemm/w4a8_config.h", "kParamBytes", w4a8_layout.PARAM_BYTES),
    ("gemm/w4a8_config.h", "kResidualZero", reference.RESIDUAL_ZERO),
    ("gemm/w4a8_config.h", "kMaxK", linear_ops.MAX_K),
    ("gemm/w4a8_config.h", "kMaxRows", linear_ops.MAX_ROWS),
    ("gemm/w4a8_config.h", "kCounters", linear_ops.WORKSPACE_COUNTERS),
    ("gemm/w4a8_config.h", "kMaxTileInts", linear_ops.WORKSPACE_SUMS_OF_PROCESSOR),
    ("experts/route.cu", "kMostExperts", expert_ops.MOST_EXPERTS),
    ("quantize/rows.cuh", "kInt8Max", reference.INT8_MAX),
    ("quantize/rows.cuh", "kMinScale", reference.MIN_SCALE),
    ("kv/page.h", "kTokenMultiple", kv_layout.BLOCK_MULTIPLE),
    ("kv/page.h", "kScaleBytes", kv_layout.SCALE_AND_ZERO_BYTES),
    ("kv/write.cuh", "kLargest", kv_layout.FP16_MAX),
    ("kv/write.cuh", "kSmallestScale", kv_layout.SMALLEST_SCALE),
    ("kv/decode_config.h", "kMaxGroup", kv_ops.MAX_GROUP),
    ("kv/decode_config.h", "kMaxQueryLen", kv_ops.MAX_QUERY_LEN),
    ("kv/decode_config.h", "kMaxBlocks", kv_ops.WORKSPACE_COUNTERS),
    ("kv/decode_config.h", "kPartialPadding", kv_ops.WORKSPACE_PADDING),
    ("kv/decode_config.h", "kFewestWarps", kv_ops.DECODE_FEWEST_WARPS),
    ("kv/decode_config.h", "kTileTokens", kv_ops.DECODE_TILE),
    ("kv/decode_config.h", "kHeadsOfTile", kv_ops.TILE_GROUP),
]


def constants_of(header):
    """The constants of a header that are plain arithmetic, by name; others are left out."""
    found = {}
    pattern = r"^(?:inline )?constexpr (\w+) (k\w+) = ([^;]+);"
    for kind, name, value in re.findall(pattern, header, re.M):
        plain = re.sub(r"(?<=[\d.])f\b", "", value)
        if kind == "int":
            plain = plain.replace("/", "//")
        try:
            found[name] = eval(plain, {"__builtins__": {}}, found)
        except (NameError, SyntaxError):
            continue  # depends on a template's parameters or on another header
    return found


def test_constants_are_read_as_a_compiler_reads_them():
    header = """
inline constexpr int kA = 1 << 4;
constexpr float kB = 1.5e-2f;  // of something
inline constexpr int kC = (kA + 3) / 2;
inline constexpr int kOther = kElsewhere;
template <bool kIs>
inline constexpr int kEither = kIs ? 1 : 2;
"""
    assert constants_of(header) == {"kA": 16, "kB": 0.015, "kC": 9}


@pytest.mark.parametrize("header, name, value", CONSTANTS, ids=str)
def test_a_constant_is_the_same_in_python(header, name, value):
    assert constants_of((CSRC / header).read_text())[name] == value


def test_the_kernels_have_every_head_size_and_bits_of_python():
    host = (CSRC / "kv" / "host.h").read_text()
    sizes = re.findall(r"dispatch_bits\.template operator\(\)<(\d+)>", host)
    assert sorted(map(int, sizes)) == sorted(kv_layout.HEAD_SIZES)
    pages = re.findall(r"Page<kHeadSize, (\d), (\d)>", host)
    assert {(int(k), int(v)) for k, v in pages} == set(kv_layout.WIDTHS.values())


def test_python_halves_the_groups_that_the_kernels_halve():
    config = (CSRC / "kv" / "decode_config.h").read_text()
    (sizes,) = re.findall(r"has_one_tile\(int head_size\) \{\s*return ([^;]+);", config)
    assert tuple(map(int, re.findall(r"\d+", sizes))) == kv_ops.HALVED_SIZES


def test_the_range_of_a_head_is_bounded_alike():
    bound = re.search(
        r"kSmallestRange = Codes::kBits == 4 \? 1\.f / (\d+) : 1\.f / (\d+);",
        (CSRC / "kv" / "write.cuh").read_text(),
    )
    assert {4: float(bound[1]), 8: float(bound[2])} == kv_layout.LARGEST_OFFSET


def test_the_workspace_has_room_for_all_blocks_that_a_processor_holds():
    resident = re.search(
        r"kResident =\s[^;?]+\? (\d+) : (\d+);", (CSRC / "kv" / "decode_config.h").read_text()
    )
    assert max(map(int, resident.groups())) == kv_ops.WORKSPACE_BLOCKS_OF_PROCESSOR


def test_the_shared_memory_of_the_decode_attention_is_what_the_model_says():
    """Computed by hand from csrc/kv/decode_config.h."""
    known = {
        **{(128, 4, 4): 43696, (128, 4, 8): 52144, (128, 8, 16): 101808, (64, 8, 4): 74480},
        **{(128, "k8v4", 16): 85424, (64, "k8v4", 4): 58096},
        # Halves of 16 query heads: as much as of 8.
        **{(256, 4, 16): 101296, (256, 4, 8): 101296, (256, 8, 8): 166832, (96, 8, 16): 64432},
        # 4 heads of 4 tokens are as 16 heads, and 64 columns are 4 parts of 16.
        **{(128, 8, 4, 4): 101856, (128, 8, 16, 4): 101856, (256, 8, 8, 2): 166880},
    }
    for arguments, expected in known.items():
        assert kv_ops.decode_shared_bytes(*arguments) == expected


def test_the_benchmark_knows_what_the_kernels_serve():
    assert attention_cases.HEAD_SIZES == kv_layout.HEAD_SIZES
    assert attention_cases.MAX_GROUP == kv_ops.MAX_GROUP
    assert attention_cases.MAX_QUERY_LEN == kv_ops.MAX_QUERY_LEN
    assert attention_cases.BLOCK_MULTIPLE == kv_layout.BLOCK_MULTIPLE


def test_the_tiles_of_experts_are_those_of_the_kernels():
    text = (CSRC / "gemm" / "w4a8_config.h").read_text()
    (tiles,) = re.findall(r"kExpertTiles\[\] = \{([\d, ]+)\}", text)
    assert tuple(map(int, tiles.split(","))) == expert_ops.TILES

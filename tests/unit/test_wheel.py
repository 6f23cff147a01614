"""What `make wheel` says of the wheel that it has built."""

import importlib.util
import struct
import zipfile

import pytest
from conftest import ROOT
from toolkits import make_toolkit

SM_80, SM_90, PTX_90 = (2, 80), (2, 90), (1, 90)
LOG = """\
ptxas info    : Compiling entry function '_Z1aPi' for 'sm_80'
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 308 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bPi' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 0 barriers
ptxas info    : Compiling entry function '_Z1cPi' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 64 bytes smem
"""


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("wheel", ROOT / ".ci" / "wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fat_binary(*entries):
    """As nvcc writes it into a library, with entries of ((kind, architecture), bytes)."""
    body = b""
    for (kind, architecture), size in entries:
        header = struct.pack("<HHIQ", kind, 0x101, 64, size - 64)
        body += header.ljust(28, b"\0") + struct.pack("<I", architecture).ljust(size - 28, b"\0")
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_the_code_for_every_architecture_is_counted_and_what_its_kernels_need(script, tmp_path):
    # Those of two sources lie one behind the other.
    library = (
        b"\x7fELF"
        + fat_binary((SM_80, 400_000), (SM_90, 600_000))
        + fat_binary((SM_80, 100_000), (SM_90, 200_000), (PTX_90, 300_000))
    )
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm_qoq/_C.so", library + b"\0of the host")
    header, *rows = script.table(wheel, LOG).splitlines()
    assert header.split() == [
        "code",
        "size",
        "kernels",
        "spilled",
        "bytes",
        "registers",
        "shared",
        "bytes",
    ]
    assert [row.split() for row in rows] == [
        ["compute_90", "0.3", "MB", "0", "0", "0", "0"],
        ["sm_80", "0.5", "MB", "1", "8", "72", "308"],
        ["sm_90", "0.8", "MB", "2", "0", "168", "64"],
    ]


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ("compute_80 compute_90", "does not compile for 100, 120"),
        (None, "there is no nvcc in CUDA_HOME"),
    ],
)
def test_an_nvcc_that_lacks_a_gpu_is_named_before_anything_is_installed(
    script, tmp_path, monkeypatch, known, said
):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if known:
        make_toolkit(tmp_path, known)
    with pytest.raises(SystemExit, match=said):
        script.main()

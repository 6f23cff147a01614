"""The library's link flags, with a compiler that puts the C++ runtime into the library.

Such a library has two copies of the runtime beside it, its own and torch's. If they mix, a number
in an error message crashes the process or ends the message.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

TORCH = Path(torch.__file__).parent
GXX = shutil.which("g++")
LINK = re.search(r'^LINK = "(.+)"', (ROOT / "setup.py").read_text(), re.M).group(1)

SOURCE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

torch::stable::Tensor refuse(const torch::stable::Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 7, "x has ", x.dim(), " dimensions, expected ", std::string("7"));
  return x;
}
STABLE_TORCH_LIBRARY(static_runtime, m) { m.def("refuse(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(static_runtime, CPU, m) { m.impl("refuse", TORCH_BOX(&refuse)); }
"""

PROGRAM = """
import sys, torch
torch.ops.load_library(sys.argv[1])
try:
    torch.ops.static_runtime.refuse(torch.ones(2, 2))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(GXX is None, reason="there is no g++ here")
def test_a_refusal_says_its_numbers_where_the_runtime_is_in_the_library(tmp_path):
    source, library = tmp_path / "op.cpp", tmp_path / "op.so"
    source.write_text(SOURCE)
    subprocess.run(
        [
            *(GXX, "-shared", "-fPIC", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
            *("-static-libstdc++", "-Wl,-Bsymbolic-functions", LINK, f"-I{TORCH / 'include'}"),
            *(source, f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-o", library),
        ],
        check=True,
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "x has 2 dimensions, expected 7" in done.stdout

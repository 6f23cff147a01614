"""The Triton kernels of the quantizer, in Triton's interpreter, against plain PyTorch."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from rounding_cases import assert_alike, cases, results

from vllm_qoq.quantizer import rounding_plain


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What the kernels return, from a process in which Triton only interprets."""
    file = tmp_path_factory.mktemp("rounding") / "results.pt"
    script = ROOT / "tests" / "support" / "rounding_cases.py"
    subprocess.run([sys.executable, script, file], check=True, timeout=300)
    return torch.load(file)


@pytest.fixture(scope="module")
def plain():
    return results(rounding_plain)


@pytest.mark.parametrize("name", cases())
def test_a_kernel_computes_what_pytorch_does(name, interpreted, plain):
    assert_alike(name, interpreted[name], plain[name])


def test_the_cases_change_codes(plain):
    """A case in which nothing is passed on would show nothing."""
    assert (plain["round"][0] != plain["round alone"][0]).float().mean() > 0.2
    for name in ("descend", "descend within reach"):
        before = cases()[name][1][0]
        assert 0.1 < (plain[name][0] != before).float().mean() < 0.9
    scale, offset, _ = plain["search"]
    assert scale.unique().numel() > 4 and offset.unique().numel() > 10


def test_what_a_row_tries_does_not_depend_on_other_rows(plain):
    """A row of small groups finds the same beside rows whose groups have the largest scale."""
    level1, *rest = cases()["search"][1]
    alone = [rounding_plain.search(level1[i : i + 1], *rest)[2] for i in range(len(level1))]
    assert torch.allclose(torch.cat(alone), plain["search"][2], rtol=1e-5)

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


def test_a_row_needs_nothing_of_the_others(plain):
    """Neither the search's reach nor anything else depends on how many rows are rounded."""
    alone = {
        name: getattr(rounding_plain, function)(
            *[a[:1] if torch.is_tensor(a) and len(a) == len(given[0]) else a for a in given]
        )
        for name, (function, given) in cases().items()
    }
    for name, found in alone.items():
        first = found[0] if isinstance(found, tuple) else found
        assert torch.equal(first, plain[name][0][:1]), name

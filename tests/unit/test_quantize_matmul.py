"""Products of float32 matrices in halves of TF32."""

import torch

from vllm_qoq.quantizer import matmul


def test_halves_add_up_to_the_number_and_the_first_is_a_tf32():
    x = torch.randn(64, 65).exp() * torch.randn(64, 65)
    high, low = matmul._halves(x.t())
    assert torch.equal(high + low, x.t())
    assert not (high.view(torch.int32) & 0x1FFF).any()
    assert (low.abs() <= x.t().abs() * 2**-10).all()


def test_three_products_of_halves_are_next_to_exact():
    left, right = torch.randn(40, 700).exp(), torch.randn(700, 30)
    (a, b), (c, d) = ([half.double() for half in matmul._halves(x)] for x in (left, right))
    exact, scale = left.double() @ right.double(), left.double() @ right.double().abs()
    assert ((a @ c + a @ d + b @ c - exact).abs() / scale).max() < 2**-19


def test_a_product_is_added_and_a_whole_one_is_the_sum_of_its_panels():
    """To the rounding of float32, whose sums of 2053 numbers depend on their order."""
    left, right = torch.randn(3, 2 * matmul.PANEL + 5), torch.randn(2 * matmul.PANEL + 5, 4)
    out = torch.ones(3, 4)
    matmul.add_product(out, left, right, alpha=-1)
    exact = left.double() @ right.double()
    most = 1e-6 * (left.double().abs() @ right.double().abs())
    assert ((out - (1 - exact)).abs() < most).all()
    assert ((matmul.product(left, right) - exact).abs() < most).all()

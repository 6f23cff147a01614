"""The quantizer on a GPU: its Triton kernels, GPTQ and Hessians against the CPU's."""

import pytest
import torch
from rounded_layers import KINDS, correlated_inputs, round_one
from rounding_cases import assert_alike, cases, results

from vllm_qoq.quantizer import gptq, matmul, rounding_plain, rounding_triton
from vllm_qoq.quantizer.hessian import HessianSum

pytestmark = pytest.mark.gpu

N, K = 1040, 1024


@pytest.fixture(scope="module")
def found():
    return results(rounding_triton, "cuda", rows=1000), results(rounding_plain, rows=1000)


@pytest.mark.parametrize("name", cases())
def test_a_kernel_computes_what_pytorch_does(name, found):
    on_gpu, plain = found
    assert_alike(name, on_gpu[name], plain[name])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gptq_loses_what_the_cpu_loses_and_twice_the_same(kind):
    weight, x = torch.randn(N, K, generator=torch.Generator().manual_seed(0)), correlated_inputs(K)
    hessian = x.t() @ x / len(x)
    errors, codes = [], []
    for device in ("cpu", "cuda", "cuda"):
        whole = gptq.row_losses(weight, hessian)
        grid, lost = round_one(kind, weight.to(device), hessian.to(device))
        errors.append(gptq.output_error(lost.cpu(), whole))
        codes.append(grid.codes.cpu())
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    assert errors[2] == errors[1] and torch.equal(codes[1], codes[2])
    assert (codes[0] == codes[1]).float().mean() > 0.8


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_weights_are_the_cpus_where_no_input_tells_of_another(kind):
    """With inputs that are independent nothing is summed but the errors of the searches."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    grids = [round_one(kind, weight.to(d), torch.eye(K, device=d))[0] for d in ("cpu", "cuda")]
    plain, found = (grid.dequantized().cpu() for grid in grids)
    # The scale of a row is not the same to the last bit, since a GPU divides by a constant as it
    # multiplies by the inverse; a row's zero may take away nearly all of a small weight.
    is_equal = torch.isclose(found, plain, rtol=1e-5, atol=1e-5).unflatten(1, (-1, 128)).all(dim=2)
    # A search may choose the other of two grids that lose the same.
    assert is_equal.float().mean() > 0.98
    assert (plain - weight).norm() == pytest.approx(float((found - weight).norm()), rel=1e-5)


def test_products_on_tensor_cores_are_as_exact_as_float32():
    left, right = torch.randn(300, 3000).exp(), torch.randn(3000, 500)
    exact, scale = left.double() @ right.double(), left.double() @ right.double().abs()
    before = torch.get_float32_matmul_precision()
    found = matmul.product(left.cuda(), right.cuda()).cpu().double()
    assert ((found - exact).abs() / scale).max() < 2e-6  # TF32 alone is off by 1e-4
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_hessian_of_16_bit_inputs_is_exact_but_for_its_sums(dtype):
    pieces = [correlated_inputs(K, seed=i).to(dtype) for i in range(4)]
    total = HessianSum(K, torch.device("cuda"))
    for piece in pieces:
        total.add(piece[None].cuda())
    exact = torch.cat(pieces).double()
    exact = exact.t() @ exact / len(exact)
    found = total.take_mean().cpu().double()
    assert (found - exact).abs().max() < 1e-5 * exact.diagonal().max()
    assert torch.equal(found, found.t()) or (found - found.t()).abs().max() < 1e-5 * exact.max()

"""Rounding of layers with one input: Hessians, losses, shared work, and writing beside it."""

import threading

import pytest
import torch
from rounded_layers import KINDS, correlated_inputs, round_one
from torch.nn import functional

from vllm_qoq.quantizer import QuantizeError, evaluate, gptq, products, rounding
from vllm_qoq.quantizer.hessian import HessianSum, factored
from vllm_qoq.quantizer.layers import round_layers
from vllm_qoq.quantizer.sets import SetKind
from vllm_qoq.quantizer.workdir import WorkDir
from vllm_qoq.quantizer.writer import PieceWriter

NESTED = (SetKind("w8a8", 128, "w4a8"), SetKind("w4a8", 128))


def weight(n, k=256, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [128, 640])
def test_the_hessian_is_the_mean_over_all_inputs(k):
    pieces = [correlated_inputs(k, seed=i).bfloat16() for i in range(3)]
    total = HessianSum(k, torch.device("cpu"))
    for piece in pieces:
        total.add(piece.view(2, -1, k))
    x = torch.cat(pieces).double()
    exact, found = x.t() @ x / len(x), total.take_mean()
    assert torch.equal(found, found.t())
    assert (found - exact).abs().max() < 1e-6 * exact.max()


def test_the_factor_is_that_of_the_inverse():
    x = correlated_inputs(256)
    inputs = factored(x.t() @ x / len(x), "layer")
    upper = inputs.lower.t()
    assert torch.equal(upper, upper.triu())
    identity = upper.double().t() @ upper.double() @ inputs.hessian.double()
    assert (identity - torch.eye(256)).abs().max() < 1e-3


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_loss_is_that_of_the_outputs_on_the_calibration_text(kind):
    """Without the damping of the Hessian, and with inputs that are always zero."""
    layer, x = weight(24), correlated_inputs()
    x[:, 30:50] = 0
    grid, lost = round_one(kind, layer, x.t() @ x / len(x))
    exact = (x @ (layer - grid.dequantized()).t()).square().mean(dim=0)
    assert torch.allclose(lost, exact, rtol=2e-3)


@pytest.mark.parametrize("use_gptq", [False, True])
def test_layers_with_one_input_are_rounded_as_if_alone(use_gptq):
    x = correlated_inputs()
    hessian = x.t() @ x / len(x)
    layers = {"q": weight(24), "k": weight(8, seed=1), "v": weight(16, seed=2)}
    together = round_layers(layers, hessian.clone(), NESTED, use_gptq, clip=True)
    for name, one in layers.items():
        alone = round_layers({name: one}, hessian.clone(), NESTED, use_gptq, clip=True)[name]
        assert [found.kind for found in together[name]] == list(NESTED)
        for found, wanted in zip(together[name], alone, strict=True):
            assert found.row["layer"] == name and found.row["set"] == wanted.row["set"]
            # A product of other sizes may be summed in another order.
            is_equal = (found.grid.codes == wanted.grid.codes).float().mean()
            assert is_equal > 0.9
            assert found.row["output_error"] == pytest.approx(wanted.row["output_error"], rel=0.02)
            tensors = found.grid.tensors(torch.bfloat16)
            assert all(len(tensor) == len(one) for tensor in tensors.values())
        assert together[name][0].row["clipped_share"] < 0.1


def test_layers_with_one_input_share_its_rounding(monkeypatch):
    calls = []
    real = evaluate.to_int8
    monkeypatch.setattr(evaluate, "to_int8", lambda x: calls.append(1) or real(x))
    q, k, o = (torch.nn.Linear(64, 8) for _ in range(3))
    x, y = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    wanted = [q(real(x)), k(real(x)), o(real(y))]
    with evaluate.int8_inputs((q, k, o)):
        found = [q(x), k(x), o(y)]
    assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_without_instructions_are_those_of_float32_rounded_once(monkeypatch, dtype):
    monkeypatch.setattr(products, "has_half_products", lambda: False)
    x, w, bias = (torch.randn(*shape).to(dtype) for shape in ((1, 3, 9, 64), (32, 64), (32,)))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    with products.fast_products():
        linear = functional.linear(x, w, bias=bias)
        attention = functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        product = x[0] @ x[0].transpose(1, 2)
        assert functional.linear(x.double(), w.double()).dtype == torch.float64
    wide = x.float()
    assert torch.equal(linear, functional.linear(wide, w.float(), bias.float()).to(dtype))
    assert torch.equal(product, (wide[0] @ wide[0].transpose(1, 2)).to(dtype))
    exact = functional.scaled_dot_product_attention(wide, wide, wide, attn_mask=mask)
    assert torch.equal(attention, exact.to(dtype))


def test_a_device_without_kernels_is_refused_with_the_remedy(monkeypatch):
    class Broken:
        def search(self, *arguments, **options):
            raise RuntimeError("Failed to find C compiler")

    rounding.require(torch.device("cpu"))
    monkeypatch.setattr(rounding, "on", lambda device: Broken())
    with pytest.raises(QuantizeError, match=r"Failed to find C compiler; install a C compiler"):
        rounding.require(torch.device("cpu"))


def test_a_piece_is_written_while_the_next_one_is_computed(tmp_path, monkeypatch):
    may_write, real = threading.Event(), WorkDir.save

    def save(self, name, tensors, facts):
        assert may_write.wait(30)
        real(self, name, tensors, facts)

    monkeypatch.setattr(WorkDir, "save", save)
    with WorkDir.open(tmp_path / "work", {}, "auto") as work:
        writer = PieceWriter(work)
        writer.save("a", {"x": torch.ones(3)}, ["fact"])
        assert not work.has("a")  # and yet `save` has returned
        may_write.set()
        writer.save("b", {"x": torch.zeros(3)}, [])
        assert work.facts("a") == ["fact"]
        writer.close()
        assert torch.equal(work.load("b")["x"], torch.zeros(3))


def test_an_error_of_a_write_is_not_lost(tmp_path, monkeypatch):
    def full(self, name, tensors, facts):
        raise OSError(28, "No space left on device")

    with WorkDir.open(tmp_path / "work", {}, "auto") as work:
        monkeypatch.setattr(WorkDir, "save", full)
        writer = PieceWriter(work)
        writer.save("a", {"x": torch.ones(3)}, [])
        with pytest.raises(OSError, match="No space left"):
            writer.close()


def test_the_error_of_a_layer_is_relative_to_its_outputs():
    x, one = correlated_inputs(), weight(8)
    hessian = x.t() @ x / len(x)
    whole = gptq.row_losses(one, hessian)
    assert torch.allclose(whole, (x @ one.t()).square().mean(dim=0), rtol=1e-4)
    assert gptq.output_error(whole / 4, whole) == pytest.approx(0.5)

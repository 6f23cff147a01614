"""Heads, channels, rows and whole layers of zeros, as padded and pruned models have them."""

import functools
import json
import math
import shutil

import pytest
import torch
from conftest import DATA
from rounded_layers import KINDS, fill, output_error
from safetensors.torch import load_file, save_file
from transformed_models import Model
from transformers import AutoModelForCausalLM

from vllm_qoq.checkpoint import verify
from vllm_qoq.progress import Progress
from vllm_qoq.quantizer import QuantizeError, evaluate, job, strength
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.plan import Job
from vllm_qoq.quantizer.sets import SetKind, dequantize

HEADS, SIZE, TOKENS = 3, 32, 64
Q, K, V, OUT, GATE, UP, DOWN = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def random_keys():
    """Keys, and the magnitudes of the pairs of their queries."""
    torch.manual_seed(0)
    return torch.randn(TOKENS, HEADS, SIZE), torch.rand(HEADS, SIZE // 2) + 0.1


@functools.cache
def scales_of_random_keys(use_hadamard):
    return strength.key_scale(*random_keys(), 4, use_hadamard)


@pytest.mark.parametrize("use_hadamard", [False, True])
@pytest.mark.parametrize("queries", ["zero", "random"])
@pytest.mark.parametrize("keys", ["zero head", "zero pair", "tiny", "all zero", "constant"])
def test_scales_of_keys_are_finite_and_leave_other_heads_alone(keys, queries, use_hadamard):
    expected = scales_of_random_keys(use_hadamard)
    changed, asked = random_keys()
    if keys == "zero head":
        changed[:, 1] = 0
    elif keys == "zero pair":
        changed[:, 1, [3, 3 + SIZE // 2]] = 0
    elif keys == "tiny":
        changed[:, 1] *= 1e-30
    elif keys == "all zero":
        changed.zero_()
    else:
        changed[:, 1] = 2.5
    if queries == "zero":
        asked[1] = 0
    found = strength.key_scale(changed, asked, 4, use_hadamard)
    assert found.isfinite().all() and (found > 0).all()
    if keys != "all zero":
        assert torch.allclose(found[[0, 2]], expected[[0, 2]], rtol=1e-4)


ZEROS = {"a head": (1, slice(None)), "channels": (1, slice(4, 9)), "all": (slice(None),)}


@pytest.mark.parametrize("values", ["none", *ZEROS])
@pytest.mark.parametrize("readers", ["none", *ZEROS])
def test_scales_of_values_are_finite(values, readers):
    torch.manual_seed(0)
    x, y = torch.rand(HEADS, SIZE) + 0.1, torch.rand(HEADS, SIZE) + 0.1
    if values != "none":
        x[ZEROS[values]] = 0
    if readers != "none":
        y[ZEROS[readers]] = 0
    found = strength.value_scale(x, y)
    assert found.isfinite().all() and (found > 0).all()
    assert torch.allclose(found.log().mean(1), torch.zeros(HEADS), atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", ["none", "some", "all"])
@pytest.mark.parametrize("columns", ["none", "some", "all"])
def test_scales_of_down_projs_inputs_are_finite(inputs, columns, bits):
    torch.manual_seed(0)
    x, weight = torch.randn(TOKENS, 256), torch.randn(16, 256)
    x[:, {"none": [], "some": range(100), "all": range(256)}[inputs]] = 0
    weight[:, {"none": [], "some": range(60, 140), "all": range(256)}[columns]] = 0
    found = strength.down_scale(x, x.abs().amax(0), weight, bits, 128)
    assert found.isfinite().all() and (found > 0).all()


def zero_rows(weight):
    weight[:3] = 0


def zero_groups(weight):
    weight[3:6, 128:256] = 0


def constant(weight):
    weight[:] = 0.25


def denormal(weight):
    weight.mul_(1e-41)


WEIGHTS = {
    "zero rows": zero_rows,
    "zero groups": zero_groups,
    "zero columns": lambda weight: weight[:, 5:90].zero_(),
    "all zero": torch.Tensor.zero_,
    "constant": constant,
    "constant rows": lambda weight: weight.copy_(weight[:, :1].expand_as(weight)),
    "tiny": lambda weight: weight.mul_(1e-7),
    "denormal": denormal,
}


@pytest.mark.parametrize("dead", ["some", "all"])
@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_degenerate_weights_have_finite_scales_above_zero(kind, case, dead):
    """In float16, where 1e-10 is zero."""
    torch.manual_seed(0)
    dtype = torch.float16
    weight, x = torch.randn(16, 256), torch.randn(512, 256)
    WEIGHTS[case](weight)
    x[:, {"some": range(100), "all": range(256)}[dead]] = 0
    hessian = x.t() @ x / len(x)
    base, leaves = None, {}
    if kind.base is not None:
        base = SetKind("w4a8", 128).grid(weight, dtype, clip=True)
        fill(weight, hessian, base)
        leaves = base.tensors(dtype)
    grid = kind.grid(weight, dtype, True, base)
    fill(weight, hessian, grid)
    leaves |= grid.tensors(dtype)
    for name, tensor in leaves.items():
        assert tensor.isfinite().all(), name
        if name in ("channel_scale", "weight_scale", "group_scale"):
            assert (tensor > 0).all(), name
    found = dequantize(leaves)
    alive = x @ weight.t()
    scale = max(float(alive.abs().max()), 1e-6)
    assert float((x @ found.t() - alive).abs().max()) < 0.35 * scale
    assert output_error(weight, grid.dequantized(), hessian) < 2


DEAD = {
    "K head": [(K, slice(0, 32), slice(None))],
    "Q heads": [(Q, slice(0, 64), slice(None))],
    "V head": [(V, slice(32, 64), slice(None))],
    "readers of a V head": [(OUT, slice(None), slice(0, 64))],
    "K channels": [(K, slice(3, 7), slice(None))],
    "rows of gate and up": [(GATE, slice(0, 128), slice(None)), (UP, slice(0, 128), slice(None))],
    "columns of down": [(DOWN, slice(None), slice(0, 128))],
    "attention": [(name, slice(None), slice(None)) for name in (Q, K, V, OUT)],
    "MLP": [(name, slice(None), slice(None)) for name in (GATE, UP, DOWN)],
}


@pytest.mark.parametrize("case", DEAD)
@pytest.mark.parametrize("name", ["llama with biases", "qwen3"])
def test_all_steps_keep_the_logits_of_a_model_with_dead_parts(case, name):
    model = Model(name)
    with torch.no_grad():
        for layer, rows, columns in DEAD[case]:
            module = model.model.get_submodule(f"model.layers.0.{layer}")
            module.weight[rows, columns] = 0
            if columns == slice(None) and module.bias is not None:
                module.bias[rows] = 0
    before = model.logits()
    model.step("all")
    assert (model.logits() - before).abs().max() < 1e-5 * before.abs().max()


def test_a_model_with_dead_parts_is_quantized(tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tensors = load_file(tiny_model / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"][:64] = 0
    tensors["model.layers.1.self_attn.q_proj.weight"][:64] = 0
    tensors["model.layers.1.self_attn.v_proj.weight"][64:] = 0
    tensors["model.layers.0.mlp.up_proj.weight"][:128] = 0
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    config = json.loads((model / "config.json").read_text()) | {"dtype": "float16"}
    (model / "config.json").write_text(json.dumps(config))
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(halves, model / "model.safetensors", {"format": "pt"})
    text = tmp_path / "text"
    text.write_text((DATA / "heldout.txt").read_text()[:3000])
    wanted = Job(model, tmp_path / "out", DATA / "calibration.txt", tmp_path / "work", text)
    options = QuantizeOptions(sets=("w8a8", "w4a8", "w4a16"), nested=True, samples=4, seqlen=128)
    report = job.run(wanted, options)
    assert not verify.structure(tmp_path / "out")
    assert not verify.contents(tmp_path / "out", Progress(quiet=True))
    before = report["before"]["perplexity"]["kv16"]
    for found in report["after"].values():
        assert found["perplexity"]["kv4"] < before * 1.15


NO_SMOOTHING = {"smooth_attention": False, "smooth_outputs": False, "reorder": False}


@pytest.mark.parametrize("steps", [{}, NO_SMOOTHING])
def test_a_model_that_computes_infinity_is_refused_with_the_place(tiny_model, tmp_path, steps):
    """As one that was trained in bfloat16 may do in float16."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tensors = load_file(tiny_model / "model.safetensors")
    for name in ("up", "gate"):
        tensors[f"model.layers.1.mlp.{name}_proj.weight"] *= 1000
    config = json.loads((model / "config.json").read_text()) | {"dtype": "float16"}
    (model / "config.json").write_text(json.dumps(config))
    save_file({k: v.half() for k, v in tensors.items()}, model / "model.safetensors", {})
    options = QuantizeOptions(sets=("w4a8",), samples=1, seqlen=32, gptq=False, clip=False, **steps)
    wanted = Job(model, tmp_path / "out", DATA / "calibration.txt", tmp_path / "work")
    place = r"model\.layers\.1(\.mlp\.down_proj)?: the model computes NaN or infinity"
    with pytest.raises(QuantizeError, match=place):
        job.run(wanted, options)
    assert not (tmp_path / "out").exists()


def test_a_loss_beyond_what_exp_holds_is_an_infinite_perplexity(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    assert evaluate.perplexity(model, [list(range(32))]) == math.inf

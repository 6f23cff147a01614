"""Mixtures of experts: who gets which tokens, what becomes of experts without, and the router."""

import hashlib
import shutil

import pytest
import torch
from conftest import DATA
from moe_models import write_model
from rtn_checkpoints import edit
from transformers import AutoModelForCausalLM

import vllm_qoq
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.checkpoint.inspect import inspect
from vllm_qoq.models.mixtures import names_of
from vllm_qoq.models.tensors import expected_tensors
from vllm_qoq.numerics import reference
from vllm_qoq.quantizer import QuantizeError, gptq, modifiers, rotate, size
from vllm_qoq.quantizer.inputs import check_inputs
from vllm_qoq.quantizer.job import quantize
from vllm_qoq.quantizer.load import load_model
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.plan import Job, _check_divisible
from vllm_qoq.quantizer.sets import SetKind

TOKENS = 4 * 64
FEW = {"samples": 4, "seqlen": 64, "passes": 1, "sets": ("w4a8",), "min_expert_tokens": 40}
SMALL = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 64}
EXPERTS = "model.layers.{}.mlp.experts.{}"


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """A Qwen2-MoE with five experts, of which the last one of the first layer gets no token."""
    folder = tmp_path_factory.mktemp("moe") / "model"
    write_model(tiny_model, folder, "Qwen2Moe", num_experts=5, **SMALL)

    def leave_out_the_last(tensors, config):
        router = tensors["model.layers.0.mlp.gate.weight"]
        # Of each pair one is above zero, so two others always are above the last.
        router[1], router[3], router[4] = -router[0], -router[2], 0

    return edit(folder, leave_out_the_last)


def run(model, out, **changes):
    options = QuantizeOptions.parse(FEW | changes, "options")
    return quantize(model, out, DATA / "calibration.txt", options).report


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    """The checkpoint and its report."""
    out = tmp_path_factory.mktemp("experts") / "out"
    return out, run(model, out)


def rows_of(report, layer, expert):
    prefix = EXPERTS.format(layer, expert) + "."
    return [row for row in report["layers"] if row["layer"].startswith(prefix)]


def test_the_report_has_every_expert_with_its_tokens(quantized):
    _, report = quantized
    for layer in range(2):
        counts = []
        for expert in range(5):
            rows = rows_of(report, layer, expert)
            assert len(rows) == 3 and len({row["tokens"] for row in rows}) == 1
            counts.append(rows[0]["tokens"])
        assert sum(counts) == 2 * TOKENS
    others = [row for row in report["layers"] if ".experts." not in row["layer"]]
    assert len(others) == 2 * 7 and not [row for row in others if "tokens" in row]


def test_an_expert_with_few_tokens_is_rounded_to_the_nearest(quantized):
    _, report = quantized
    few = report["starved_experts"]
    assert few[EXPERTS.format(0, 4)] == 0
    for row in report["layers"]:
        expert = row["layer"].rpartition(".")[0]
        assert row.get("rounded_to_nearest", False) == (expert in few)
        assert ("tokens" not in row) or (row["tokens"] < 40) == (expert in few)


def test_without_transforms_a_router_stays_and_rounding_to_the_nearest_is_of_the_weights(
    model, tmp_path
):
    run(model, tmp_path / "out", rotate=False, smooth_outputs=False, reorder=False, kv_bits=16)
    before, after = Checkpoint.open(model), Checkpoint.open(tmp_path / "out")
    for name in ("gate_proj", "down_proj"):
        layer = f"{EXPERTS.format(0, 4)}.{name}"
        weight = before.get(f"{layer}.weight")
        grid = SetKind("w4a8", 128).grid(weight, weight.dtype, True)
        gptq.round_to_nearest(weight, grid)
        for leaf, expected in grid.tensors(weight.dtype).items():
            assert torch.equal(after.get(f"w4a8.{layer}.{leaf}"), expected)
    for layer in range(2):
        for name in ("mlp.gate", "mlp.shared_expert_gate", "post_attention_layernorm"):
            tensor = f"model.layers.{layer}.{name}.weight"
            assert torch.equal(before.get(tensor), after.get(tensor))


def test_every_expert_is_near_its_float_weights(quantized, model):
    """In the basis of the checkpoint: gate reads the turned stream with the norm folded in.

    GPTQ moves weights far where few tokens tell, but not as far as another row is.
    """
    out, _ = quantized
    before, after = Checkpoint.open(model), Checkpoint.open(out)
    turn = rotate.hadamard(128)
    norm = before.get("model.layers.1.post_attention_layernorm.weight").double()
    for expert in range(5):
        layer = f"{EXPERTS.format(1, expert)}.gate_proj"
        leaves = ("qweight", "channel_scale", "group_scale", "group_offset")
        found = reference.dequantize({leaf: after.get(f"w4a8.{layer}.{leaf}") for leaf in leaves})
        expected = (before.get(f"{layer}.weight").double() * norm) @ turn
        # Inputs of down_proj are sorted, so the rows of gate are.
        errors = (found.double()[:, None] - expected[None]).norm(dim=-1)
        nearest, row = (errors / expected.norm(dim=-1)).min(dim=1)
        assert nearest.max() < 0.5 and len(set(row.tolist())) == 128


@pytest.mark.parametrize("router", ["mlp.gate", "mlp.shared_expert_gate"])
def test_a_router_is_in_float_and_turned_with_the_stream(quantized, model, router):
    out, _ = quantized
    before, after = Checkpoint.open(model), Checkpoint.open(out)
    turn = rotate.hadamard(128)
    for layer in range(2):
        name = f"model.layers.{layer}.{router}.weight"
        norm = before.get(f"model.layers.{layer}.post_attention_layernorm.weight").double()
        expected = (before.get(name).double() * norm) @ turn
        found = after.get(name)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=1e-3)
    assert not [name for name in after.tensors if name.startswith("w4a8.") and router + "." in name]
    ignored = after.section.sets["w4a8"]["ignore"]
    assert f"*.{router}" in ignored


def test_every_kind_of_set_is_whole(model, tmp_path, capfd):
    changes = {"sets": ("w8a8", "w4a16", "w4a8"), "group_size": -1}
    few = run(model, tmp_path / "out", **changes, min_expert_tokens=TOKENS + 1)["starved_experts"]
    assert len(few) == 10
    err = capfd.readouterr().err
    assert f"{EXPERTS.format(0, 4)} (0)" in err and "and 2 more; give more or other text" in err
    assert vllm_qoq.verify(tmp_path / "out").findings == ()
    report = inspect(tmp_path / "out")
    assert report["experts"] == {"mixtures": 2, "experts": 5, "mixtures_per_set": 2}
    # Half of an expert is smaller than what its kernel takes at a time.
    parallel = report["tensor_parallel"]
    assert parallel["sizes"] == [1] and "split by 2 are 64, not a multiple of 128" in str(parallel)


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(model, quantized, tmp_path, monkeypatch):
    out, whole = quantized
    real, seen = modifiers.PieceWriter.save, []

    def stop_at_the_second(self, name, tensors, facts):
        seen.append(name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        real(self, name, tensors, facts)

    with monkeypatch.context() as patched:
        patched.setattr(modifiers.PieceWriter, "save", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out")
    assert (tmp_path / "out.work" / "block-0000.safetensors").exists()
    monkeypatch.setattr(
        modifiers.PieceWriter, "save", lambda self, *a: (seen.append(a[0]), real(self, *a))
    )
    report = run(model, tmp_path / "out")
    assert seen == ["block-0000", "block-0001", "block-0001"]
    assert report["starved_experts"] == whole["starved_experts"]
    for file in out.glob("*.safetensors"):
        digests = [
            hashlib.sha256((f / file.name).read_bytes()).digest() for f in (out, tmp_path / "out")
        ]
        assert digests[0] == digests[1]


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_a_model_is_loaded_with_the_names_and_values_of_its_checkpoint(
    tiny_model, tmp_path, family
):
    folder = write_model(tiny_model, tmp_path / "model", family)
    stored, model = Checkpoint.open(folder), load_model(Checkpoint.open(folder))
    state = model.state_dict()
    assert set(state) == set(stored.tensors)
    assert all(torch.equal(tensor, stored.get(name)) for name, tensor in state.items())
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        found = model.float()(tokens).logits
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({}, {"group_size": 64}, r"experts\.0\.gate_proj.*in groups of 64.*--group-size 128 or -1"),
        (
            {"moe_intermediate_size": 64},
            {},
            r"multiples of 128; give --sets w8a8, or --sets w8a8,w4a16 --group-size -1",
        ),
    ],
)
def test_experts_that_no_kernel_computes_are_refused(tiny_model, tmp_path, sizes, options, message):
    folder = write_model(tiny_model, tmp_path / "model", **SMALL | sizes)
    shutil.copy(DATA / "calibration.txt", tmp_path / "text")
    job = Job(folder, tmp_path / "out", tmp_path / "text", tmp_path / "work")
    inputs = check_inputs(job)
    with pytest.raises(QuantizeError, match=message):
        _check_divisible(inputs, QuantizeOptions.parse(options, "options"))
    without = QuantizeOptions.parse(options | {"sets": ("w8a8",)}, "options")
    _check_divisible(inputs, without)


def test_the_hessians_of_all_experts_of_a_block_are_counted():
    """At the shape of Qwen3-30B-A3B; an expert sees a sixteenth of the tokens."""
    config = {
        **{"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "head_dim": 128},
        **{"intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128},
        **{"num_experts_per_tok": 8, "num_hidden_layers": 48, "num_attention_heads": 32},
        **{"num_key_value_heads": 4, "vocab_size": 151936},
    }
    tensors, names = expected_tensors(config), names_of(config)
    linears = {
        name.removesuffix(".weight"): shape for name, shape in tensors.items() if len(shape) == 2
    }
    blocks = size.stacks(names, 48, linears)
    assert len(blocks) == 48 and len(blocks[0]) == 2 + 2 * 128
    assert sum(stack.k**2 for stack in blocks[0][2:]) == 128 * (2048**2 + 768**2)
    assert {stack.share for stack in blocks[0]} == {1.0, 8 / 128}

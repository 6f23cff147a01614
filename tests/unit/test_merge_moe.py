"""Mixtures of experts: what a merge stores per set, shares or refuses, and what verify finds."""

import json
import re
import shutil

import pytest
import torch
from moe_models import float_experts, write_model
from qoq_checkpoints import write_plain
from rtn_checkpoints import edit, gptq, w4a16, w8a8
from safetensors.torch import load_file, save_file

import vllm_qoq
from merge_tools import MergeError
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.checkpoint.inspect import inspect, table
from vllm_qoq.errors import FormatError
from vllm_qoq.numerics.reference import dequantize
from vllm_qoq.routing.table import Routing, RoutingError

# Groups of 128 fit, as in models that people serve.
SIZES = {"moe_intermediate_size": 128, "intermediate_size": 128, "num_experts": 4}
SHARED = {"shared_expert_intermediate_size": 128}
UP = "model.layers.1.mlp.experts.2.up_proj"
ROUTER = "model.layers.0.mlp.gate.weight"


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "model"
    return write_model(tiny_model, folder, "Qwen2Moe", **SIZES | SHARED)


@pytest.fixture(scope="module")
def sets(model, tmp_path_factory):
    """W8A8, W4A16 and GPTQ of every expert, and two sets whose experts are float and differ."""
    folder = tmp_path_factory.mktemp("moe-sets")
    return {
        "w8a8": w8a8(model, folder / "w8a8"),
        "w4a16": w4a16(model, folder / "w4a16"),
        "gptq": gptq(model, folder / "gptq"),
        "qoq": edit(write_plain(model, folder / "qoq"), leave_out_routers),
        "one": float_experts(model, folder / "one", 1),
        "other": float_experts(model, folder / "other", 2),
    }


def leave_out_routers(tensors, config):
    config["quantization_config"]["ignore"] = ["lm_head", "*.mlp.gate", "*.shared_expert_gate"]


@pytest.fixture
def merge(sets, tmp_path):
    """merge(SET..., change=(SET, CHANGE)): the merge, after CHANGE(tensors, config) of a copy."""

    def run(*names, change=None, routing=None):
        folders = {name: sets[name] for name in names}
        if change is not None:
            name, edited = change
            folders[name] = edit(shutil.copytree(sets[name], tmp_path / name), edited)
        return vllm_qoq.merge(folders, tmp_path / "out", routing)

    return run


@pytest.mark.parametrize(
    "names", [("w8a8", "w4a16"), ("one", "gptq"), ("one", "other"), ("w8a8", "qoq")]
)
def test_every_set_has_its_experts_and_all_share_the_router(merge, tmp_path, names):
    merged = merge(*names)
    assert vllm_qoq.verify(tmp_path / "out").findings == ()
    stored = Checkpoint.open(tmp_path / "out").tensors
    assert ROUTER in stored and "model.layers.0.mlp.shared_expert_gate.weight" in stored
    assert not [name for name in stored if ".experts." in name and name.startswith("model.")]
    for name in names:
        assert [tensor for tensor in stored if tensor.startswith(f"{name}.{UP}.")]
    are_float = names == ("one", "other")
    assert merged.section.float_experts == (("model.layers.*.mlp.experts",) if are_float else ())
    text = table(inspect(tmp_path / "out"))
    assert "experts: 2 mixtures of 4, which each set has for itself" in text
    assert "--tensor-parallel-size: 1" in text


def test_experts_of_two_sets_nest(sets, tmp_path):
    folders = {"w8a8": sets["w8a8"], "w4a8": sets["qoq"]}
    merged = vllm_qoq.merge(folders, tmp_path / "out", nest=True)
    assert merged.section.base_of("w8a8") == "w4a8"
    assert merged.clipped_shares[UP] < 0.02
    assert vllm_qoq.verify(tmp_path / "out").findings == ()
    stored = Checkpoint.open(tmp_path / "out")
    leaves = ("qweight", "channel_scale", "group_scale", "group_offset")
    base = {leaf: stored.get(f"w4a8.{UP}.{leaf}") for leaf in leaves}
    residual = {"qresidual": stored.get(f"w8a8.{UP}.qresidual")}
    eight = load_file(sets["w8a8"] / "model.safetensors")
    weight = eight[f"{UP}.weight"].float() * eight[f"{UP}.weight_scale"].float()
    four, both = (
        (dequantize(tensors) - weight).norm() / weight.norm() for tensors in (base, base | residual)
    )
    assert both < 0.02 < 0.05 < four


def test_experts_that_are_equal_are_stored_once(merge, sets, tmp_path):
    def same(tensors, config):
        tensors |= {k: v for k, v in ones.items() if ".experts." in k}

    ones = load_file(sets["one"] / "model.safetensors")
    merged = merge("one", "other", change=("other", same))
    assert merged.section.float_experts == ()
    assert f"{UP}.weight" in Checkpoint.open(tmp_path / "out").tensors
    assert vllm_qoq.verify(tmp_path / "out").findings == ()
    assert "experts: 2 mixtures of 4, which all sets share" in table(inspect(tmp_path / "out"))


def test_a_mixture_goes_with_the_set_as_a_whole(merge, sets, tmp_path):
    def same_but_one(tensors, config):
        kept = tensors[f"{UP}.weight"]
        tensors |= {k: v for k, v in ones.items() if ".experts." in k}
        tensors[f"{UP}.weight"] = kept

    ones = load_file(sets["one"] / "model.safetensors")
    merged = merge("one", "other", change=("other", same_but_one))
    assert merged.section.float_experts == ("model.layers.1.mlp.experts",)
    stored = Checkpoint.open(tmp_path / "out").tensors
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in stored
    assert "other.model.layers.1.mlp.experts.0.down_proj.weight" in stored
    assert vllm_qoq.verify(tmp_path / "out").findings == ()
    assert "of which each set has 1 for itself" in table(inspect(tmp_path / "out"))


def other_router(tensors, config):
    tensors[ROUTER] = tensors[ROUTER] * 2


def one_in_float(tensors, config):
    del tensors[f"{UP}.weight_scale"]
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].bfloat16()


def quantized(module):
    """Quantizes a module of every decoder layer in a W8A8 set, as a tool does that skips none."""

    def change(tensors, config):
        for name in [name for name in tensors if name.endswith(f".{module}.weight")]:
            weight = tensors[name].float()
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale.bfloat16()

    return change


def all_at_once(tensors, config):
    layer = UP.rpartition(".2.")[0]
    up = [tensors.pop(f"{layer}.{i}.up_proj.weight") for i in range(4)]
    tensors[f"{layer}.up_proj"] = torch.stack(up)


def ignoring(entry):
    return lambda tensors, config: config["quantization_config"]["ignore"].append(entry)


def of_another_architecture(tensors, config):
    config["architectures"] = ["DeepseekV2ForCausalLM"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (other_router, MergeError, rf"{ROUTER}: differs.*all sets choose the same"),
        (one_in_float, FormatError, rf"{UP}: is not quantized, but .*quantize both or neither"),
        (
            quantized("mlp.gate"),
            FormatError,
            r"layers\.0\.mlp\.gate: is quantized, but all sets share.*ignore=\[\"re:\.\*mlp",
        ),
        (
            quantized("mlp.shared_expert_gate"),
            FormatError,
            r"layers\.0\.mlp\.shared_expert_gate: is quantized, but all sets share",
        ),
        (all_at_once, FormatError, r"experts\.up_proj: holds all experts of a layer at once"),
        (
            ignoring(UP),
            FormatError,
            r"1\.mlp\.experts: .*config leaves out only some of .*experts\.2\.up_proj, or",
        ),
        (
            ignoring(r"re:.*\.0\.mlp\.experts\.2\..*"),
            FormatError,
            r"0\.mlp\.experts\.2\.down_proj: is quantized, but .* leaves it out",
        ),
        (of_another_architecture, FormatError, r"DeepseekV2.*Mixtral.*Qwen2Moe.*Qwen3Moe"),
    ],
)
def test_what_cannot_be_merged_is_named(merge, change, error, message):
    with pytest.raises(error, match=message):
        merge("w4a16", "w8a8", change=("w8a8", change))


def test_verify_names_an_expert_that_a_set_leaves_out_and_has(merge, tmp_path):
    merge("qoq", "w8a8")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["sets"]["qoq"]["ignore"].append("*.0.mlp.experts.3.*")
    file.write_text(json.dumps(config))
    (finding,) = vllm_qoq.verify(tmp_path / "out").findings
    assert finding.startswith("set qoq: model.layers.0.mlp.experts.3.down_proj: is quantized, but")


def test_a_layer_rule_names_a_mixture_not_an_expert(merge):
    def rule(glob):
        layers = [{"match": glob, "decode": "one"}]
        table = {"prefill": "one", "decode": "other", "layers": layers}
        return Routing.parse(table, ("one", "other"))

    with pytest.raises(RoutingError, match=r"experts\.0\.\*' matches no quantized layer"):
        merge("one", "other", routing=rule("*.experts.0.*"))
    merge("one", "other", routing=rule("*.1.mlp.experts"))


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_a_norm_may_differ_unless_a_router_reads_it(merge, tmp_path, norm):
    readers = [f"self_attn.{x}_proj" for x in "qkv"] if norm == "input_layernorm" else []

    def smooth(tensors, config):
        for layer in ("model.layers.0", "model.layers.1"):
            tensors[f"{layer}.{norm}.weight"].mul_(2)
            for reader in readers:
                tensors[f"{layer}.{reader}.weight_scale"].mul_(0.5)

    if readers:
        section = merge("w8a8", "w4a16", change=("w4a16", smooth)).section
        listed = sorted(f"model.layers.*.{reader}" for reader in readers)
        assert sorted(section.input_ratio["w4a16"]) == listed
        assert vllm_qoq.verify(tmp_path / "out").findings == ()
    else:
        with pytest.raises(MergeError, match=f"{norm}.weight: differs"):
            merge("w8a8", "w4a16", change=("w4a16", smooth))


def test_experts_in_float_that_differ_do_not_nest(model, sets, tmp_path):
    floats = load_file(model / "model.safetensors")

    def with_float_experts(tensors, config):
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
        tensors |= {name: tensor for name, tensor in floats.items() if ".experts." in name}
        config["quantization_config"]["ignore"] += ["*.experts.*"]

    base = edit(write_plain(model, tmp_path / "base"), with_float_experts)
    with pytest.raises(MergeError, match=r"layers\.0\.mlp\.experts: .*differ.*leave out --nest"):
        vllm_qoq.merge({"w8a8": sets["one"], "w4a8": base}, tmp_path / "out", nest=True)
    assert not (tmp_path / "out").exists()


def lose(name):
    return lambda section, tensors: tensors.pop(name)


def with_quantized_router(section, tensors):
    gate = tensors.pop(ROUTER)
    for name in section["sets"]:
        tensors[f"{name}.{ROUTER}"] = gate.to(torch.int8)
        tensors[f"{name}.{ROUTER}_scale"] = torch.ones(len(gate), 1).bfloat16()


@pytest.mark.parametrize(
    ("names", "change", "finding"),
    [
        (("w8a8", "w4a16"), lose(f"w4a16.{UP}.weight_scale"), rf"{UP}\.weight_scale: missing"),
        (
            ("w8a8", "one"),
            with_quantized_router,
            r"set w8a8: model\.layers\.0\.mlp\.gate: is quantized.*\nset one: .* is quantized",
        ),
        (("one", "other"), lose(f"other.{UP}.weight"), rf"{UP}: missing"),
        (
            ("one", "other"),
            lambda section, tensors: section.pop("float_experts"),
            r"no set quantizes these experts",
        ),
        (
            ("w8a8", "w4a16"),
            lambda section, tensors: section.update(float_experts=["*.3.mlp.experts"]),
            r"float_experts: '\*\.3\.mlp\.experts' matches no experts",
        ),
    ],
)
def test_verify_finds_what_is_wrong_with_experts(merge, tmp_path, names, change, finding):
    merge(*names)
    tensors = {}
    for shard in sorted((tmp_path / "out").glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    change(config["quantization_config"], tensors)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    findings = "\n".join(vllm_qoq.verify(tmp_path / "out").findings)
    assert re.search(finding, findings), findings

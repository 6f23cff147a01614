"""Hybrids with linear attention: what is stored, what is left out, and what is refused."""

import json
import shutil

import pytest
import tiny_models
import torch
from rtn_checkpoints import edit, w8a8
from safetensors.torch import save_file

from merge_tools.job import merge
from vllm_qoq.bench.serving.floor import Model as Floor
from vllm_qoq.checkpoint import stacked_experts, tensor_parallel
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.checkpoint.format import join_name
from vllm_qoq.checkpoint.inspect import inspect
from vllm_qoq.checkpoint.k_mean import name_of
from vllm_qoq.checkpoint.language import language_part
from vllm_qoq.checkpoint.layout import Layout
from vllm_qoq.checkpoint.verify import verify
from vllm_qoq.errors import FormatError, UserError
from vllm_qoq.models.names import shards_of_parts
from vllm_qoq.models.table import norm_readers
from vllm_qoq.models.tensors import expected_tensors
from vllm_qoq.quantizer import calibrate_kv
from vllm_qoq.quantizer.inputs import check_model
from vllm_qoq.quantizer.job import quantize
from vllm_qoq.quantizer.options import QuantizeOptions

LINEAR = "model.layers.0.linear_attn"
KEPT = [f"{LINEAR}.{name}" for name in ("conv1d.weight", "A_log", "dt_bias")]
READERS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "qkv.weight", "z.weight")
READERS += ("in_proj_a.weight", "in_proj_b.weight")
DENSE, MIXTURE = "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"


def as_published(tensors, config):
    """Bring a model into bf16 but for `A_log`, stack its experts and add a head for MTP."""
    config["dtype"] = "bfloat16"
    for name, tensor in tensors.items():
        tensors[name] = tensor if name.endswith("A_log") else tensor.bfloat16()
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: [tensors.pop(f"{experts}.{i}.{part}_proj.weight") for i in range(4)]
            for part in ("gate", "up", "down")
        }
        both = zip(parts["gate"], parts["up"], strict=True)
        tensors[f"{experts}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in both])
        tensors[f"{experts}.down_proj"] = torch.stack(parts["down"])
    tensors["mtp.fc.weight"] = torch.ones(128, 256, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def text(heldout_text, tmp_path_factory):
    short = tmp_path_factory.mktemp("text") / "text.txt"
    short.write_text(heldout_text.read_text()[:1000])
    return short


@pytest.fixture(scope="module")
def published(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "model"
    return edit(tiny_models.write(MIXTURE, folder, tiny_model), as_published)


@pytest.fixture(scope="module")
def quantized(published, text, tmp_path_factory):
    """The output of a mixture as it is published, and the report."""
    options = QuantizeOptions.parse({"samples": 4, "seqlen": 64, "gptq": False}, "options")
    return quantize(published, tmp_path_factory.mktemp("quantized") / "out", text, options)


def test_stacked_experts_are_those_of_a_model_with_each_apart(published, tiny_model, tmp_path):
    apart = tiny_models.write(MIXTURE, tmp_path / "apart", tiny_model)
    expected, found = Checkpoint.open(apart), language_part(Checkpoint.open(published))
    assert found.tensors.keys() == expected.tensors.keys()
    for name, info in found.tensors.items():
        tensor = expected.get(name)
        assert info.shape == tensor.shape
        assert torch.equal(found.get(name), tensor.to(found.get(name).dtype))
    assert language_part(expected) is expected


def test_more_layers_of_experts_than_a_model_has_are_refused(published, monkeypatch):
    monkeypatch.setattr(stacked_experts, "_MOST_LAYERS", 7)
    with pytest.raises(FormatError, match=r"experts\.down_proj: has more than 7 layers"):
        language_part(Checkpoint.open(published))


def test_what_no_step_changes_is_stored_bit_by_bit(published, quantized):
    before, after = Checkpoint.open(published), Checkpoint.open(quantized.output)
    for name in KEPT:
        assert torch.equal(after.get(name), before.get(name))
        assert after.tensors[name].dtype == before.tensors[name].dtype
    assert after.tensors[f"{LINEAR}.A_log"].dtype == "F32"


def test_every_set_has_the_large_projections_and_none_the_narrow_ones(quantized):
    tensors, report = Checkpoint.open(quantized.output).tensors, inspect(quantized.output)
    for owner, leaf in (("w8a8", "weight_scale"), ("w4a8", "channel_scale")):
        assert report["sets"][owner]["layers"] == 3 + 4 + 2 * (4 + 1) * 3
        for name in ("in_proj_qkv", "in_proj_z", "out_proj"):
            assert join_name(owner, f"{LINEAR}.{name}.{leaf}") in tensors
    for name in ("in_proj_a", "in_proj_b"):
        assert tensors[f"{LINEAR}.{name}.weight"].dtype == "BF16"
    assert verify(quantized.output).findings == ()


def test_only_layers_with_keys_have_a_mean_of_k(quantized, published, text, tmp_path):
    calibrated = calibrate_kv.calibrate_kv(
        published, tmp_path / "out", text, samples=4, seqlen=64, dry_run=False
    )
    assert calibrated.layers == 1
    for folder in (quantized.output, calibrated.output):
        tensors = Checkpoint.open(folder).tensors
        assert name_of(1) in tensors and name_of(0) not in tensors
        assert verify(folder).findings == ()


def test_a_mean_of_k_of_linear_attention_is_a_finding(quantized, tmp_path):
    checkpoint = Checkpoint.open(quantized.output)
    tensors = {name: checkpoint.get(name) for name in checkpoint.tensors}
    tensors[name_of(0)] = tensors[name_of(1)].clone()
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (finding,) = verify(tmp_path).findings
    assert f"{name_of(0)}: the model has no such layer" in finding


def test_heads_for_more_tokens_are_left_out_and_said(quantized):
    assert not [name for name in Checkpoint.open(quantized.output).tensors if "mtp" in name]
    said = quantized.report["left_out"]
    assert said["mtp"] == "the heads that predict further tokens (MTP) are not in the output"


@pytest.mark.parametrize(
    ("key", "value"), [("attn_output_gate", False), ("output_gate_type", "sigmoid")]
)
def test_gates_that_transformers_does_not_compute_are_refused(key, value, tiny_model, tmp_path):
    model = tiny_models.write(DENSE, tmp_path / "model", tiny_model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=f"{key}: {value!r} is not supported"):
        check_model(Checkpoint.open(model), "quantized")


CONFIG = {
    **{"architectures": [DENSE], "num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 96},
    **{"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 16},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["linear_attention"] * 3}, "layer_types: .* for each of 4 layers"),
        ({"layer_types": ["mamba"] * 4}, "layer_types: 'mamba' is not known; known are full_"),
        ({"layer_types": [{}] * 4}, "layer_types: {} is not known"),
        ({"layer_types": "all"}, "layer_types: 'all' is no list"),
        ({"full_attention_interval": 0}, "full_attention_interval: 0 is no count"),
        ({"linear_num_value_heads": 6}, "linear_num_value_heads: 6 is not a multiple"),
        ({"linear_conv_kernel_dim": "4"}, "linear_conv_kernel_dim: '4' is not a whole number"),
    ],
)
def test_kinds_and_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(FormatError, match=message):
        expected_tensors(CONFIG | changes)


def test_without_kinds_every_fourth_layer_has_keys():
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    assert expected_tensors(CONFIG).kinds == kinds
    keys = expected_tensors(CONFIG).keys_of(f"{LINEAR}.conv1d.weight")
    assert keys[0].startswith("2 * linear_num_key_heads") and keys[1:] == (
        "1",
        "linear_conv_kernel_dim",
    )


def test_the_floor_counts_the_cache_of_layers_with_keys_alone():
    floor = Floor.of(CONFIG)
    assert floor.layers == 1
    assert floor.routers == 3 * 2 * 8 * 64


def test_a_norm_that_a_layer_in_float_reads_has_no_readers_that_a_ratio_could_reach():
    norm = "model.layers.{}.input_layernorm".format
    assert norm_readers(CONFIG, norm(0)) == norm_readers(CONFIG, norm(6)) == ()
    qkv = [f"model.layers.3.self_attn.{name}_proj" for name in "qkv"]
    assert list(norm_readers(CONFIG, norm(3))) == qkv
    assert len(norm_readers(CONFIG, "model.layers.0.post_attention_layernorm")) == 2


@pytest.mark.parametrize("layer", [0, 1])
def test_sets_whose_norms_differ_are_merged_where_all_that_reads_one_is_quantized(
    layer, tiny_model, tmp_path
):
    """SmoothQuant folds a scale into the norm, and its inverse into the layers that read it."""
    block, skip = f"model.layers.{layer}", ("in_proj_a", "in_proj_b")
    scale = torch.linspace(0.5, 2, 128)

    def smooth(tensors, config):
        norm = f"{block}.input_layernorm.weight"
        tensors[norm] = (tensors[norm] + 1) * scale - 1
        for name in tensors:
            if name.startswith(block) and name.endswith(READERS):
                tensors[name] = tensors[name] / scale

    model = tiny_models.write(DENSE, tmp_path / "model", tiny_model)
    shutil.copyfile(tiny_model / "generation_config.json", model / "generation_config.json")
    smoothed = edit(shutil.copytree(model, tmp_path / "smoothed"), smooth)
    folders = {"a": w8a8(model, tmp_path / "a", skip), "b": w8a8(smoothed, tmp_path / "b", skip)}
    if layer == 0:
        with pytest.raises(
            UserError, match=r"layers\.0\.(input_layernorm|linear_attn\.in_proj_[ab])"
        ):
            merge(folders, tmp_path / "out")
        return
    merge(folders, tmp_path / "out")
    assert verify(tmp_path / "out").findings == ()
    assert f"b.{block}.self_attn.q_proj.input_ratio" in Checkpoint.open(tmp_path / "out").tensors


@pytest.mark.parametrize(
    ("layer", "size", "message"),
    [
        ("in_proj_qkv", 2, None),
        ("in_proj_qkvz", 4, None),
        ("out_proj", 4, None),
        ("out_proj", 8, "4 heads of linear attention are not a multiple of 8"),
    ],
)
def test_tensor_parallelism_cuts_linear_attention_between_heads(layer, size, message):
    layout = Layout("qoq", 128, 256, 4, (1, 128))
    config = {**CONFIG, "num_attention_heads": 16, "num_key_value_heads": 16}
    found = tensor_parallel.obstacles(config, {"w4a8": {f"{LINEAR}.{layer}": layout}})
    assert found[size] == message


def test_the_parts_of_a_layer_share_out_its_outputs():
    parts = [f"{LINEAR}.{name}" for name in ("in_proj_qkv", "in_proj_z")]
    assert shards_of_parts(parts, range(4)) == [(parts[0], (0, 1, 2)), (parts[1], (3,))]
    assert shards_of_parts(["a.q_proj", "a.k_proj"], "qk") == [
        ("a.q_proj", ("q",)),
        ("a.k_proj", ("k",)),
    ]
    assert shards_of_parts(["a.gate_up_proj"], (0, 1)) == [("a.gate_up_proj", (0, 1))]

"""What the kinds of models differ in: pairs of RoPE, steps that are left out, capped scores."""

import json
from importlib import import_module

import pytest
import tiny_models
import torch
from transformed_models import MODELS, Model
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from vllm_qoq.bench.evaluate.float_model import FloatModel
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.models.table import LayerNames, with_names
from vllm_qoq.quantizer import QuantizeError, calibrate_kv, keys, rotate
from vllm_qoq.quantizer.attention import capped, fused_attention
from vllm_qoq.quantizer.evaluate import _simulated_cache, perplexity
from vllm_qoq.quantizer.inputs import check_model
from vllm_qoq.quantizer.load import load_model
from vllm_qoq.quantizer.model import blocks, layer_names
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.report import left_out, steps_that_ran
from vllm_qoq.quantizer.strength import with_rope

SERVED_ELSEWHERE = {f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}
GATED = {"qwen3 next", "qwen3.5", "qwen3.5 moe"}
FIXED = {"gemma", "gemma2", "gemma3", "olmo2", "glm4", "cohere", "cohere2"}


def test_every_class_is_tried():
    assert {f"{family}ForCausalLM" for family, _ in MODELS.values()} == set(with_names())
    served = {name.partition(",")[0] for name in tiny_models.MODELS}
    assert served | SERVED_ELSEWHERE == set(with_names())


@pytest.mark.parametrize(
    "name", ["llama", "phi3, partial rotary", "gemma3", "glm4", "cohere", "cohere2"]
)
@pytest.mark.parametrize("index", [0, 1])
def test_rope_is_that_of_the_model(name, index):
    model = Model(name)
    family = MODELS[name][0].lower()
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    size = model.dimensions.head_dim
    x, positions = torch.randn(5, 2, size), torch.tensor([0, 3, 4, 9, 39])
    rotary = model.model.get_submodule(model.names.rotary)
    kind = [model.model.config.layer_types[index]] if family == "gemma3" else []
    cos, sin = rotary(x, positions[None], *kind)
    heads = x.transpose(0, 1)[None]
    expected = module.apply_rotary_pos_emb(heads, heads, cos, sin)[1][0].transpose(0, 1)
    if name == "cohere2" and index == 1:  # a layer of full attention
        expected = x
    rope = model.rope(index)
    ours = rope.of_model(with_rope(rope.paired(x), positions, rope.inv_freq))
    assert torch.allclose(ours, expected.float(), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_rotation_that_the_model_cannot_take_is_left_out_and_said(name):
    names = Model(name).names
    options = QuantizeOptions.parse({}, "options").of_model(names)
    assert options.turns_stream == (name not in FIXED) and options.rotate is not False
    said = left_out(names, options)
    assert bool(said) == (name in FIXED | GATED)
    assert ("rotation of V" in str(said)) == (name in GATED)
    assert ("rotate V" in steps_that_ran(options, 1)) == (name in FIXED)
    for value in (False,) if name in GATED else (False, "values"):
        given = QuantizeOptions.parse({"rotate": value}, "options").of_model(names)
        assert given.rotate == value and not given.turns_stream
    asked = QuantizeOptions.parse({"rotate": True}, "options")
    if name in FIXED:
        with pytest.raises(QuantizeError, match=r"rotate: .*because.*\"values\""):
            asked.of_model(names)
    else:
        assert asked.of_model(names).turns_stream


def test_values_behind_a_gate_are_not_rotated():
    model = Model("qwen3.5")
    values = QuantizeOptions.parse({"rotate": "values"}, "options")
    with pytest.raises(QuantizeError, match=r"rotate: V .*a gate multiplies every channel"):
        values.of_model(model.names)
    before = model.logits()
    rotate.rotate_values(model.model, model.names, model.dimensions)
    assert (model.logits() - before).abs().max() > 0.01 * before.abs().max()


def test_an_int8_lm_head_needs_one_that_is_not_the_embedding():
    options = QuantizeOptions.parse({"lm_head_bits": 8}, "options")
    refused = {name for name, names in with_names().items() if not names.has_head}
    assert refused == {f"{x}ForCausalLM" for x in ("Gemma", "Gemma2", "Cohere", "Cohere2")}
    for name in ("CohereForCausalLM", "Qwen3NextForCausalLM"):
        with pytest.raises(QuantizeError, match=r"lm_head_bits: .*give 16"):
            options.of_model(with_names()[name])
    assert options.of_model(LayerNames()) is options


@pytest.mark.parametrize("mask", ["none", "float", "bool"])
def test_capped_scores_are_those_of_transformers(mask):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, 6, 8, generator=generator) for n in (4, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups, module.head_dim = 2, 8
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    if mask != "none":
        seen = seen.triu(-2)  # a window
    added = torch.zeros(1, 1, 6, 6).masked_fill(~seen, -torch.inf)
    expected, _ = eager_attention_forward(
        module, 3 * query, key, value, added, scaling=1.0, softcap=2.0
    )
    given = {"none": None, "float": added, "bool": seen[None, None]}[mask]
    found = capped(3 * query, key, value, given, 1.0, 2.0)
    torch.testing.assert_close(found, expected)


def test_scores_are_capped_while_calibration_text_runs_and_with_a_simulated_cache():
    model = Model("gemma2")
    model.model.float()
    for layer in model.model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.5
        layer.self_attn.q_proj.weight.data *= 100
    model.model.set_attn_implementation("eager")
    expected = model.logits()
    with fused_attention():
        assert torch.allclose(model.logits(), expected, atol=1e-5)
    with _simulated_cache(model.model, 8, False, None):
        eight = (model.logits() - expected).abs().max()
    model.model.set_attn_implementation("sdpa")
    assert eight < 0.2 * (model.logits() - expected).abs().max()
    assert perplexity(model.model, [list(range(40))]) > 1


@pytest.mark.parametrize("name", ["GemmaForCausalLM", "Gemma2ForCausalLM"])
def test_a_model_that_caps_scores_is_loaded_with_the_attention_that_does(
    name, tiny_model, tmp_path
):
    folder = tiny_models.write(name, tmp_path / "model", tiny_model)
    wanted = "eager" if name == "Gemma2ForCausalLM" else "sdpa"
    for model in (load_model(Checkpoint.open(folder)), FloatModel(folder)._model):
        assert model.config._attn_implementation == wanted


@pytest.mark.parametrize("cap", [None, 30.0])
def test_a_model_without_a_cap_on_scores_has_a_mean_of_k(cap, tiny_model, tmp_path):
    folder = tiny_models.write(
        "Gemma2ForCausalLM", tmp_path / "model", tiny_model, attn_logit_softcapping=cap
    )
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config["attn_logit_softcapping"] == cap
    names = layer_names(checkpoint.config)
    options = QuantizeOptions.parse({}, "options").of_model(names)
    assert options.has_k_mean == (cap is None) == ("mean of K" not in str(left_out(names, options)))
    assert load_model(checkpoint).config._attn_implementation == ("eager" if cap else "sdpa")


@pytest.mark.parametrize("activation", [None, "gelu_pytorch_tanh"])
def test_the_first_gemma_has_the_activation_that_vllm_takes(activation, tiny_model, tmp_path):
    """Its first configs name the exact GELU, which it was not trained with."""
    folder = tiny_models.write("GemmaForCausalLM", tmp_path / "model", tiny_model)
    content = json.loads((folder / "config.json").read_text())
    old = {"hidden_act": "gelu", "hidden_activation": activation}
    (folder / "config.json").write_text(json.dumps(content | old))
    checked = check_model(Checkpoint.open(folder), "quantized")
    for model in (load_model(checked.checkpoint), FloatModel(folder)._model):
        assert isinstance(model.model.layers[0].mlp.act_fn, type(ACT2FN["gelu_pytorch_tanh"]))
    (folder / "config.json").write_text(json.dumps(content | old | {"hidden_activation": "gelu"}))
    with pytest.raises(QuantizeError, match="hidden_activation: 'gelu' is not supported"):
        check_model(Checkpoint.open(folder), "quantized")


@pytest.mark.parametrize("name", MODELS)
def test_keys_are_seen_head_by_head(name):
    model = Model(name)
    expected = model.rope(0).paired(model.seen_keys(0))
    assert torch.equal(model.seen(0).attention.keys, expected)


def test_a_bias_of_channels_that_do_not_turn_goes_with_the_mean_of_k():
    model = Model("glm4")
    model.model.float()
    size, turned = model.dimensions.head_dim, 2 * int((model.rope(0).inv_freq > 0).sum())
    assert turned == size // 2
    bias = blocks(model.model, model.names)[0].get_submodule(model.names.k).bias
    found = {}
    for place, channel in (("turns", 0), ("is still", turned + 1)):
        with torch.no_grad():
            bias.zero_()
            bias.view(-1, size)[:, channel : channel + 2] = torch.tensor([300.0, -250.0])
        for k_mean in (False, True):
            options = QuantizeOptions.parse({"k_mean": k_mean, "kv_hadamard": False}, "options")
            layers = keys.large_biases(model.model, model.names, model.dimensions, options)
            found[place, k_mean] = "model.layers.0.self_attn.k_proj" in layers
    assert found == {
        ("turns", False): True,
        ("turns", True): True,  # the fastest pair has no mean
        ("is still", False): True,
        ("is still", True): False,
    }


def test_the_mean_of_k_is_left_out_where_scores_are_capped():
    names = with_names()["Gemma2ForCausalLM"]
    assert not QuantizeOptions.parse({}, "options").of_model(names).k_mean
    with pytest.raises(QuantizeError, match="k_mean: scores are capped"):
        QuantizeOptions.parse({"k_mean": True}, "options").of_model(names)
    assert QuantizeOptions.parse({"kv_bits": 16}, "options").of_model(names).k_mean


def test_calibrate_kv_refuses_capped_scores(tiny_model, tmp_path):
    model = tiny_models.write("Gemma2ForCausalLM", tmp_path / "model", tiny_model)
    with pytest.raises(QuantizeError, match="serve the model as it is, with `kv_bits`"):
        calibrate_kv._options(calibrate_kv.open_source(model), None, None, 8, 64)

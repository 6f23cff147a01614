"""Biases of K that a quantized KV cache cannot hold: who is warned, and what helps."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from biased_models import write_llama, write_qwen2
from conftest import DATA
from engines import engine
from plugin_units import qoq_config, tensor_parallel, vllm_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_qoq.bench.perplexity import text_perplexity
from vllm_qoq.checkpoint import inspect, verify
from vllm_qoq.checkpoint.folder import read_config
from vllm_qoq.checkpoint.kv_config import KVCache
from vllm_qoq.errors import UserError
from vllm_qoq.numerics import key_bias
from vllm_qoq.quantizer import QuantizeError, evaluate, job, keys
from vllm_qoq.quantizer.model import Dimensions, layer_names
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.plan import Job
from vllm_qoq.quantizer.text import pieces
from vllm_qoq.serving.kv import key_bias as serving_key_bias
from vllm_qoq.serving.kv.cache import kv_cache_in_force
from vllm_qoq.serving.options import Options as ServingOptions

LARGE = 80.0


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("key-bias")
    return {
        "none": tiny_model,
        "small": write_qwen2(tiny_model, folder / "small"),
        "llama": write_llama(tiny_model, folder / "llama"),
        "large": write_qwen2(tiny_model, folder / "large", LARGE),
    }


@pytest.fixture(scope="module")
def text(heldout_text):
    return heldout_text.read_text()[:3000]


def large_biases(folder, bits, use_hadamard=False, k_mean=False):
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = read_config(folder)
    options = QuantizeOptions(kv_bits=bits, kv_hadamard=use_hadamard, k_mean=k_mean)
    return keys.large_biases(model, layer_names(config), Dimensions.of(config), options)


@pytest.mark.parametrize("name", ["none", "small", "llama"])
def test_ordinary_models_are_not_warned_of(models, name):
    assert large_biases(models[name], 4) == large_biases(models[name], 4, True) == []


def test_a_large_bias_is_found_where_it_does_harm(models):
    layers = [f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)]
    assert large_biases(models["large"], 4) == layers
    assert large_biases(models["large"], 8) == large_biases(models["large"], 16) == []


def test_a_bias_of_slow_pairs_does_no_harm_beside_the_mean_and_one_of_fast_pairs_does(
    models, tmp_path
):
    assert large_biases(models["large"], 4, k_mean=True) == []
    fast = Path(shutil.copytree(models["large"], tmp_path / "fast"))
    tensors = load_file(fast / "model.safetensors")
    for name in (name for name in tensors if name.endswith("k_proj.bias")):
        tensors[name] = tensors[name].view(2, 2, 32).roll(1, dims=-1).flatten()
    save_file(tensors, fast / "model.safetensors", {"format": "pt"})
    assert len(large_biases(fast, 4)) == len(large_biases(fast, 4, k_mean=True)) == 2


@pytest.mark.parametrize("bias", [3.0, 30.0, 300.0])
def test_what_is_warned_of_is_the_error_of_the_scores(bias):
    """The error of attention scores as a cache makes it, at real positions."""
    from vllm_qoq.quantizer.strength import with_rope

    torch.manual_seed(0)
    queries, content = torch.randn(32, 4, 64), torch.randn(32, 2, 64)
    constant = torch.zeros(2, 64)
    constant[:, 31], constant[1, 10] = bias, bias / 3
    turned = key_bias.turned(constant)
    noise, without = key_bias.score_noise(queries, content, turned, 4, False)
    inv_freq = 10000.0 ** -(torch.arange(32) / 32)
    key = with_rope(content + constant, torch.arange(32) * 37, inv_freq)
    query = with_rope(queries, torch.arange(32) * 41, inv_freq)
    lost = evaluate.round_cache(key, 4) - key
    scores = torch.einsum("qhgd,khd->hqgk", query.view(32, 2, 2, 64), lost) / 8
    measured = scores.square().mean(dim=(1, 2, 3)).sqrt()
    assert (noise < 3 * measured).all() and (measured < 3 * noise).all(), (noise, measured)
    assert (noise > without).all()


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_bias_is_turned_as_the_model_turns_keys(is_neox, share):
    """GLM turns neighbors, and half of a head alone."""

    class Attention(torch.nn.Module):
        def __init__(self, quant_config):
            super().__init__()
            self.qkv_proj = QKVParallelLinear(
                256, 64, 4, 2, quant_config=quant_config, prefix="block.qkv_proj"
            )
            parameters = {"rope_theta": 10000, "partial_rotary_factor": share}
            self.rotary_emb = get_rope(64, 8192, is_neox_style=is_neox, rope_parameters=parameters)

    bias = torch.randn(1, 64)
    with tensor_parallel(0, 1, vllm_config()):
        config = qoq_config(kv_cache={"bits": 4})
        attention = Attention(config)
        found = config.kv_cache()._key_biases._layers["block.qkv_proj"]
        assert found == (attention.qkv_proj, attention)
        positions = torch.randint(8192, (4096,))
        _, keys = attention.rotary_emb.forward_native(
            positions, torch.zeros(4096, 64), bias.expand(4096, 64).clone()
        )
    turned = key_bias.turned(bias, **serving_key_bias._rotary_of(attention))[:, 0]
    # The slowest pairs have been turned a little only, and random angles are 32.
    fast = torch.isclose(keys.abs().amax(0), turned.abs().amax(0), rtol=0.1)
    rest = keys.std(0) < 1e-6
    assert fast.float().mean() > 0.7
    assert int(rest.sum()) == 64 - 64 * share and torch.equal(turned.std(0) < 1e-6, rest)


def test_rotating_the_keys_helps_in_the_simulation_too(models, text, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(models["large"], dtype=torch.float32).eval()
    (tmp_path / "text").write_text(text)
    windows = pieces(tmp_path / "text", AutoTokenizer.from_pretrained(models["large"]), 256, None)
    plain = evaluate.perplexity(model, windows)
    four, rotated = (evaluate.perplexity(model, windows, 4, kv_hadamard=h) for h in (False, True))
    assert four > 3 * plain and rotated < 0.5 * four
    eight, mixed = (evaluate.perplexity(model, windows, bits) for bits in (8, "k8v4"))
    assert mixed < 1.2 * plain and mixed != eight  # the bias is of keys


@pytest.fixture
def warnings_of(monkeypatch):
    """What is warned of while the test runs."""
    messages = []
    monkeypatch.setattr(
        serving_key_bias.logger, "warning", lambda form, *args: messages.append(form % args)
    )
    return messages


def test_serving_warns_of_it_and_rotation_can_be_asked_for(models, text, warnings_of):
    def serve(name, **qoq):
        llm = engine(models[name], qoq, quantization="qoq", **CHUNKED)
        warned = list(warnings_of)
        warnings_of.clear()
        return text_perplexity(llm, text, 256)["perplexity"], warned

    eight, not_warned = serve("large", kv_bits=8)
    four, warned = serve("large", kv_bits=4)
    rotated, _ = serve("large", kv_bits=4, kv_hadamard=True)
    assert not_warned == [] and len(warned) == 1
    assert "model.layers.0.self_attn.qkv_proj, model.layers.1.self_attn.qkv_proj" in warned[0]
    assert '{"qoq": {"kv_hadamard": true}}' in warned[0] and "calibrate-kv" in warned[0]
    assert four > 3 * eight and rotated < 0.5 * four
    assert serve("small", kv_bits=4)[1] == []


# So that most of a window is read from the cache.
CHUNKED = {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}


def in_force(kv_cache, **options):
    return kv_cache_in_force(kv_cache, ServingOptions(**options))


def test_the_switch_replaces_what_the_checkpoint_says():
    four = KVCache(bits=4)
    assert in_force(four, kv_hadamard=True).hadamard
    assert not in_force(KVCache(bits=4, hadamard=True), kv_hadamard=False).hadamard
    assert in_force(KVCache(bits=4, hadamard=True)).hadamard
    assert in_force(None, kv_bits=8, kv_hadamard=True) == KVCache(bits=8, hadamard=True)
    for options in ({}, {"kv_bits": 16}):
        with pytest.raises(UserError, match=r"kv_hadamard: .* add kv_bits"):
            in_force(None, kv_hadamard=True, **options)


def quantize(model, folder, **options):
    options = {"sets": ("w4a8",), "gptq": False, "clip": False, **options}
    wanted = QuantizeOptions(**options, samples=4, seqlen=128)
    out, work = folder / "out", folder / "work"
    return job.run(Job(model, out, DATA / "calibration.txt", work, overwrite=True), wanted)


def test_quantize_warns_where_mean_and_smooth_attention_are_left_out(models, tmp_path, capsys):
    plain = {"smooth_attention": False, "k_mean": False}
    report = quantize(models["large"], tmp_path, **plain, kv_hadamard=True)
    err = capsys.readouterr().err
    assert "warning: the bias of K" in err and "model.layers.0.self_attn.k_proj" in err
    assert "do not leave out the mean of K, or do not leave out SmoothAttention" in err
    assert "--kv-bits 8" in err
    assert len(report["large_key_biases"]) == 2
    config = read_config(tmp_path / "out")
    assert config["quantization_config"]["kv_cache"] == {"bits": 4, "hadamard": True}
    report = quantize(models["large"], tmp_path)
    assert "warning" not in capsys.readouterr().err and "large_key_biases" not in report


@pytest.fixture(scope="module")
def with_means(models, tmp_path_factory):
    """The model with the large bias, in W4A8, whose keys nothing evens out but their means."""
    folder = tmp_path_factory.mktemp("with-means")
    quantize(models["large"], folder, smooth_attention=False, kv_hadamard=False)
    return folder / "out"


def without_means(checkpoint, out):
    """The same checkpoint as one from before there were means."""
    shutil.copytree(checkpoint, out)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["kv_cache"].pop("k_mean")
    (out / "config.json").write_text(json.dumps(config))
    tensors = {}
    for file in out.glob("model*.safetensors*"):
        tensors |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".k_mean")}
    assert len(kept) == len(tensors) - 2
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    return out


def test_the_mean_takes_the_harm_out_of_a_large_bias(with_means, text, tmp_path, warnings_of):
    assert verify.structure(with_means) == []
    assert "keys without their mean" in inspect.table(inspect.inspect(with_means))
    plain = without_means(with_means, tmp_path / "plain")
    assert verify.structure(plain) == []

    def serve(folder, **qoq):
        return text_perplexity(engine(folder, qoq, **CHUNKED), text, 256)["perplexity"]

    exact, centred = serve(with_means, kv_bits=16), serve(with_means)
    assert centred < 1.03 * exact and warnings_of == []
    mixed = serve(with_means, kv_bits="k8v4")
    assert mixed < 1.03 * exact and mixed != centred
    assert serve(plain) > 3 * centred and len(warnings_of) == 1


@pytest.mark.parametrize(("bits", "of_keys"), [(4, 4), (8, 8), ("k8v4", 8)])
def test_every_quantized_cache_has_a_mean_and_where_it_can_a_rotation(bits, of_keys):
    options = QuantizeOptions.parse({"kv_bits": bits}, "options")
    assert options.key_bits == of_keys and options.has_k_mean
    assert options.of_heads(64).kv_hadamard and not options.of_heads(96).kv_hadamard
    whole = QuantizeOptions.parse({"kv_bits": 16}, "options")
    assert not whole.has_k_mean and not whole.of_heads(64).kv_hadamard


def test_a_rotation_of_nothing_is_refused():
    with pytest.raises(QuantizeError, match=r"kv_hadamard rotates.*kv_bits 4, k8v4 or 8"):
        QuantizeOptions.parse({"kv_hadamard": True, "kv_bits": 16}, "options")

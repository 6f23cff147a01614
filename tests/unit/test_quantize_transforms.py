"""Every step before rounding leaves the function of the model as it is."""

import pytest
import torch
from transformed_models import MODELS, Model

from vllm_qoq.quantizer import QuantizeError, rotate
from vllm_qoq.quantizer.experts import use_linear_experts
from vllm_qoq.quantizer.model import blocks, layer_names
from vllm_qoq.quantizer.strength import pairs

STEPS = ("R1", "R2", "SmoothAttention", "smooth_outputs", "reorder")
SINGLY = ("llama", "llama with biases", "qwen3", "phi3, partial rotary", "gemma")


@pytest.mark.parametrize(
    ("name", "step"),
    [*((name, "all") for name in MODELS), *((name, step) for name in SINGLY for step in STEPS)],
)
def test_a_step_keeps_the_logits_and_changes_weights(name, step):
    model = Model(name)
    model.give_large_pair()
    before = model.logits()
    weights = {k: t.clone() for k, t in model.model.state_dict().items()}
    model.step(step)
    after = model.logits()
    assert (after - before).abs().max() < 1e-5 * before.abs().max()  # scales are float32
    changed = {k for k, t in model.model.state_dict().items() if not torch.equal(t, weights[k])}
    assert changed
    if step == "all":
        wanted = [
            f"model.layers.{i}.{place}.weight" for i in range(2) for place in places(model, i)
        ]
        assert set(wanted) <= changed


def places(model, index):
    """The layers of a block that take part in some step."""
    names, block = model.names, model.names.of_block(index)
    found = [*block.linears, *block.routers, *block.attention_floats]
    found += (names.q_norm, names.k_norm) if names.q_norm and block.has_keys else ()
    found += () if block.has_keys else (names.linear.norm,)
    if names.k_norm and not model.can("R1"):  # the norms take the scales, and R1 no part
        found = [place for place in found if place not in (names.q, names.k)]
    return found


def test_rotation_spreads_an_outlier_channel():
    model = Model("llama")
    with torch.no_grad():
        model.model.get_input_embeddings().weight[:, 5] *= 100
    seen = []

    def largest_share(module, args):
        x = args[0]
        seen.append(float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean()))

    for block in blocks(model.model, model.names)[:1]:
        block.get_submodule(model.names.q).register_forward_pre_hook(largest_share)
    model.logits()
    model.step("R1")
    model.logits()
    before, after = seen
    assert before > 8 and after < 0.45 * before


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_smooth_attention_leaves_keys_as_they_are_that_gain_little(name):
    model = Model(name)
    weights = {k: t.clone() for k, t in model.model.state_dict().items()}
    model.smooth(attention=True)
    assert all(torch.equal(t, weights[k]) for k, t in model.model.state_dict().items())


def test_smooth_attention_evens_out_the_keys():
    model = Model("llama")
    model.give_large_pair()
    before, error_before = model.seen(0), model.key_error(0)
    model.smooth(0, attention=True)
    after, error_after = model.seen(0), model.key_error(0)
    before, after = (pairs(seen.attention.keys).amax(0)[0] for seen in (before, after))
    assert before.max() / before.median() > 20 and after.max() / after.median() < 8
    assert error_after < 0.3 * error_before


@pytest.mark.parametrize("gain", [0.1, 1.0])
def test_norms_that_add_one_lose_no_more_than_others_in_bf16(gain):
    """Stored is (1 + w) / s - 1, of which few bits tell how far (1 + w) / s is from 0."""
    model = Model("gemma3")
    model.give_large_pair()
    names, block = model.names, blocks(model.model, model.names)[0]
    norms = [block.get_submodule(name) for name in (names.q_norm, names.k_norm)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.add_(1).mul_(gain).sub_(1)
    before = [norm.weight.clone() for norm in norms]
    model.smooth(0, attention=True)
    assert not torch.equal(norms[1].weight, before[1])
    for norm, old in zip(norms, before, strict=True):
        lost = (norm.weight.bfloat16().double() - norm.weight).abs() / (1 + norm.weight).abs()
        # Where the model itself is below that half, it may lose what it lost before.
        assert (lost <= 2**-8 / (1 + old).abs().clamp_max(1)).all()


def test_values_and_their_readers_become_equally_large():
    model = Model("llama")
    block = blocks(model.model, model.names)[0]
    v, o = (block.get_submodule(name) for name in (model.names.v, model.names.o))
    with torch.no_grad():
        v.weight[::7] *= 16
    model.smooth(0, outputs=True)
    values = model.seen(0).attention.values
    readers = o.weight.square().sum(0).view(2, 2, 32).sum(1).sqrt()
    ratio = values / readers
    assert (ratio / ratio.mean(1, keepdim=True) - 1).abs().max() < 1e-3


def test_the_inputs_of_down_proj_are_smoothed_where_that_helps():
    model = Model("llama")
    block = blocks(model.model, model.names)[0]
    up, down = (block.get_submodule(name) for name in (model.names.up, model.names.down))
    with torch.no_grad():
        up.weight[5] *= 100
        down.weight[:, 5] /= 100
    before = largest_inputs(model, model.names.down)
    model.smooth(0, outputs=True)
    after = largest_inputs(model, model.names.down)
    assert before.max() / before.median() > 40
    assert after.max() / after.median() < 0.3 * before.max() / before.median()


def test_the_norm_of_linear_attention_takes_scales_that_all_heads_share():
    model = Model("qwen3.5")
    block, linear = blocks(model.model, model.names)[1], model.names.linear
    norm, out = block.get_submodule(linear.norm), block.get_submodule(linear.o)
    with torch.no_grad():
        norm.weight[5] *= 100
        out.weight.unflatten(1, (-1, len(norm.weight)))[:, :, 5] /= 100
    before, logits = model.seen(1).downs[linear.o].largest, model.logits()
    model.smooth(1, outputs=True)
    after = model.seen(1).downs[linear.o].largest
    assert before.max() / before.median() > 40
    assert after.max() / after.median() < 0.3 * before.max() / before.median()
    assert (model.logits() - logits).abs().max() < 1e-5 * logits.abs().max()


def largest_inputs(model, down):
    """The largest inputs of a down_proj of the first block."""
    return model.seen(0).downs[down].largest


@pytest.mark.parametrize("name", ["llama", "qwen2 moe", "mixtral"])
def test_reordering_sorts_the_inputs_of_every_down_proj(name):
    model = Model(name)
    model.smooth(0, reorder=True)
    downs = model.seen(0).downs.values()
    assert len(downs) > {"llama": 0, "qwen2 moe": 3, "mixtral": 2}[name]
    assert all((down.largest.diff() <= 1e-6).all() for down in downs)


@pytest.mark.parametrize("name", ["qwen2 moe", "qwen3 moe", "mixtral", "qwen3 next"])
def test_experts_as_linear_layers_compute_what_those_of_transformers_do(name):
    model = Model(name, has_linear_experts=False)
    model.model.float()  # transformers has no products of experts in float64
    expected = model.logits()
    weights = {k: t.untyped_storage().data_ptr() for k, t in model.model.state_dict().items()}
    use_linear_experts(model.model, model.names)
    torch.testing.assert_close(model.logits(), expected)
    linear = model.model.state_dict()
    assert {t.untyped_storage().data_ptr() for t in linear.values()} == set(weights.values())
    assert len(linear) == len(set(linear)) > len(weights)


def test_a_size_without_a_hadamard_matrix_is_refused():
    with pytest.raises(QuantizeError, match=r"size 34 is known; quantize with --no-rotate"):
        rotate.hadamard(34)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, r"'gpt2' is not supported; supported are llama, mistral"),
        ({"model_type": "llama4_text"}, r"not supported, because .* no steps for experts that are"),
        ({"model_type": "llama", "quantization_config": {}}, r"quantized already.*bf16"),
        ({}, r"None is not supported"),
    ],
)
def test_an_unknown_architecture_is_refused_by_name(config, message):
    with pytest.raises(QuantizeError, match=message):
        layer_names(config)

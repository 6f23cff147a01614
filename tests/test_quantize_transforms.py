"""Every step before rounding leaves the function of the model as it is."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vllm_qoq.quantize import QuantizeError, rotate, smooth
from vllm_qoq.quantize.architectures import Shape, architecture, blocks

SIZES = {
    "hidden_size": 96,  # a Hadamard matrix that is no power of two
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama with biases": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    ),
    "tied llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
}
STEPS = ("fold_norms", "R1", "R2", "SmoothAttention", "smooth outputs", "reorder", "all")


class Model:
    """A random model in float64, so that a step's own rounding cannot hide a mistake."""

    def __init__(self, name):
        kind, config = MODELS[name]
        torch.manual_seed(0)
        self.model = kind(config).eval().double()
        with torch.no_grad():
            for tensor in self.model.parameters():
                if tensor.ndim == 1:  # norms and biases, which are born as ones and zeros
                    tensor.add_(torch.randn_like(tensor) * 0.3)
        content = config.to_dict() | {"model_type": config.model_type}
        self.arch, self.shape = architecture(content), Shape.of(content)
        rotate.untie(self.model, self.arch)

    @torch.no_grad()
    def logits(self):
        tokens = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))
        return self.model(tokens).logits

    def smooth(self, **options):
        wanted = smooth.SmoothOptions(**{"attention": 0.0, "reorder": False} | options)
        for block in blocks(self.model, self.arch):
            seen = smooth.Magnitudes(
                key_pairs=torch.rand(self.shape.kv_heads, self.shape.head_dim // 2) * 9 + 1,
                down=torch.rand(256) * 9 + 1,
            )
            found = smooth.transforms(seen, block, self.arch, wanted)
            smooth.apply(block, found, self.arch, self.shape)

    def step(self, name):
        if name in ("fold_norms", "R1", "all"):
            rotate.fold_norms(self.model, self.arch)
        if name in ("R1", "all"):
            rotate.rotate_stream(self.model, self.arch, self.shape)
        if name in ("R2", "all"):
            rotate.rotate_values(self.model, self.arch, self.shape)
        if name in ("SmoothAttention", "all"):
            self.smooth(attention=0.5)
        if name in ("smooth outputs", "all"):
            self.smooth(output=0.4)
        if name in ("reorder", "all"):
            self.smooth(reorder=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_keeps_the_logits_and_changes_weights(name, step):
    model = Model(name)
    before = model.logits()
    weights = {k: t.clone() for k, t in model.model.state_dict().items()}
    model.step(step)
    after = model.logits()
    assert (after - before).abs().max() < 1e-5 * before.abs().max()  # scales are float32
    changed = [k for k, t in model.model.state_dict().items() if not torch.equal(t, weights[k])]
    assert changed


def test_rotation_spreads_an_outlier_channel():
    model = Model("llama")
    with torch.no_grad():
        model.model.get_input_embeddings().weight[:, 5] *= 100
    seen = []

    def largest_share(module, args):
        x = args[0]
        seen.append(float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean()))

    for block in blocks(model.model, model.arch)[:1]:
        block.get_submodule(model.arch.q).register_forward_pre_hook(largest_share)
    model.logits()
    model.step("R1")
    model.logits()
    before, after = seen
    assert before > 8 and after < 0.45 * before


def test_smooth_attention_evens_out_the_keys():
    model = Model("llama")
    k = blocks(model.model, model.arch)[0].get_submodule(model.arch.k)
    with torch.no_grad():
        k.weight[3] *= 30
        k.weight[3 + 16] *= 30  # the other half of the pair

    def magnitudes():
        seen = []
        hook = k.register_forward_hook(
            lambda m, a, out: seen.append(smooth.key_pair_magnitude(out, model.shape))
        )
        model.logits()
        hook.remove()
        return seen[0]

    before = magnitudes()
    block = blocks(model.model, model.arch)[0]
    found = smooth.transforms(
        smooth.Magnitudes(before, torch.ones(256)),
        block,
        model.arch,
        smooth.SmoothOptions(attention=0.5, reorder=False),
    )
    smooth.apply(block, found, model.arch, model.shape)
    after = magnitudes()
    assert before[0].max() / before[0].median() > 20
    assert after[0].max() / after[0].median() < 8


def test_reordering_sorts_the_inputs_of_down_proj():
    model = Model("llama")
    block = blocks(model.model, model.arch)[0]
    inputs = []
    down = block.get_submodule(model.arch.down)
    down.register_forward_pre_hook(lambda m, args: inputs.append(args[0].abs().flatten(0, -2)))
    model.logits()
    seen = smooth.Magnitudes(torch.ones(2, 16), inputs[0].amax(0).float())
    options = smooth.SmoothOptions(attention=0.0, reorder=True)
    smooth.apply(
        block, smooth.transforms(seen, block, model.arch, options), model.arch, model.shape
    )
    model.logits()
    largest = inputs[1].amax(0)
    assert (largest.diff() <= 1e-12).all()


def test_a_size_without_a_hadamard_matrix_is_refused():
    with pytest.raises(QuantizeError, match=r"size 34 is known; quantize with --no-rotate"):
        rotate.hadamard(34)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, r"'gpt2' is not supported; supported are llama, mistral"),
        ({"model_type": "llama", "quantization_config": {}}, r"quantized already.*bf16"),
        ({}, r"None is not supported"),
    ],
)
def test_an_unknown_architecture_is_refused_by_name(config, message):
    with pytest.raises(QuantizeError, match=message):
        architecture(config)

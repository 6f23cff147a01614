"""What makes the passes fast on a CPU computes what the plain form does."""

import pytest
import torch
from transformed_models import SIZES, build

from vllm_qoq.numerics.reference import quantize_per_token
from vllm_qoq.numerics.reference_attention import hadamard
from vllm_qoq.quantizer import attention, strength
from vllm_qoq.quantizer.evaluate import to_int8
from vllm_qoq.quantizer.text import spread

ATTENTIONS = {
    "llama": {},
    "mistral": {},
    "mistral with a window": {"sliding_window": 5},
    "granite": {"attention_multiplier": 0.3},
    "gemma2": {"attn_logit_softcapping": 0.01},
    "gemma3": {},
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_fused_attention_computes_what_eager_attention_does(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = build(name.partition(" ")[0], **ATTENTIONS[name])
    model.set_attn_implementation("eager")
    tokens = torch.randint(0, SIZES["vocab_size"], (1, 40))
    calls = []
    fused = attention.scaled_dot_product_attention
    monkeypatch.setattr(
        attention, "scaled_dot_product_attention", lambda *a, **k: calls.append(k) or fused(*a, **k)
    )
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        with attention.fused_attention():
            found = model(tokens, use_cache=False).logits
        after = model(tokens, use_cache=False).logits
    # Capped scores are computed step by step.
    assert len(calls) == (0 if name == "gemma2" else SIZES["num_hidden_layers"])
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(after, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 300, 512), (7, 48)])
def test_inputs_are_rounded_as_the_kernels_do(dtype, shape):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    x.view(-1, shape[-1])[3] = 0
    codes, scale, _ = quantize_per_token(x.flatten(0, -2))
    expected = (codes * scale[:, None]).to(dtype).view(shape)
    before = x.clone()
    assert torch.equal(to_int8(x), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("use_hadamard", [False, True])
def test_scales_of_keys_follow_the_gradient(use_hadamard):
    """The same steps with the gradient that autograd computes."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(64, 3, 16, generator=generator) * torch.linspace(0.2, 4, 16)
    keys[:, 2] = 0
    weights = torch.rand(3, 8, generator=generator) + 0.1
    found = strength._descend(keys, weights, torch.ones(3, 8), use_hadamard)

    logarithm = torch.zeros(3, 8, requires_grad=True)
    optimizer = torch.optim.Adam([logarithm], lr=strength._RATE, betas=strength._MOMENTS)
    for _ in range(strength._STEPS):
        both = logarithm.exp().repeat(1, 2)
        scaled = hadamard(keys / both) if use_hadamard else keys / both
        span = scaled.amax(dim=-1) - scaled.amin(dim=-1)
        error = span.square().mean(dim=0) * (both * weights.repeat(1, 2)).square().sum(dim=-1)
        optimizer.zero_grad()
        error.clamp_min(strength._SMALLEST).log().sum().backward()
        optimizer.step()
    assert torch.allclose(found, logarithm.detach().exp(), rtol=2e-2)
    assert (found[:2] / found[:2].mean(dim=1, keepdim=True) - 1).abs().max() > 0.1
    assert torch.equal(found[2], torch.ones(8))


def test_a_few_values_are_taken_from_all_over_a_list():
    assert spread(list(range(10)), 3) == [0, 3, 6]
    assert spread([1, 2], 5) == [1, 2]

"""The mean of K after RoPE: computed for every length, measured on a real block."""

from dataclasses import replace

import pytest
import torch
from transformed_models import Model

from vllm_qoq.quantizer import k_mean, smooth
from vllm_qoq.quantizer.model import blocks
from vllm_qoq.quantizer.strength import with_rope

INV_FREQ = 10000.0 ** -(torch.arange(16) / 16)


def test_it_is_the_mean_over_all_positions_of_every_length():
    mean = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    found = k_mean.after_rope(mean, INV_FREQ, 2048)
    turned = with_rope(mean.expand(2048, -1, -1).double(), torch.arange(2048), INV_FREQ)
    expected = torch.stack([turned[:n].mean(0) for n in (512, 1024, 2048)]).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    # What hardly turns stays, what turns often goes.
    assert found[:, 0].abs().max() < 0.01
    torch.testing.assert_close(found[:, 15], mean[:, 15], rtol=0.2, atol=0.2)


@pytest.mark.parametrize(
    ("longest", "expected"),
    [(40, [40]), (512, [512]), (1500, [512, 1024]), (2048, [512, 1024, 2048])],
)
def test_every_doubling_of_the_length_counts_alike(longest, expected):
    assert k_mean.lengths(longest) == expected
    positions = k_mean.sample_positions(300, longest)
    assert positions.max() < max(expected) and positions.float().mean() < longest / 2


def test_a_pair_that_does_not_turn_keeps_its_mean():
    mean = torch.tensor([[2.0, -3.0]])
    assert torch.equal(k_mean.after_rope(mean, torch.zeros(1), 4096), mean)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *(("llama with biases", has) for has in (False, True)),
        *(("qwen3", has) for has in (False, True)),
        *(("glm4", True), ("olmo2", True), ("gemma3", True), ("phi3, partial rotary", True)),
    ],
)
def test_it_is_that_of_the_keys_of_the_smoothed_model(name, attention):
    model = Model(name)
    block = blocks(model.model, model.names)[0]
    rope = replace(model.rope(0), longest=40)  # as long as the texts of `logits`
    options = dict.fromkeys(("attention", "outputs", "reorder"), False) | {"attention": attention}
    wanted = smooth.SmoothOptions(k_mean=True, **options, key_bits=4, weight_bits=4, group_size=128)
    seen = model.seen(0)
    found = smooth.transforms(seen, block, model.names, model.dimensions, rope, wanted)
    mlps = model.names.of_block(0).mlps
    smooth.apply(block, found, model.names, model.dimensions, mlps)
    keys = model.seen_keys(0)
    # Random tokens have the same keys at every position, but for chance.
    turned = with_rope(rope.paired(keys), torch.arange(40).repeat(2), rope.inv_freq)
    turned = rope.of_model(turned)
    expected, size = turned.mean(0), turned.square().mean(0).sqrt().norm()
    assert (found["k_mean"] - expected).norm() < 0.15 * size
    assert ("bias" not in name and name != "glm4") or expected.norm() > 0.4 * size
    assert ("key_scale" in found) == attention

"""Nested sets in vLLM: loading, one layer against the reference, whole models on the CPU."""

import json

import pytest
import torch
from engines import PROMPTS, engine, generate
from linear_layers import FUSED, SHAPES, Block, finish
from nested_layers import stored
from plugin_units import qoq_config, tensor_parallel, vllm_config
from qoq_checkpoints import NESTED
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.model_executor.models.utils import AutoWeightsLoader

import vllm_qoq
from vllm_qoq.bench.perplexity import text_perplexity
from vllm_qoq.errors import FormatError
from vllm_qoq.numerics import reference
from vllm_qoq.numerics.packing import pack_nibbles, unpack_nibbles

BOTH = {"prefill": "w8a8", "decode": [{"set": "w4a8"}]}


def loaded(tensors, rank=0, size=1, routing=BOTH, **options):
    config = qoq_config(sets=NESTED, routing=routing)
    with tensor_parallel(rank, size, vllm_config()):
        model = Block(config, **options)
        mapper = config.get_cache_scale_mapper()
        AutoWeightsLoader(model).load_weights(mapper.apply(tensors.items()), mapper=FUSED)
    return model


def weights_of(tensors, parts):
    leaves = [
        {
            leaf: tensors[f"{name}.block.{part}.{leaf}"]
            for name, leaf in (
                *(("w4a8", leaf) for leaf in ("qweight", "channel_scale")),
                *(("w4a8", leaf) for leaf in ("group_scale", "group_offset")),
                ("w8a8", "qresidual"),
            )
        }
        for part in parts
    ]
    return torch.cat([reference.dequantize(part) for part in leaves])


@pytest.mark.parametrize(
    "layer, parts",
    [
        ("qkv_proj", ["q_proj", "k_proj", "v_proj"]),
        ("gate_up_proj", ["gate_proj", "up_proj"]),
        ("down_proj", ["down_proj"]),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_every_rank_computes_with_its_slice_of_both_planes(layer, parts, size):
    tensors = stored()
    whole = weights_of(tensors, parts)
    x = torch.randn(5, whole.shape[1]).bfloat16()
    codes, scale, _ = reference.quantize_per_token(x)
    expected = (codes.double() * scale.double()[:, None]) @ whole.double().t()
    outputs = []
    for rank in range(size):
        module = getattr(finish(loaded(tensors, rank, size)).block, layer)
        method, weights = module.quant_method, module.w8a8
        assert "qresidual" not in dict(weights.named_parameters())
        if layer == "down_proj":  # a rank has a part of the inputs, and quantizes them itself
            part = x.chunk(size, dim=1)[rank]
            codes, scale, row_sum = reference.quantize_per_token(part)
            given = codes, scale, row_sum
            y = weights.apply_int8(given, torch.bfloat16, False).double()
            own = whole.chunk(size, dim=1)[rank]
            ours = (codes.double() * scale.double()[:, None]) @ own.double().t()
            assert (y - ours).abs().max() <= ours.abs().max() * 2**-8
        else:
            outputs.append(weights.apply(x, False).double())
        assert method.sets["w8a8"].base == "w4a8"
    if outputs:
        rows = [
            y.split([p.shape[0] // size for p in part_weights(tensors, parts)], 1) for y in outputs
        ]
        y = torch.cat([torch.cat(shards, 1) for shards in zip(*rows, strict=True)], 1)
        assert (y - expected).abs().max() <= expected.abs().max() * 2**-8


def test_each_set_adds_its_own_bias():
    tensors = stored()
    for name in ("w4a8", "w8a8"):
        for part, (n, _) in SHAPES.items():
            tensors[f"{name}.block.{part}.bias"] = 100 * torch.randn(n)
    block = finish(loaded(tensors, bias=True)).block
    x = torch.randn(3, SHAPES["down_proj"][1]).bfloat16()
    for name in ("w4a8", "w8a8"):
        weights = getattr(block.down_proj, name)
        added = weights.apply(x, True).float() - weights.apply(x, False).float()
        expected = tensors[f"{name}.block.down_proj.bias"].expand_as(added)
        torch.testing.assert_close(added, expected, rtol=0.02, atol=1)


def part_weights(tensors, parts):
    return [tensors[f"w4a8.block.{part}.qweight"] for part in parts]


@pytest.mark.parametrize(
    "routing",
    [
        {"prefill": "w8a8", "decode": "w8a8"},
        BOTH,
    ],
)
def test_the_base_is_loaded_wherever_its_residual_is(routing):
    model = loaded(stored(), routing=routing)
    assert set(model.block.down_proj.quant_method.sets) == {"w8a8", "w4a8"}


def test_without_the_nested_set_its_plane_is_not_loaded():
    model = loaded(stored(), routing={"prefill": "w4a8", "decode": "w4a8"})
    assert set(model.block.down_proj.quant_method.sets) == {"w4a8"}


def test_a_residual_that_leaves_int8_is_refused_by_name():
    tensors = stored()
    q = tensors["w4a8.block.k_proj.qweight"]
    tensors["w4a8.block.k_proj.qweight"] = torch.zeros_like(q)
    tensors["w4a8.block.k_proj.group_offset"].fill_(-128)
    residual = unpack_nibbles(tensors["w8a8.block.k_proj.qresidual"])
    tensors["w8a8.block.k_proj.qresidual"] = pack_nibbles(residual * 0 + 8)
    finish(loaded(tensors))  # -128 itself is an int8
    residual = residual * 0 + 8
    residual[3, 5] = 7
    tensors["w8a8.block.k_proj.qresidual"] = pack_nibbles(residual)
    with pytest.raises(FormatError, match=r"set 'w8a8': block\.k_proj\.qresidual: .* int8"):
        finish(loaded(tensors))


def test_a_lost_residual_is_named():
    tensors = stored()
    del tensors["w8a8.block.up_proj.qresidual"]
    with pytest.raises(FormatError, match=r"w8a8\.block\.up_proj\.qresidual"):
        finish(loaded(tensors))


# Whole models


def test_phases_use_their_planes(nested_dir, w4a8_dir):
    llm = engine(nested_dir)
    before = vllm_qoq.step_counts(llm)
    generation = generate(llm, PROMPTS, 12)
    counts = {key: n - before[key] for key, n in vllm_qoq.step_counts(llm).items()}
    assert counts["prefill", "w8a8"] > 0 and counts["decode", "w4a8"] >= 11
    assert counts["prefill", "w4a8"] == counts["decode", "w8a8"] == 0
    # In 4 bits the model is the one that was never nested, to the bit.
    four = generate(engine(nested_dir, {"force_set": "w4a8"}), PROMPTS, 12)
    assert four == generate(engine(w4a8_dir), PROMPTS, 12)
    eight = generate(engine(nested_dir, {"force_set": "w8a8"}), PROMPTS, 12)
    assert generation != four and eight != four
    assert [tokens[0] for tokens, _ in generation] == [tokens[0] for tokens, _ in eight]


def test_eight_bits_lose_less_than_four(nested_dir, tiny_model, heldout_text):
    text = heldout_text.read_text()[:8000]
    plain, eight, four = (
        text_perplexity(llm, text, 256)["perplexity"]
        for llm in (
            engine(tiny_model),
            engine(nested_dir, {"force_set": "w8a8"}),
            engine(nested_dir, {"force_set": "w4a8"}),
        )
    )
    assert eight == pytest.approx(plain, rel=0.01)
    assert abs(eight / plain - 1) < 0.3 * abs(four / plain - 1)


def test_dummy_weights_are_valid(nested_dir):
    assert generate(engine(nested_dir, load_format="dummy"), PROMPTS[:1], 4)


def test_a_corrupted_residual_stops_the_engine(nested_dir, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in nested_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("qresidual"))
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["quantization_config"]
    with pytest.raises(Exception, match="qresidual"):
        engine(folder)


def test_a_prompt_that_is_cached_up_to_its_last_token_is_generated_from(nested_dir):
    llm = engine(nested_dir, block_size=32)
    prompt = [{"prompt_token_ids": list(range(5, 5 + 33))}]
    sampling = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)

    def counted():
        before = vllm_qoq.step_counts(llm)
        llm.generate(prompt, sampling, use_tqdm=False)
        after = vllm_qoq.step_counts(llm)
        return {key: n - before[key] for key, n in after.items() if n > before[key]}

    prefill, decode = ("prefill", "w8a8"), ("decode", "w4a8")
    assert counted() == {prefill: 1, decode: 2}
    assert counted() == {decode: 3}

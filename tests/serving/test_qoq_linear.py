"""The method `qoq_linear`: loading, one layer against the reference, whole models on the CPU."""

import gc
import json
import re
import sys
import weakref

import pytest
import torch
from engines import PROMPTS, engine, generate
from linear_layers import FUSED, SHAPES, Block, finish
from plugin_units import (
    HIDDEN,
    qoq_config,
    scheme,
    tensor_parallel,
    tensors,
    vllm_config,
)
from qoq_checkpoints import GROUP, PER_CHANNEL, round_to_nearest, write_dequantized
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

import vllm_qoq
from merge_tools.__main__ import main as merge_tools_main
from vllm_qoq import ops
from vllm_qoq.bench.perplexity import text_perplexity
from vllm_qoq.errors import FormatError
from vllm_qoq.kernel_library import BUILD
from vllm_qoq.numerics import reference
from vllm_qoq.serving.methods.qoq_linear import QoQLinearConfig

FORCED = {"prefill": "w4a8", "decode": "w4a8"}
GROUPS = pytest.mark.parametrize(
    "group_size", [GROUP, 32, PER_CHANNEL], ids=["g128", "g32", "per-channel"]
)


def set_config(group_size, **changes):
    return {"quant_method": "qoq_linear", "group_size": group_size} | changes


def config_of(group_size, **changes):
    return qoq_config(sets={"w4a8": set_config(group_size, **changes)}, routing=FORCED)


def stored(group_size, bias=False):
    """All tensors of the block, as a checkpoint names them."""
    random = torch.Generator().manual_seed(7)
    weights = {}
    for layer, shape in SHAPES.items():
        leaves = round_to_nearest(torch.randn(shape, generator=random), group_size)
        if bias:
            leaves["bias"] = torch.randn(shape[0], generator=random)
        weights |= {f"w4a8.block.{layer}.{leaf}": t for leaf, t in leaves.items()}
    return weights


def loaded(group_size, weights, rank=0, size=1, **options):
    with tensor_parallel(rank, size, vllm_config()):
        model = Block(config_of(group_size), **options)
        AutoWeightsLoader(model).load_weights(weights.items(), mapper=FUSED)
    return model


def leaves_of(weights, part):
    prefix = f"w4a8.block.{part}."
    return {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}


def expected_output(weights, part, x):
    """What the reference says: dequantized tokens times dequantized weight, in float64."""
    leaves = leaves_of(weights, part)
    codes, scale, _ = reference.quantize_per_token(x)
    y = (codes.double() * scale.double()[:, None]) @ reference.dequantize(leaves).double().t()
    return y + leaves["bias"].to(x.dtype).double() if "bias" in leaves else y


def assert_rounded(y, expected, group_size):
    """`y` is `expected` rounded once to its dtype, after a float32 epilogue.

    Without groups the epilogue subtracts the zero point's share, and the difference may be
    much smaller than both, hence the absolute term.
    """
    slack = expected.abs().max() * (2**-18 if group_size == PER_CHANNEL else 2**-23)
    bound = expected.abs() * torch.finfo(y.dtype).eps / 2 * 1.01 + slack
    assert ((y.double() - expected).abs() <= bound).all()


@GROUPS
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_gets_its_slice_of_every_tensor(rank, group_size):
    weights = stored(group_size)
    block = loaded(group_size, weights, rank, 2).block
    merged = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for layer, parts in merged.items():
        for leaf, parameter in getattr(block, layer).w4a8.named_parameters():
            if leaf == "bias":
                continue
            slices = [leaves_of(weights, part)[leaf].chunk(2)[rank] for part in parts]
            assert torch.equal(parameter, torch.cat(slices)), f"{layer} {leaf}"
    for leaf, whole in leaves_of(weights, "down_proj").items():
        # Per output channel: every rank has it whole.
        expected = whole if whole.ndim == 1 else whole.chunk(2, dim=1)[rank]
        assert torch.equal(getattr(block.down_proj.w4a8, leaf), expected), leaf


@GROUPS
@pytest.mark.parametrize("lost", ["k_proj.qweight", "up_proj.channel_scale", "down_proj.qweight"])
def test_a_lost_tensor_is_named(lost, group_size):
    weights = stored(group_size)
    del weights[f"w4a8.block.{lost}"]
    model = loaded(group_size, weights)
    with pytest.raises(FormatError, match=rf"w4a8\.block\.{lost} \(1 tensors"):
        finish(model)


@GROUPS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_what_the_reference_says(group_size, dtype, bias):
    weights = stored(group_size, bias)
    block = finish(loaded(group_size, weights, dtype=dtype, bias=bias)).block
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = block.down_proj.w4a8.apply(x, add_bias=True)
    assert y.dtype == dtype
    assert_rounded(y, expected_output(weights, "down_proj", x), group_size)
    x = x[:, :HIDDEN]
    fused = [expected_output(weights, part, x) for part in ("q_proj", "k_proj", "v_proj")]
    assert_rounded(block.qkv_proj.w4a8.apply(x, add_bias=True), torch.cat(fused, 1), group_size)


@GROUPS
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 4), (2, 0)])
def test_tokens_may_have_any_leading_shape(group_size, shape):
    block = finish(loaded(group_size, stored(group_size))).block
    x = torch.randn(*shape, 512).bfloat16()
    y = block.down_proj.w4a8.apply(x, add_bias=False)
    assert y.shape == (*shape, HIDDEN)
    flat = block.down_proj.w4a8.apply(x.reshape(-1, 512), add_bias=False)
    assert torch.equal(y.reshape(-1, HIDDEN), flat)


@GROUPS
def test_the_partial_sums_of_two_ranks_add_up(group_size):
    """Each rank quantizes its own half of a token; only rank 0 adds the bias."""
    weights = stored(group_size, bias=True)
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(2)).bfloat16()
    total, expected = 0.0, 0.0
    for rank, half in enumerate(x.chunk(2, dim=1)):
        block = finish(loaded(group_size, weights, rank, 2, bias=True)).block
        total = total + block.down_proj.w4a8.apply(half, add_bias=rank == 0).double()
        codes, scale, _ = reference.quantize_per_token(half)
        whole = reference.dequantize(leaves_of(weights, "down_proj")).double()
        columns = whole.chunk(2, dim=1)[rank]
        expected = expected + (codes.double() * scale.double()[:, None]) @ columns.t()
    expected = expected + leaves_of(weights, "down_proj")["bias"].bfloat16().double()
    rounding = torch.finfo(torch.bfloat16).eps * expected.abs().max()
    assert (total - expected).abs().max() < rounding


@GROUPS
def test_an_odd_size_is_refused_with_sizes_and_remedy(group_size):
    with (
        tensor_parallel(0, 1, vllm_config()),
        pytest.raises(FormatError, match=r"block\.column.*201 inputs are odd.*`ignore`"),
    ):
        ColumnParallelLinear(201, 256, prefix="block.column", quant_config=config_of(group_size))
    with (
        tensor_parallel(0, 2, vllm_config()),
        pytest.raises(
            FormatError,
            match=r"block\.row, set 'w4a8': 13 inputs are odd.*13 of 26 inputs"
            r".*--tensor-parallel-size",
        ),
    ):
        RowParallelLinear(26, 256, prefix="block.row", quant_config=config_of(group_size))


@pytest.mark.parametrize(
    ("group_size", "tensor", "value", "message"),
    [
        (GROUP, "k_proj.channel_scale", 0.0, "not finite and positive"),
        (GROUP, "v_proj.channel_scale", float("nan"), "not finite and positive"),
        (PER_CHANNEL, "up_proj.channel_scale", -1.0, "not finite and positive"),
        (PER_CHANNEL, "gate_proj.channel_zero", float("inf"), "NaN or infinity"),
        (GROUP, "down_proj.group_scale", 17, r"from \d+ to 17"),
        (GROUP, "up_proj.group_offset", 127, "leaves the range of int8"),
    ],
)
def test_a_damaged_tensor_is_refused_by_name(group_size, tensor, value, message):
    weights = stored(group_size)
    weights[f"w4a8.block.{tensor}"].view(-1)[5] = value
    model = loaded(group_size, weights)
    with pytest.raises(FormatError, match=rf"set 'w4a8': block\.{tensor}: .*{message}.*verify"):
        finish(model)


def test_a_build_without_kernels_says_how_to_build_them(monkeypatch):
    monkeypatch.setattr(ops, "has_kernels", lambda device_type: False)
    with pytest.raises(
        RuntimeError, match=r"block\.qkv_proj: qoq_linear .*CUDA kernels"
    ) as refused:
        finish(loaded(GROUP, stored(GROUP)))
    assert BUILD in str(refused.value) and "force_set" in str(refused.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(RuntimeError, match=r"Hopper.*Some GPU has .* 7\.5") as refused:
        finish(loaded(GROUP, stored(GROUP)))
    assert BUILD not in str(refused.value), "a build would not help"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(RuntimeError, match="VLLM_QOQ_CUDA=1 pip install"):
        finish(loaded(GROUP, stored(GROUP)))


@GROUPS
def test_dummy_weights_are_usable(group_size):
    config = vllm_config()
    config.load_config.load_format = "dummy"
    with tensor_parallel(0, 1, config):
        model = Block(config_of(group_size))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(-1e-3)
        else:
            parameter.data.random_()
    model.block.down_proj.w4a8.qweight.data.zero_()  # as fresh memory often is
    as_loaded = weakref.ref(model.block.down_proj.w4a8.qweight)
    layer = finish(model).block.down_proj.w4a8
    assert len(layer.weight.unique()) > 10, "weights that are alike take less power"
    assert layer.apply(torch.ones(1, 512).bfloat16(), add_bias=False).isfinite().all()
    gc.collect()
    assert as_loaded() is None, "the stored weight stays in memory beside the one in use"


def test_ignored_layers_keep_their_weight_and_half_ignored_ones_are_refused():
    sets = {"w8a8": scheme(8), "w4a8": set_config(GROUP, ignore=["lm_head", "*.down_proj"])}
    weights = {n: t for n, t in stored(GROUP).items() if "down_proj" not in n}
    weights["w4a8.block.down_proj.weight"] = torch.randn(HIDDEN, 512).bfloat16()
    for seed, (layer, shape) in enumerate(SHAPES.items()):
        leaves = tensors(8, *shape, seed)
        weights |= {f"w8a8.block.{layer}.{leaf}": tensor for leaf, tensor in leaves.items()}
    with tensor_parallel(1, 2, vllm_config()):
        routing = {"prefill": "w8a8", "decode": "w4a8"}
        model = Block(qoq_config(sets=sets, routing=routing))
        AutoWeightsLoader(model).load_weights(weights.items(), mapper=FUSED)
    expected = weights["w4a8.block.down_proj.weight"][:, 256:]
    assert torch.equal(model.block.down_proj.w4a8.weight, expected)

    with (
        tensor_parallel(0, 1, vllm_config()),
        pytest.raises(FormatError, match=r"block\.k_proj but not all of block\.q_proj"),
    ):
        Block(config_of(GROUP, ignore=["*.k_proj"]))


def test_the_ignore_list_follows_the_names_of_the_model():
    config = QoQLinearConfig.from_config(set_config(GROUP, ignore=["model.layers.0.*", "lm_head"]))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.qoq_set.ignore == ("language_model.model.layers.0.*", "lm_head")


def test_an_unknown_key_is_refused():
    with pytest.raises(FormatError, match=r"qoq_linear.*zero_point"):
        QoQLinearConfig.from_config(set_config(GROUP, zero_point=True))


@pytest.fixture
def command(monkeypatch):
    """`command("verify", DIR)` runs a command of merge_tools in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["merge_tools", *map(str, arguments)])
        return merge_tools_main()

    return run


def test_verify_and_inspect_know_the_set(
    w4a8_dir, w4a8_per_channel_dir, two_sets_dir, capsys, command
):
    for folder in (w4a8_dir, w4a8_per_channel_dir, two_sets_dir):
        assert command("verify", folder) == 0
    capsys.readouterr()
    assert command("inspect", two_sets_dir, "--json") == 0
    entry = json.loads(capsys.readouterr().out)["sets"]["w4a8"]
    assert entry["method"] == "qoq_linear" and entry["layers"] == 14
    assert 4.1 < entry["bits_per_weight"] < 4.5


LAYER = "w4a8.model.layers.1.mlp.up_proj"
FLAT = "w4a8.model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("is_grouped", "name", "change", "message"),
    [
        (True, f"{LAYER}.channel_scale", lambda t: t.fill_(-1), "not positive"),
        (True, f"{LAYER}.channel_scale", lambda t: t.bfloat16(), r"BF16 \[768\], expected F32"),
        (True, f"{LAYER}.group_scale", lambda t: t.fill_(17), "from 17 to 17"),
        (True, f"{LAYER}.group_offset", lambda t: t.fill_(127), "range of int8"),
        (True, f"{LAYER}.group_offset", lambda t: t[:, :1].clone(), r"expected I8 \[768, 2\]"),
        (True, f"{LAYER}.group_offset", lambda t: None, "missing"),
        (True, f"{LAYER}.qweight", lambda t: None, "missing"),
        (True, f"{LAYER}.qweight", lambda t: t[:, :100].clone(), r"says \[768, 256\]|\[768, 200\]"),
        (True, f"{LAYER}.channel_zero", lambda t: torch.zeros(768), "does not have"),
        (False, f"{FLAT}.channel_zero", lambda t: t.fill_(float("nan")), "NaN"),
        (False, f"{FLAT}.channel_scale", lambda t: t.zero_(), "not positive"),
    ],
)
def test_verify_names_a_damaged_tensor(
    w4a8_dir, w4a8_per_channel_dir, tmp_path, capsys, command, is_grouped, name, change, message
):
    source = w4a8_dir if is_grouped else w4a8_per_channel_dir
    stored = load_file(source / "model.safetensors")
    changed = change(stored.pop(name, None))
    if changed is not None:
        stored[name] = changed
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    assert command("verify", tmp_path) == 1
    printed = capsys.readouterr()
    lines = (printed.out + printed.err).splitlines()
    layer = name.removeprefix("w4a8.").rpartition(".")[0]
    assert any(layer in line and re.search(message, line) for line in lines), lines


def test_perplexity_is_that_of_the_dequantized_weights(
    tiny_model, w4a8_dir, heldout_text, tmp_path
):
    """What is left is int8 activations. Rounding to the nearest code costs this model 8 %."""
    text = heldout_text.read_text()[:20_000]
    dequantized = write_dequantized(tiny_model, tmp_path / "dequantized")
    base, rounded, w4a8, compiled = (
        text_perplexity(engine(folder, **options), text, 256)["perplexity"]
        for folder, options in (
            (tiny_model, {}),
            (dequantized, {}),
            (w4a8_dir, {}),
            (w4a8_dir, {"enforce_eager": False}),
        )
    )
    assert w4a8 == pytest.approx(rounded, rel=0.005)
    assert compiled == pytest.approx(w4a8, rel=0.002)
    assert base < w4a8 < base * 1.09


def test_prompts_and_generation_use_their_sets(two_sets_dir, w8a8_dir):
    llm = engine(two_sets_dir)
    before = vllm_qoq.step_counts(llm)
    few = generate(llm, PROMPTS[:3], max_tokens=6)
    generate(llm, tuple(f"{p} # {i}" for p in PROMPTS for i in (1, 2)), max_tokens=3)
    counts = {key: n - before[key] for key, n in vllm_qoq.step_counts(llm).items() if n}
    assert counts == {
        ("prefill", "w8a8"): 2,
        ("decode", "w4a8"): 5,
        ("decode", "w8a8"): 2,
    }
    w8a8 = generate(engine(w8a8_dir), PROMPTS[:3], max_tokens=6)
    assert [tokens[0] for tokens, _ in few] == [tokens[0] for tokens, _ in w8a8]
    assert few != w8a8

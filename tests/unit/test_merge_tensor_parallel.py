"""Over how many GPUs a checkpoint can be split, worked out from its headers."""

import json

import pytest

from merge_tools.__main__ import main
from vllm_qoq.checkpoint.layout import Layout
from vllm_qoq.checkpoint.tensor_parallel import obstacles

LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8}


def dense(n, k, block=(1, 0)):
    return Layout("dense", n, k, 8, (block[0], block[1] or k))


def packed(n, k, group=128, method="packed"):
    return Layout(method, n, k, 4, (1, group))


def layers(make, intermediate=14336, hidden=4096, key_value=1024):
    """The linear layers of one decoder layer, each as make(out_features, in_features)."""
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    return {f"model.layers.0.{name}": make(*size) for name, size in sizes.items()}


def sizes(config, **sets):
    return [size for size, reason in obstacles(config, sets).items() if reason is None]


def test_llama_8b_can_be_split_over_16_gpus_in_both_sets():
    assert sizes(LLAMA, w8a8=layers(dense), w4a16=layers(packed)) == [1, 2, 4, 8, 16]


def test_a_group_must_not_be_cut():
    """9856 / 2 = 4928 = 38.5 groups of 128."""
    short = layers(packed, intermediate=9856)
    assert sizes(LLAMA, w8a8=layers(dense, intermediate=9856)) == [1, 2, 4, 8, 16]
    assert sizes(LLAMA, w4a16=short) == [1]
    assert sizes(LLAMA, w4a16=layers(lambda n, k: packed(n, k, 64), intermediate=9856)) == [1, 2]
    reason = obstacles(LLAMA, {"w8a8": layers(dense, intermediate=9856), "w4a16": short})[2]
    assert reason == (
        "w4a16.model.layers.0.mlp.down_proj: 9856 inputs split by 2 are 4928, not a multiple of 128"
    )


@pytest.mark.parametrize("method", ["qoq", "residual"])
def test_ranks_may_share_a_group_of_ours_but_not_a_byte(method):
    qoq = {"w4a8": layers(lambda n, k: packed(n, k, method=method), intermediate=9856)}
    assert sizes(LLAMA, **qoq) == [1, 2, 4, 8, 16]
    odd = {"w4a8": layers(lambda n, k: packed(n, k, method=method), intermediate=9872)}
    assert sizes(LLAMA, **odd) == [1, 2, 4, 8]  # 617 inputs each for 16


def test_a_scale_for_all_inputs_may_be_cut():
    whole = layers(lambda n, k: packed(n, k, k), intermediate=9856)
    assert sizes(LLAMA, w4a16=whole) == [1, 2, 4, 8, 16]


def test_heads_are_not_cut_and_few_kv_heads_are_copied():
    plain = layers(dense, hidden=384, key_value=64)
    assert sizes({"num_attention_heads": 12}, a=plain) == [1, 2, 4]
    for kv_heads, expected in [(1, [1, 2, 4, 8, 16]), (2, [1, 2, 4, 8, 16]), (3, [1])]:
        config = {"num_attention_heads": 16, "num_key_value_heads": kv_heads}
        assert sizes(config, a=plain) == expected
    # The one K head is copied, so its blocks of 8 rows stay whole.
    config = {"num_attention_heads": 16, "num_key_value_heads": 1}
    blocks = {"model.layers.0.self_attn.k_proj": dense(16, 256, (8, 16))}
    assert sizes(config, fp8=blocks) == [1, 2, 4, 8, 16]


def test_blocks_of_fp8_are_not_cut_in_either_direction():
    blocks = layers(lambda n, k: dense(n, k, (128, 128)), intermediate=1280)
    assert sizes(LLAMA, fp8=blocks) == [1, 2]
    assert "gate_proj: 1280 outputs split by 4 are 320" in (obstacles(LLAMA, {"fp8": blocks})[4])


@pytest.mark.parametrize(("method", "expected"), [("packed", [1, 2, 4]), ("awq", [1, 2])])
def test_words_of_packed_codes_are_not_cut(method, expected):
    """AWQ packs eight outputs into a word, compressed-tensors eight inputs."""
    config = {"num_attention_heads": 4}
    one = {"model.layers.0.mlp.up_proj": packed(16, 256, method=method)}
    assert sizes(config, a=one) == expected


@pytest.mark.parametrize("config", [{}, {"num_attention_heads": "x"}, {"num_attention_heads": 0}])
def test_without_heads_one_gpu_is_all_that_is_sure(config):
    assert sizes(config, a=layers(dense)) == [1]


def test_an_unknown_layer_is_named():
    assert (
        "a.model.mixer: not known" in (obstacles(LLAMA, {"a": {"model.mixer": dense(64, 64)}})[2])
    )


def test_inspect_shows_the_sizes(monkeypatch, merged_dir, capsys):
    monkeypatch.setattr("sys.argv", ["merge_tools", "inspect", str(merged_dir), "--json"])
    assert main() == 0
    report = json.loads(capsys.readouterr().out)["tensor_parallel"]
    monkeypatch.setattr("sys.argv", ["merge_tools", "inspect", str(merged_dir)])
    assert main() == 0
    text = capsys.readouterr().out
    assert f"--tensor-parallel-size: {', '.join(map(str, report['sizes']))}\n" in text
    refused = min(report["refused"], key=int)
    assert f"not {refused}: {report['refused'][refused]}" in text


@pytest.mark.parametrize("heads", [float("inf"), float("nan"), "x", None, [], -4])
def test_heads_that_are_no_count_leave_one_gpu(heads):
    found = obstacles(LLAMA | {"num_attention_heads": heads}, {})
    assert [size for size, reason in found.items() if reason is None] == [1]


@pytest.mark.parametrize(
    ("layer", "rows", "expected"),
    [
        ("self_attn.qkv_proj", 4096 + 2 * 1024, [1, 2, 4, 8, 16]),
        ("mlp.gate_up_proj", 2 * 14336, [1, 2, 4, 8, 16]),
        ("mlp.gate_up_proj", 2 * 14344, [1, 2, 4, 8]),
    ],
)
def test_layers_that_are_fused_on_disk_are_cut_apart(layer, rows, expected):
    assert sizes(LLAMA, w8a8={f"model.layers.0.{layer}": dense(rows, 4096)}) == expected


def experts(method, intermediate, hidden=2048):
    sizes = {"gate_proj": (intermediate, hidden), "down_proj": (hidden, intermediate)}
    names = {f"model.layers.0.mlp.experts.7.{name}": size for name, size in sizes.items()}
    return {name: packed(*size, method=method) for name, size in names.items()}


@pytest.mark.parametrize("method", ["qoq", "residual"])
@pytest.mark.parametrize(
    ("intermediate", "expected"), [(768, [1, 2]), (1024, [1, 2, 4, 8]), (192, [])]
)
def test_a_rank_has_128_channels_of_a_qoq_expert_or_a_multiple(method, intermediate, expected):
    assert sizes(LLAMA, w4a8=experts(method, intermediate)) == expected


def test_a_qoq_expert_that_cannot_be_cut_says_what_can_be_done():
    reason = obstacles(LLAMA, {"w4a8": experts("qoq", 768)})[4]
    assert "768 outputs split by 4 are 192, not a multiple of 128; --enable-expert-par" in reason
    reason = obstacles(LLAMA, {"w4a8": experts("qoq", 768, hidden=2000)})[1]
    assert "2000 inputs of a QoQ expert are not a multiple of 128" in reason


def test_a_block_must_not_reach_from_q_into_k():
    blocks = dense(4096 + 2 * 1024, 4096, block=(512, 0))
    reason = obstacles(LLAMA, {"fp8": {"model.layers.0.self_attn.qkv_proj": blocks}})
    assert [size for size, why in reason.items() if why is None] == [1, 2]
    assert "outputs of k and of v split by 4 are 256, not a multiple of 512" in reason[4]

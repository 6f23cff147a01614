"""The kernels of a mixture of experts against exact integers, for any distribution of tokens."""

import math

import pytest
import torch
import w4a8_experts as layers

from vllm_qoq import ops
from vllm_qoq.ops import expert_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ops.has_kernels("cuda"), reason="this build has no CUDA kernels (VLLM_QOQ_CUDA=1)"
    ),
]
DEVICE = torch.device("cuda")


def poison(*shape, dtype=torch.bfloat16):
    """Leaves NaN in the memory that the allocator hands out next."""
    torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


def given(tokens, each, experts, hidden, inner, weights, kind="random", dtype=torch.bfloat16):
    gate_up = layers.Experts(experts, 2 * inner, hidden, weights, DEVICE)
    down = layers.Experts(experts, hidden, inner, weights, DEVICE)
    x = torch.randn(tokens, hidden, device=DEVICE).to(dtype)
    ids = layers.some_ids(kind, tokens, each, experts, DEVICE)
    return x, ids, gate_up, down, torch.rand(tokens, each, device=DEVICE)


@pytest.mark.parametrize("weights", layers.WEIGHTS)
@pytest.mark.parametrize("kind", ["random", "one", "few"])
@pytest.mark.parametrize("tokens", [1, 3, 16, 65, 300, 1000])
def test_every_distribution_of_tokens_is_exact(tokens, kind, weights):
    arguments = given(tokens, 4, 32, 512, 384, weights, kind)
    poison(tokens * 4 * 32, 768)
    layers.assert_exact(layers.run(*arguments), *arguments)
    assert not arguments[2].workspace.any()


@pytest.mark.parametrize("weights", layers.WEIGHTS)
@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 2048])
def test_the_shape_of_qwen3_30b_a3b_is_exact(tokens, weights):
    arguments = given(tokens, 8, 128, 2048, 768, weights)
    layers.assert_exact(layers.run(*arguments), *arguments)
    assert not arguments[2].workspace.any()


@pytest.mark.parametrize("weights", layers.WEIGHTS)
@pytest.mark.parametrize("tokens", [1, 65, 1000])
def test_float16_is_exact(tokens, weights):
    arguments = given(tokens, 4, 32, 512, 384, weights, dtype=torch.float16)
    found = layers.run(*arguments)
    assert found["out"].dtype == found["gate_up"].dtype == torch.float16
    layers.assert_exact(found, *arguments)
    assert not arguments[2].workspace.any()


@pytest.mark.parametrize("weights", layers.WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_bias", [torch.bfloat16, torch.float16, torch.float32])
def test_each_expert_adds_its_bias_before_the_one_rounding(of_bias, dtype, weights):
    x, ids, layer, *_ = given(100, 4, 16, 512, 256, weights, dtype=dtype)
    tile = expert_ops.tile_for(ids.numel(), 16)
    rows, tile_expert, tiles = torch.ops.qoq.route_to_experts(ids, None, 16, tile)
    quantized = torch.ops.qoq.quantize_for_experts(x, rows, tile, tile_expert)
    bias = torch.randn(16 * layer.n, device=DEVICE).to(of_bias)
    found = layer(*quantized, tiles, tile_expert, bias=bias, dtype=dtype)
    at = rows[rows >= 0].long()
    owner = tile_expert.long()[at // tile]
    for expert in owner.unique().tolist():
        mine = at[owner == expert]
        parts = [part[mine] for part in quantized]
        assert torch.equal(found[mine], layer.expected(expert, *parts, bias=bias, dtype=dtype))
    assert not layer.workspace.any()


def test_experts_of_other_ranks_add_nothing():
    x, ids, gate_up, down, topk_weights = given(200, 4, 16, 256, 128, "g128")
    expert_map = torch.full((64,), -1, dtype=torch.int32)
    expert_map[torch.randperm(64)[:16]] = torch.arange(16, dtype=torch.int32)
    ids = layers.some_ids("random", 200, 4, 64, DEVICE)
    arguments = (x, ids, gate_up, down, topk_weights, expert_map.to(DEVICE))
    layers.assert_exact(layers.run(*arguments), *arguments)
    nobody = (*arguments[:-1], torch.full_like(expert_map, -1).to(DEVICE))
    assert not layers.run(*nobody)["out"].any()


def test_a_graph_follows_the_router_and_the_flag():
    x, ids, gate_up, down, topk_weights = given(48, 4, 32, 512, 256, "nested")
    for layer in (gate_up, down):
        layer.use_residual = torch.ones(1, dtype=torch.int32, device=DEVICE)
    arguments = (x, ids, gate_up, down, topk_weights)
    layers.run(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layers.run(*arguments)
    for kind, flag in (("one", 1), ("random", 0), ("few", 1)):
        ids.copy_(layers.some_ids(kind, 48, 4, 32, DEVICE))
        x.copy_(torch.randn_like(x))
        for layer in (gate_up, down):
            layer.use_residual.fill_(flag)
        graph.replay()
        layers.assert_exact(found, *arguments)


def test_two_runs_are_the_same_to_the_bit():
    arguments = given(500, 8, 64, 512, 384, "g128")
    first = layers.run(*arguments)["out"]
    for _ in range(5):
        poison(4096, 768)
        assert torch.equal(layers.run(*arguments)["out"], first)

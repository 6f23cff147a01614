"""The portable path of the W4A8 GEMM, forced on this GPU, gives the exact integers, too."""

import math

import pytest
import torch
from gpu_layers import DEVICE, WEIGHTS, Layer, poison, tokens
from portable import SIZES, Size, w4a8_gemm_portable

from vllm_qoq import ops
from vllm_qoq.bench.cases import SHAPES, TOKENS
from vllm_qoq.ops import linear_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ops.has_kernels("cuda"), reason="this build has no CUDA kernels (VLLM_QOQ_CUDA=1)"
    ),
]

LLAMA_8B = next(iter(SHAPES.values()))


def assert_same(layer, batch, size, **options):
    """The portable path gives what exact integers give, and leaves the workspace zero."""
    poison(batch[0].shape[0], layer.n, options.get("dtype", torch.bfloat16))
    got = w4a8_gemm_portable(*layer.arguments(*batch, **options), size=SIZES[size])
    assert torch.equal(got, layer.expected(*batch, **options))
    assert not linear_ops.workspace(DEVICE).any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("n, k", LLAMA_8B)
def test_every_number_of_tokens_is_exact_on_gpus_of_any_size(n, k, weights, size):
    layer = Layer(n, k, weights)
    for m in TOKENS:
        assert_same(layer, tokens(m, k), size)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("n, k", [(8, 128), (72, 256), (136, 384), (1000, 2048)])
def test_channels_need_only_be_a_multiple_of_eight(n, k, weights):
    layer = Layer(n, k, weights)
    for m in (1, 8, 9, 33, 65, 130, 600):
        for size in SIZES:
            assert_same(layer, tokens(m, k), size)


@pytest.mark.parametrize("fill", [-127, 127])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("codes", ["min", "max"])
def test_extreme_values_are_exact(codes, weights, fill):
    layer = Layer(512, 14336, weights, codes)
    for m in (1, 40, 100, 600):
        assert_same(layer, tokens(m, 14336, fill), "all")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [torch.bfloat16, torch.float16, torch.float32])
def test_bias_is_added_before_the_one_rounding(dtype, bias):
    for weights in WEIGHTS:
        layer = Layer(1280, 2048, weights)
        values = torch.randn(1280, device=DEVICE).to(bias)
        for m in (5, 90, 700):
            assert_same(layer, tokens(m, 2048), "A100", bias=values, dtype=dtype)


def test_a_gpu_without_room_for_a_ring_is_refused():
    layer = Layer(64, 128, "g128")
    arguments = layer.arguments(*tokens(4, 128))
    with pytest.raises(RuntimeError, match="of shared memory, and a block on this GPU"):
        w4a8_gemm_portable(*arguments, size=Size(8 << 10, 20))


@pytest.mark.parametrize("size", ["20 SMs", "all"])
@pytest.mark.parametrize("m", [1, 16, 64, 257, 1024])
def test_a_graph_behind_a_quantization_serves_both_precisions_and_new_inputs(m, size):
    """The kernel ahead of each GEMM may still run when it begins."""
    layer = Layer(6144, 4096, "nested g128")
    layer.use_residual = torch.ones(1, dtype=torch.int32, device=DEVICE)
    floats = torch.randn(m, 4096, device=DEVICE, dtype=torch.bfloat16)
    w4a8_gemm_portable(*layer.arguments(*torch.ops.qoq.quantize_per_token(floats)))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantized = torch.ops.qoq.quantize_per_token(floats)
        arguments = layer.arguments(*quantized)
        outputs = [w4a8_gemm_portable(*arguments, size=SIZES[size]) for _ in range(10)]
    both = layer.int8
    for flag in (1, 0, 1, 0):
        floats.normal_()
        layer.use_residual.fill_(flag)
        for y in outputs:
            y.fill_(math.nan)
        graph.replay()
        layer.int8 = both if flag else layer.base_int8
        expected = layer.expected(*quantized)
        for y in outputs:
            assert torch.equal(y, expected)

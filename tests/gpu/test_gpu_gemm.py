"""The CUDA kernels against exact integers: every linear shape of four models, and the edges."""

import math

import pytest
import torch
from gpu_layers import DEVICE, WEIGHTS, Layer, assert_exact, poison, tokens

from vllm_qoq import ops
from vllm_qoq.bench.cases import SHAPES, TOKENS
from vllm_qoq.numerics import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ops.has_kernels("cuda"), reason="this build has no CUDA kernels (VLLM_QOQ_CUDA=1)"
    ),
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("n, k", [shape for model in SHAPES.values() for shape in model])
def test_every_number_of_tokens_is_exact(n, k, weights):
    layer = Layer(n, k, weights)
    for m in TOKENS:
        assert_exact(layer, tokens(m, k))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("n, k", [(8, 128), (72, 256), (136, 384), (1000, 2048)])
def test_channels_need_only_be_a_multiple_of_eight(n, k, weights):
    layer = Layer(n, k, weights)
    for m in (1, 8, 9, 33, 65, 130, 600):
        assert_exact(layer, tokens(m, k))


@pytest.mark.parametrize("fill", [-127, 127])
@pytest.mark.parametrize(
    "codes, weights",
    [(codes, weights) for weights in WEIGHTS for codes in ("min", "max")]
    + [("unused", weights) for weights in WEIGHTS[1:]],
)
def test_extreme_values_are_exact(codes, weights, fill):
    layer = Layer(512, 14336, weights, codes)
    for m in (1, 40, 100, 600):
        assert_exact(layer, tokens(m, 14336, fill))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [torch.bfloat16, torch.float16, torch.float32])
def test_bias_is_added_before_the_one_rounding(dtype, bias):
    for weights in WEIGHTS:
        layer = Layer(1280, 2048, weights)
        values = torch.randn(1280, device=DEVICE).to(bias)
        for m in (5, 90, 700):
            assert_exact(layer, tokens(m, 2048), bias=values, dtype=dtype)


def test_cupy_agrees_with_the_oracle():
    cupy = pytest.importorskip("cupy")
    layer = Layer(1280, 2048, "g128")
    x, x_scale, row_sum = tokens(33, 2048)
    exact = cupy.asarray(x).astype(cupy.int32) @ cupy.asarray(layer.int8).astype(cupy.int32).T
    expected = reference.epilogue(
        *(torch.from_dlpack(exact), x_scale, layer.channel_scale, row_sum, None, None),
        torch.bfloat16,
    )
    assert torch.equal(layer(x, x_scale, row_sum), expected)


@pytest.mark.parametrize("weights", ["nested g128", "nested g64", "nested g32"])
@pytest.mark.parametrize("m", [1, 16, 64, 128, 200, 512])
def test_one_graph_serves_both_precisions_of_a_nested_weight(m, weights):
    layer = Layer(4096, 512, weights)
    batch = tokens(m, layer.k)
    both = layer.expected(*batch)
    layer.int8 = layer.base_int8
    base = layer.expected(*batch)
    assert not torch.equal(both, base)

    # The second of two flags in one tensor, as an engine keeps them: 4 bytes are aligned enough.
    layer.use_residual = torch.ones(2, dtype=torch.int32, device=DEVICE)[1:]
    layer(*batch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(*batch)
    for flag in (1, 0, 0, 7, 0):
        layer.use_residual.fill_(flag)
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, both if flag else base)


def test_a_flag_needs_a_residual_and_one_int32():
    layer, batch = Layer(64, 128, "nested g128"), tokens(4, 128)
    for flag in (torch.ones(1, device=DEVICE), torch.ones(2, dtype=torch.int32, device=DEVICE)):
        layer.use_residual = flag
        with pytest.raises(RuntimeError, match="use_residual"):
            layer(*batch)
    layer.residual = None
    with pytest.raises(RuntimeError, match="use_residual is given, but no residual"):
        layer(*batch)


@pytest.mark.parametrize("weights", ["g128", "g64", "g32", "nested g128", "nested g32"])
@pytest.mark.parametrize("m", [1, 16, 64, 257, 1024])
def test_another_stream_and_graph_replay_with_changed_inputs(m, weights):
    layer = Layer(6144, 4096, weights)
    x = tokens(m, 4096)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = layer(*x)
    stream.synchronize()
    assert torch.equal(y, layer.expected(*x))

    floats = torch.randn(m, 4096, device=DEVICE, dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantized = torch.ops.qoq.quantize_per_token(floats)
        outputs = [layer(*quantized) for _ in range(10)]
    for _ in range(3):
        floats.normal_()
        for y in outputs:
            y.fill_(math.nan)
        graph.replay()
        expected = layer.expected(*[t.to(DEVICE) for t in quantized_on_cpu(floats)])
        for y in outputs:
            assert torch.equal(y, expected)


def quantized_on_cpu(x):
    """torch divides by a scalar on the GPU as a product with its inverse, on the CPU exactly."""
    return reference.quantize_per_token(x.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("m, k", [(0, 128), (1, 4096), (33, 14336), (7, 100), (1024, 4096)])
def test_quantize_per_token_equals_the_reference(m, k, dtype):
    x = torch.randn(m, k, device=DEVICE).to(dtype) * 3
    if m > 2:
        x[1] = 0
        x[2, 0] = 1000
    for got, expected in zip(ops_quantize(x), quantized_on_cpu(x), strict=True):
        assert torch.equal(got.cpu(), expected)


def test_quantize_per_token_reads_a_slice_of_columns():
    x = torch.randn(64, 3 * 4096, device=DEVICE, dtype=torch.bfloat16)[:, 4096:8192]
    for got, expected in zip(ops_quantize(x), quantized_on_cpu(x), strict=True):
        assert torch.equal(got.cpu(), expected)


def ops_quantize(x):
    return torch.ops.qoq.quantize_per_token(x)


def assert_codes_within_one(got, expected):
    """The order of a sum, or an exponential, may move a value across a tie."""
    codes, scale, row_sum = (t.cpu() for t in got[:3])
    difference = (codes.int() - expected[0].int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.02
    assert torch.equal(row_sum, codes.sum(1, dtype=torch.int32))
    torch.testing.assert_close(scale, expected[1], rtol=2**-7, atol=0)


# The last three: rows longer than a block holds in registers, and such that no vector fits.
ROWS = [(1, 4096), (64, 5120), (600, 8192), (3, 20480), (513, 20480), (9, 1026)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, k", ROWS)
def test_a_norm_with_quantization_is_the_reference(m, k, dtype):
    x, residual = (torch.randn(m, k, device=DEVICE).to(dtype) for _ in "ab")
    weight = torch.randn(k, device=DEVICE).to(dtype)
    poison(m, k, dtype)
    got = torch.ops.qoq.add_rms_norm_quantize(x, residual, weight, 1e-5)
    expected = reference.add_rms_norm_quantize(*(t.cpu() for t in (x, residual, weight)), 1e-5)
    assert torch.equal(got[3].cpu(), expected[3])
    assert_codes_within_one(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, k", ROWS)
def test_silu_with_quantization_is_the_reference(m, k, dtype):
    x = (torch.randn(m, 2 * k, device=DEVICE) * 4).to(dtype)
    x[0, :8] = torch.tensor([-100.0, 100, 0, -0.0, 30, -30, 1e-4, -200])
    got = torch.ops.qoq.silu_and_mul_quantize(x)
    assert_codes_within_one(got, reference.silu_and_mul_quantize(x.cpu()))


def test_refusals_name_the_value():
    layer = Layer(64, 256, "g128")
    x = tokens(4, 256)
    with pytest.raises(RuntimeError, match=r"x_scale is Float \[3\], expected Float \[4\]"):
        layer(x[0], x[1][:3], x[2])
    with pytest.raises(RuntimeError, match="K=192 must be a multiple of 128"):
        layer(*tokens(4, 192))
    rows = torch.ones(4, 256, device=DEVICE, dtype=torch.bfloat16)
    with pytest.raises(
        RuntimeError, match=r"weight is BFloat16 \[255\], expected BFloat16 \[256\]"
    ):
        torch.ops.qoq.add_rms_norm_quantize(rows, rows, rows[0, :255], 1e-5)
    with pytest.raises(RuntimeError, match=r"gate and up side by side"):
        torch.ops.qoq.silu_and_mul_quantize(rows[:, :255].contiguous())
    with pytest.raises(RuntimeError, match="float16, not"):
        layer(*x, dtype=torch.float32)

"""The compile pass that puts quantization into the kernel before it, on the CPU."""

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from vllm import ir
from vllm.compilation.passes.inductor_pass import CallableInductorPass
from vllm.config import CompilationConfig, CompilationMode
from vllm.platforms import current_platform

from vllm_qoq.serving.methods.fusion import QuantizeFusionPass, install

EPSILON = 1e-5
K = 64


@pytest.fixture(autouse=True)
def norms_as_in_a_compiled_model():
    """An engine on a CPU, which does not compile, switches vLLM's ops for norms off."""
    with ir.enable_torch_wrap(True):
        yield


class Recorded(CustomGraphPass):
    """Runs a pass and remembers the ops of ours that the graph has afterwards."""

    def __init__(self):
        self.fused, self.ops = QuantizeFusionPass(), []

    def __call__(self, graph):
        self.fused(graph)
        targets = (str(node.target) for node in graph.nodes if node.op == "call_function")
        self.ops += [target for target in targets if target.startswith("qoq.")]

    def uuid(self):
        return None  # never cached


def compiled(function, *arguments):
    """What `function` returns after the pass, and the ops that are left.

    As in vLLM, the number of tokens alone is dynamic.
    """
    recorded = Recorded()
    torch._dynamo.reset()
    for tokens in arguments:
        if tokens.ndim == 2:
            torch._dynamo.decorators.mark_unbacked(tokens, 0)
    options = {current_platform.pass_key: recorded}
    return torch.compile(function, options=options)(*arguments), recorded.ops


def add_norm_quantize(x, residual, weight):
    normed, residual = ir.ops.fused_add_rms_norm(x, residual, weight, EPSILON)
    return *torch.ops.qoq.quantize_per_token(normed), residual


def silu_quantize(x):
    half = x.shape[-1] // 2
    return torch.ops.qoq.quantize_per_token(torch.nn.functional.silu(x[..., :half]) * x[..., half:])


def assert_close(got, expected):
    """Codes may differ by one where a value rounds differently before it is quantized."""
    codes, scale, row_sum, *rest = got
    assert (codes.int() - expected[0].int()).abs().max() <= 1
    assert (codes != expected[0]).float().mean() < 0.1
    assert torch.equal(row_sum, codes.sum(1, dtype=torch.int32))
    torch.testing.assert_close(scale, expected[1], rtol=2**-7, atol=0)
    for a, b in zip(rest, expected[3:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_and_its_quantization_become_one_op(dtype, m):
    x, residual = (torch.randn(m, K, dtype=dtype) for _ in "ab")
    weight = torch.randn(K, dtype=dtype)
    got, left = compiled(add_norm_quantize, x, residual, weight)
    assert left == ["qoq.add_rms_norm_quantize.default"]
    fused = torch.ops.qoq.add_rms_norm_quantize(x, residual, weight, EPSILON)
    assert all(torch.equal(a, b) for a, b in zip(got, fused, strict=True))
    assert_close(got, add_norm_quantize(x, residual, weight))


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_and_its_quantization_become_one_op(dtype, m):
    x = torch.randn(m, 2 * K, dtype=dtype) * 4
    got, left = compiled(silu_quantize, x)
    assert left == ["qoq.silu_and_mul_quantize.default"]
    fused = torch.ops.qoq.silu_and_mul_quantize(x)
    assert all(torch.equal(a, b) for a, b in zip(got, fused, strict=True))
    assert_close(got, silu_quantize(x))


def test_a_model_of_two_layers_is_fused_throughout():
    def model(x, residual, weight):
        outputs = []
        for _ in range(2):
            *quantized, residual = add_norm_quantize(x, residual, weight)
            outputs += quantized
            x = (quantized[0] * quantized[1][:, None]).to(x.dtype)
            quantized = silu_quantize(torch.cat([x, x * 2], 1))
            outputs += quantized
            x = (quantized[0] * quantized[1][:, None]).to(x.dtype)
        return *outputs, residual

    arguments = [torch.randn(3, K).bfloat16() for _ in "ab"] + [torch.ones(K).bfloat16()]
    got, left = compiled(model, *arguments)
    assert (
        sorted(left)
        == ["qoq.add_rms_norm_quantize.default"] * 2 + ["qoq.silu_and_mul_quantize.default"] * 2
    )
    # A code that rounds the other way moves its element, and what follows from it, by a step.
    expected = model(*arguments)[-1].float()
    assert (got[-1].float() - expected).norm() < 0.02 * expected.norm()


def norm_read_twice(x, residual, weight):
    normed, residual = ir.ops.fused_add_rms_norm(x, residual, weight, EPSILON)
    return *torch.ops.qoq.quantize_per_token(normed), normed, residual


def norm_without_weight(x, residual, weight):
    normed, residual = ir.ops.fused_add_rms_norm(x, residual, None, EPSILON)
    return *torch.ops.qoq.quantize_per_token(normed), residual


def norm_of_a_part(x, residual, weight):
    normed, residual = ir.ops.fused_add_rms_norm(x, residual, weight, EPSILON, K // 2)
    return *torch.ops.qoq.quantize_per_token(normed), residual


@pytest.mark.parametrize("function", [norm_read_twice, norm_without_weight, norm_of_a_part])
def test_what_the_op_does_not_compute_is_left_alone(function):
    arguments = [torch.randn(3, K).bfloat16() for _ in "ab"] + [torch.randn(K).bfloat16()]
    got, left = compiled(function, *arguments)
    assert left == ["qoq.quantize_per_token.default"]
    assert_close(got, function(*arguments))


def test_a_product_that_an_adapter_reads_as_well_is_left_alone():
    def read_twice(x):
        half = x.shape[-1] // 2
        product = torch.nn.functional.silu(x[..., :half]) * x[..., half:]
        return *torch.ops.qoq.quantize_per_token(product), product

    x = torch.randn(3, 2 * K).bfloat16()
    got, left = compiled(read_twice, x)
    assert left == ["qoq.quantize_per_token.default"]
    torch.testing.assert_close(got[-1], read_twice(x)[-1])


def test_a_weight_of_another_dtype_is_left_alone():
    x, residual = (torch.randn(3, K).bfloat16() for _ in "ab")
    _, left = compiled(add_norm_quantize, x, residual, torch.randn(K))
    assert left == ["qoq.quantize_per_token.default"]


def test_the_pass_of_the_user_runs_after_ours():
    config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE)
    key = current_platform.pass_key
    install(config)
    alone = config.inductor_compile_config.pop(key)
    theirs = config.inductor_compile_config[key] = CallableInductorPass(lambda graph: None)
    install(config)
    install(config)
    ours = config.inductor_compile_config[key]
    assert isinstance(ours, QuantizeFusionPass) and ours.then is theirs
    assert QuantizeFusionPass().uuid() == alone.uuid() != ours.uuid()


def test_without_compilation_nothing_is_installed():
    config = CompilationConfig(mode=CompilationMode.NONE)
    install(config)
    assert current_platform.pass_key not in config.inductor_compile_config

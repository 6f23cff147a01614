"""The compile pass that puts quantization into the kernel before it.

vLLM's graphs hold a norm or a SiLU, then `qoq::quantize_per_token`. One kernel that does both
reads the activations once and can start while the GEMM before it ends, which the kernels that
Inductor makes cannot.
"""

from __future__ import annotations

import operator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch._inductor.pattern_matcher as pm
from torch import fx
from vllm.config import CompilationConfig, CompilationMode
from vllm.platforms import current_platform

from vllm_qoq import ops  # noqa: F401  (defines torch.ops.qoq)
from vllm_qoq.serving.vllm_versions import InductorPass, enable_fake_mode, fused_add_rms_norm

_QUANTIZE = torch.ops.qoq.quantize_per_token.default


class QuantizeFusionPass(InductorPass):
    """Replaces add + RMSNorm + quantize and SiLU + multiply + quantize by one op each.

    It leaves a value alone that anything else reads as well.
    """

    def __init__(self, then: InductorPass | None = None) -> None:
        self.then = then

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite the functional graph of one piece of the model in place."""
        for node in graph.find_nodes(op="call_function", target=_QUANTIZE):
            _fuse_norm(graph, node)
        _silu_patterns().apply(graph)
        graph.lint()
        if self.then is not None:
            self.then(graph)

    def uuid(self) -> str:
        """Make this pass's part of the keys of vLLM's and Inductor's caches."""
        then = self.then.uuid() if self.then is not None else None
        return InductorPass.hash_dict({"source": Path(__file__).read_text(), "then": then})


def install(compilation: CompilationConfig) -> None:
    """Make vLLM run the pass where it compiles, before a pass that the user configured.

    Call before the model is compiled, any number of times.
    """
    if compilation.mode != CompilationMode.VLLM_COMPILE:
        return
    config, key = compilation.inductor_compile_config, current_platform.pass_key
    present = config.get(key)
    if not isinstance(present, QuantizeFusionPass):
        _silu_patterns()  # they are traced here, because no tracing may go on inside a compilation
        config[key] = QuantizeFusionPass(then=present)


def _fuse_norm(graph: fx.Graph, quantize: fx.Node) -> None:
    normed: Any = quantize.args[0]
    if normed.target is not operator.getitem:
        return
    norm, index = normed.args
    if norm.target is not fused_add_rms_norm or index != 0 or len(normed.users) > 1:
        return
    names = (argument.name for argument in fused_add_rms_norm._schema.arguments)
    given = dict(zip(names, norm.args, strict=False)) | norm.kwargs
    x, residual, weight = given["x"], given["x_residual"], given["weight"]
    if weight is None or given.get("variance_size") is not None:
        return
    values = [node.meta["val"] for node in (x, residual, weight)]
    if values[0].ndim != 2 or len({value.dtype for value in values}) > 1:
        return
    with graph.inserting_before(norm):
        fused = graph.call_function(
            torch.ops.qoq.add_rms_norm_quantize.default, (x, residual, weight, given["epsilon"])
        )
        parts = [graph.call_function(operator.getitem, (fused, i)) for i in range(4)]
    fused.meta["val"] = (*quantize.meta["val"], norm.meta["val"][1])
    for part, value in zip(parts, fused.meta["val"], strict=True):
        part.meta["val"] = value
    _replace(graph, quantize, parts[:3])
    graph.erase_node(normed)
    _replace(graph, norm, [normed, parts[3]])


def _replace(graph: fx.Graph, old: fx.Node, parts: list[fx.Node]) -> None:
    """Put `parts` in the place of the outputs of `old`."""
    for output in list(old.users):
        index: Any = output.args[1]
        output.replace_all_uses_with(parts[index])
        graph.erase_node(output)
    graph.erase_node(old)


@cache
def _silu_patterns() -> pm.PatternMatcherPass:
    """Make the patterns of SiLU, whose elementary operations torch's matcher finds in a graph."""

    def pattern(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half = x.shape[-1] // 2
        product = torch.nn.functional.silu(x[..., :half]) * x[..., half:]
        return torch.ops.qoq.quantize_per_token(product)

    def replacement(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.ops.qoq.silu_and_mul_quantize(x)

    patterns = pm.PatternMatcherPass(pass_name="qoq_silu_and_mul_quantize")

    @enable_fake_mode
    def register() -> None:
        for dtype in (torch.bfloat16, torch.float16):
            example = torch.empty(5, 4, dtype=dtype, device=current_platform.device_type)
            pm.register_replacement(pattern, replacement, [example], pm.fwd_only, patterns)

    register()
    return patterns

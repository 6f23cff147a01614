"""A mixture of experts of vLLM's as one rank of several builds and loads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from plugin_units import in_tree_config, qoq_config, tensor_parallel, tensors, vllm_config
from vllm.config import ParallelConfig
from vllm.model_executor.layers.fused_moe import layer as fused_moe
from vllm.model_executor.models.utils import AutoWeightsLoader

EXPERTS, HIDDEN, INNER = 4, 256, 256
PREFIX = "block.experts"
SHAPES = {
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}
_make = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE


class Block(torch.nn.Module):
    """A layer of experts, where a model has it; `changes` are those of vLLM's arguments."""

    def __init__(self, quant_config: Any, tp_size: int, **changes: Any) -> None:
        super().__init__()
        self.quant_config = quant_config
        self.block = torch.nn.Module()
        self.block.experts = _make(
            num_experts=EXPERTS,
            top_k=2,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            params_dtype=torch.bfloat16,
            quant_config=quant_config,
            tp_size=tp_size,
            prefix=PREFIX,
            dp_size=1,
            pcp_size=1,
            **changes,
        )

    @property
    def experts(self) -> torch.nn.Module:
        """The layer that holds the weights."""
        return self.block.experts.routed_experts


@contextmanager
def rank_of(
    rank: int, size: int, is_expert_parallel: bool = False, has_eplb: bool = False
) -> Iterator[None]:
    """Build and load as rank `rank` of `size`, on a CPU that has what vLLM's kernels need."""
    parallel = ParallelConfig(enable_expert_parallel=is_expert_parallel)
    with ExitStack() as stack:
        config = vllm_config(parallel_config=parallel)
        config.parallel_config.enable_eplb = has_eplb  # which vLLM refuses on a CPU
        stack.enter_context(tensor_parallel(rank, size, config))
        module = "vllm.model_executor.layers.fused_moe.config"
        target = f"{module}.get_tensor_model_parallel_rank"
        stack.enter_context(patch(target, lambda: rank))
        stack.enter_context(patch("torch.cpu._is_amx_tile_supported", lambda: True))
        yield


def routed(size: int = 1, **changes: Any) -> Block:
    """A layer with the sets w8a8 and w4a16; `changes` are those of the section."""
    return Block(qoq_config(**changes), size)


def single(bits: int, size: int = 1) -> Block:
    """The layer as vLLM has it in a checkpoint of W8A8 (bits 8) or W4A16 (bits 4)."""
    return Block(in_tree_config(bits), size)


def stored(bits: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of the layer in one set, as a checkpoint names them."""
    weights = {}
    for expert in range(EXPERTS):
        for seed, (projection, (rows, columns)) in enumerate(SHAPES.items()):
            leaves = tensors(bits, rows, columns, seed + 10 * expert + bits)
            name = f"{prefix}{PREFIX}.{expert}.{projection}"
            weights |= {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
    return weights


def load(model: Block, weights: dict[str, torch.Tensor]) -> None:
    """Load as vLLM does, with the renaming that the config asks for."""
    AutoWeightsLoader(model).load_weights(weights.items())

"""Layers that are loaded as vLLM loads a checkpoint, tensor by tensor."""

import torch
from plugin_units import (
    HEAD,
    HEADS,
    HIDDEN,
    KV_HEADS,
    tensors,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

BF16 = {"params_dtype": torch.bfloat16}


FUSED = WeightsMapper(
    orig_to_new_stacked={
        ".q_proj.": (".qkv_proj.", "q"),
        ".k_proj.": (".qkv_proj.", "k"),
        ".v_proj.": (".qkv_proj.", "v"),
        ".gate_proj.": (".gate_up_proj.", 0),
        ".up_proj.": (".gate_up_proj.", 1),
    }
)


class Block(torch.nn.Module):
    """The four linear layers of a decoder layer, and what else a linear can be."""

    def __init__(self, quant_config, bias=False):
        super().__init__()
        self.quant_config = quant_config
        common = {"quant_config": quant_config, "bias": bias, **BF16}
        self.block = torch.nn.Module()
        self.block.qkv_proj = QKVParallelLinear(
            HIDDEN, HEAD, HEADS, KV_HEADS, prefix="block.qkv_proj", **common
        )
        self.block.o_proj = RowParallelLinear(HIDDEN, HIDDEN, prefix="block.o_proj", **common)
        self.block.gate_up_proj = MergedColumnParallelLinear(
            HIDDEN, [512, 512], prefix="block.gate_up_proj", **common
        )
        self.block.down_proj = RowParallelLinear(512, HIDDEN, prefix="block.down_proj", **common)
        self.block.column = ColumnParallelLinear(HIDDEN, 512, prefix="block.column", **common)
        self.block.replicated = ReplicatedLinear(
            HIDDEN, 128, prefix="block.replicated", disable_tp=True, **common
        )


SHAPES = {
    "q_proj": (HEADS * HEAD, HIDDEN),
    "k_proj": (KV_HEADS * HEAD, HIDDEN),
    "v_proj": (KV_HEADS * HEAD, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (512, HIDDEN),
    "up_proj": (512, HIDDEN),
    "down_proj": (HIDDEN, 512),
    "column": (512, HIDDEN),
    "replicated": (128, HIDDEN),
}


def stored(bits, prefix="", bias=False):
    """All tensors of the block in one set, as a checkpoint names them."""
    weights = {}
    for seed, (layer, (rows, columns)) in enumerate(SHAPES.items()):
        leaves = tensors(bits, rows, columns, seed + bits)
        if bias:
            leaves["bias"] = torch.randn(rows).bfloat16()
        weights |= {f"{prefix}block.{layer}.{leaf}": t for leaf, t in leaves.items()}
    return weights


def load(model, weights):
    AutoWeightsLoader(model).load_weights(weights.items(), mapper=FUSED)

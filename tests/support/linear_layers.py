"""Linear layers as vLLM's models have them, to load sets into."""

import torch
from plugin_units import (
    HEAD,
    HEADS,
    HIDDEN,
    KV_HEADS,
)
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.utils import WeightsMapper

SHAPES = {
    "q_proj": (HEADS * HEAD, HIDDEN),
    "k_proj": (KV_HEADS * HEAD, HIDDEN),
    "v_proj": (KV_HEADS * HEAD, HIDDEN),
    "gate_proj": (512, HIDDEN),
    "up_proj": (512, HIDDEN),
    "down_proj": (HIDDEN, 512),
}


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
    """A fused, a merged and a row-parallel layer."""

    def __init__(self, quant_config, dtype=torch.bfloat16, bias=False):
        super().__init__()
        self.quant_config = quant_config
        common = {"quant_config": quant_config, "bias": bias, "params_dtype": dtype}
        self.block = torch.nn.Module()
        self.block.qkv_proj = QKVParallelLinear(
            HIDDEN, HEAD, HEADS, KV_HEADS, prefix="block.qkv_proj", **common
        )
        self.block.gate_up_proj = MergedColumnParallelLinear(
            HIDDEN, [512, 512], prefix="block.gate_up_proj", **common
        )
        self.block.down_proj = RowParallelLinear(512, HIDDEN, prefix="block.down_proj", **common)


def finish(model):
    for layer in model.block.children():
        layer.quant_method.process_weights_after_loading(layer)
    return model

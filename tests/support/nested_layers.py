"""The tensors of nested layers, as a checkpoint stores them."""

import torch
from linear_layers import SHAPES
from qoq_checkpoints import nested


def stored():
    """All tensors of the block, as a checkpoint names them."""
    random = torch.Generator().manual_seed(7)
    tensors = {}
    for layer, shape in SHAPES.items():
        weight = torch.randn(shape, generator=random)
        for name, leaves in zip(("w4a8", "w8a8"), nested(weight), strict=True):
            tensors |= {f"{name}.block.{layer}.{leaf}": t for leaf, t in leaves.items()}
    return tensors

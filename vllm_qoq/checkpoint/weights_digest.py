"""A digest that tells the weights of one quantization of a model from those of another.

It is of the scales, which follow whatever was done to the rows and columns of a weight before it
was rounded: of each the name, dtype, shape and first 4 KiB. So it takes little time however large
the model is, and stays as it is when files are cut anew or the KV cache is calibrated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from vllm_qoq.checkpoint.folder import ITEM_BYTES, TensorInfo
from vllm_qoq.checkpoint.format import split_layer

if TYPE_CHECKING:
    import torch

_SCALES = ("channel_scale", "weight_scale")
_BYTES = 4096


def weights_digest(
    tensors: Iterable[TensorInfo], get: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """Digest the weights of a checkpoint that `quantize` made: SHA-256 as uint8 [32].

    tensors  all tensors of the checkpoint
    get      reads one by its name there
    """
    import torch

    found = {}
    for info in sorted(tensors, key=lambda info: (info.file, info.name)):
        if split_layer(info.name)[1] in _SCALES:
            first = get(info.name).reshape(-1)[: _BYTES // ITEM_BYTES[info.dtype]].contiguous()
            content = f"{info.dtype} {list(info.shape)} ".encode() + bytes(
                first.view(torch.uint8).numpy().data
            )
            found[info.name] = hashlib.sha256(content).hexdigest()
    every = "\n".join(f"{name} {one}" for name, one in sorted(found.items()))
    return torch.frombuffer(bytearray(hashlib.sha256(every.encode()).digest()), dtype=torch.uint8)

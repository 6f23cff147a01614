"""A set of a checkpoint as the model in floating point that it computes."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_qoq.checkpoint.dequantize import dequantize, row_chunks
from vllm_qoq.checkpoint.folder import Checkpoint, TensorInfo
from vllm_qoq.checkpoint.format import INPUT_RATIO, K_MEAN, SECTION, STREAM, split_layer
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.models.names import LM_HEAD
from vllm_qoq.models.tensors import EMBEDDING, HEAD

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class FloatView(Checkpoint):
    """The model of one set: its weights in floating point, dequantized when they are read.

    Everything is named as in the original model, and `config` has no section. What is ours alone,
    means of K and the rotation of the residual stream, is not there. Weights are in the dtype of
    the embedding; the rounding of inputs, which some sets do, is no part of the model.
    """

    def __init__(self, weights: StoredSet) -> None:
        self._weights = weights
        checkpoint = weights.checkpoint
        tensors = {
            name: replace(info, name=name)  # what a set has for itself, as a bias, has its prefix
            for name, info in weights.tensors.items()
            if not self._is_left_out(name) and not self._is_quantized(name)
        }
        dtype = weights.tensors[EMBEDDING].dtype if EMBEDDING in weights.tensors else "BF16"
        for layer in weights.quantized:
            name, some = f"{layer}.weight", next(iter(weights.layers[layer].values()))
            tensors[name] = TensorInfo(name, dtype, weights.size(layer), some.file)
        if LM_HEAD in weights.shared_layers and HEAD in weights.tensors:
            head = weights.tensors[HEAD]
            tensors[HEAD] = TensorInfo(HEAD, dtype, head.shape, head.file)
        self._dtype = _TYPES[dtype]
        config = {key: value for key, value in checkpoint.config.items() if key != SECTION}
        super().__init__(checkpoint.path, config, tensors)

    def get(self, name: str) -> torch.Tensor:
        """Read the tensor `name`, a weight of the set in floating point."""
        layer, leaf = split_layer(name)
        if name == HEAD and LM_HEAD in self._weights.shared_layers:
            scale = self._weights.get(f"{LM_HEAD}.weight_scale")
            return (self._weights.get(HEAD).float() * scale).to(self._dtype)
        if leaf != "weight" or layer not in self._weights.quantized:
            return self._weights.get(name)
        rows = row_chunks(self._weights.describe(layer))
        chunks = (dequantize(self._weights, layer, part) for part in rows)
        if INPUT_RATIO not in self._weights.layers[layer]:
            return torch.cat([chunk.to(self._dtype) for chunk in chunks])
        ratio = self._weights.get(f"{layer}.{INPUT_RATIO}")
        return torch.cat([(chunk * ratio).to(self._dtype) for chunk in chunks])

    def check_links(self) -> None:
        """Raise FormatError if config.json or a weight file is a link that leaves the folder."""
        self._weights.checkpoint.check_links()

    def _is_quantized(self, name: str) -> bool:
        layer, leaf = split_layer(name)
        is_head = layer == LM_HEAD and LM_HEAD in self._weights.shared_layers
        return is_head or (leaf != "bias" and layer in self._weights.quantized)

    @staticmethod
    def _is_left_out(name: str) -> bool:
        layer, leaf = split_layer(name)
        return leaf == K_MEAN or layer == STREAM

"""Rotations that leave the model's function as it is and spread outliers over channels.

R1 turns the residual stream: the embedding and what writes to the stream (o, down)
on their outputs, what reads it (q, k, v, gate, up, routers, lm_head) on their inputs. An
RMSNorm commutes with a rotation once its weight is folded into the layers that read
it. R2 turns each value head: v on its outputs, o on its inputs. A gate between them, which
multiplies each channel, would not commute with it.

The matrices are Hadamard matrices divided by the square root of their size
(compressed-tensors has the tables for sizes that are no power of two), with the
signs of a fixed seed. QuaRot (arXiv 2404.00456) and SpinQuant (2405.16406) describe
the method; llmcompressor's SpinQuantModifier is not used because it subtracts the
mean of each embedding, which an RMSNorm does not undo, and forgets biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from vllm_qoq.checkpoint.format import STREAM
from vllm_qoq.models.table import LayerNames
from vllm_qoq.numerics import rotation as basis
from vllm_qoq.quantizer import QuantizeError
from vllm_qoq.quantizer.model import Dimensions, Module, blocks
from vllm_qoq.quantizer.parts import rows
from vllm_qoq.quantizer.size import FLOATS_AT_ONCE
from vllm_qoq.quantizer.weights import Rows, assign

_SEED = 0


def hadamard(size: int, seed: int = _SEED) -> torch.Tensor:
    """Make an orthogonal matrix whose entries have one magnitude: float64 [size, size].

    It is on the GPU where there is one, which makes it in no time. Until the division its entries
    are integers, so that it is the same everywhere.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _random_matrix(size, device, seed) / size**0.5


def require_sizes(sizes: Iterable[int]) -> None:
    """Raise QuantizeError where no rotation of one of the sizes is known."""
    for size in sizes:
        _random_matrix(size, torch.device("meta"), _SEED)


def _random_matrix(size: int, device: torch.device, seed: int) -> torch.Tensor:
    from compressed_tensors.transform.utils.hadamard import random_hadamard_matrix

    generator = torch.Generator().manual_seed(seed)
    try:
        return random_hadamard_matrix(size, torch.float64, device, generator)
    except ValueError as error:
        raise QuantizeError(
            f"no Hadamard matrix of size {size} is known; quantize with --no-rotate"
        ) from error


def way_back(model: Module, names: LayerNames, dimensions: Dimensions) -> dict[str, torch.Tensor]:
    """Make the checkpoint's tensors that turn hidden states back, before the stream is rotated."""
    norm = model.get_submodule(names.final_norm).weight.detach() + names.norm_offset
    return {f"{STREAM}.rotation": basis.signs(hadamard(dimensions.hidden)), f"{STREAM}.norm": norm}


@torch.no_grad()
def untie(model: Module, names: LayerNames) -> None:
    """Give lm_head a weight of its own: it reads the folded norm, the embedding does not."""
    head, embedding = model.get_submodule(names.head), model.get_submodule(names.embedding)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


@torch.no_grad()
def rotate_stream(model: Module, names: LayerNames, dimensions: Dimensions) -> None:
    """Apply R1 to all that reads or writes the residual stream.

    The weights of the norms go into the layers that read them in the same step, so that a layer is
    rounded back and moved between CPU and GPU once.
    """
    rotation = hadamard(dimensions.hidden)
    turn_inputs(model.get_submodule(names.embedding), rotation)
    head = model.get_submodule(names.head)
    _turn_readers(model.get_submodule(names.final_norm), [head], names.norm_offset, rotation)
    for index, block in enumerate(blocks(model, names)):
        layers = names.of_block(index)
        for name, readers in layers.norms.items():
            norm = block.get_submodule(name)
            modules = [block.get_submodule(reader) for reader in readers]
            _turn_readers(norm, modules, names.norm_offset, rotation)
        for name in layers.stream_writers:
            layer = block.get_submodule(name)
            turn_outputs(Rows(layer, 0, len(layer.weight)), rotation)


@torch.no_grad()
def rotate_values(model: Module, names: LayerNames, dimensions: Dimensions) -> None:
    """Apply R2 to the values of every head."""
    rotation = hadamard(dimensions.head_dim)
    for index, block in enumerate(blocks(model, names)):
        if names.of_block(index).has_keys:
            turn_outputs(rows(block, "v", names, dimensions), rotation)
            turn_inputs(block.get_submodule(names.o), rotation)


def turn_inputs(layer: Module, rotation: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Replace W [N, K] by W @ R, block by block where R is smaller than K.

    scale  float64 [K] that W's columns are multiplied by first
    """
    weight = layer.weight.data
    rotation = rotation.to(weight.device)
    scale = None if scale is None else scale.to(weight.device)

    def turned(rows: torch.Tensor) -> torch.Tensor:
        scaled = rows if scale is None else rows.mul_(scale)
        return (scaled.view(len(rows), -1, len(rotation)) @ rotation).view_as(rows)

    assign(layer, "weight", _by_rows(weight, turned))


def turn_outputs(rows: Rows, rotation: torch.Tensor) -> None:
    """Replace W [N, K] by R.T @ W and b by R.T @ b, block by block where R is smaller than N."""
    weight, size = rows.weight, len(rotation)
    rotation = rotation.to(weight.device)
    blocked = weight.double().view(-1, size, weight.shape[1])
    rows.assign("weight", (rotation.t() @ blocked).view_as(weight).to(weight.dtype))
    bias = rows.bias
    if bias is not None:
        turned = bias.double().view(-1, size) @ rotation
        rows.assign("bias", turned.view_as(bias).to(bias.dtype))


def _turn_readers(
    norm: Module, readers: Iterable[Module], offset: float, rotation: torch.Tensor
) -> None:
    """Turn the inputs of what reads a norm, and move the weight of the norm into it."""
    scale = norm.weight.data.double() + offset
    for reader in readers:
        turn_inputs(reader, rotation, scale)
    assign(norm, "weight", torch.full_like(norm.weight.data, 1 - offset))


def _by_rows(weight: torch.Tensor, changed: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Change some rows of `weight` [N, K] after others, copies in float64, and round them back.

    In float64 at once, the embedding of a large vocabulary would take most of a GPU.
    """
    result = torch.empty_like(weight)
    rows = max(1, FLOATS_AT_ONCE // weight.shape[1])
    for part, target in zip(weight.split(rows), result.split(rows), strict=True):
        target.copy_(changed(part.to(torch.float64, copy=True)))
    return result

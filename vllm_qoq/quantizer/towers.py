"""What a vision tower writes into the stream of a language model, which is rotated along with it.

The last layer of a projector takes the place of the embedding, or adds to the stream behind a
block, so the rotation goes into its outputs. The towers stay as they are in all else.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from vllm_qoq.checkpoint.folder import Checkpoint, TensorInfo
from vllm_qoq.checkpoint.format import split_layer
from vllm_qoq.checkpoint.language import LanguagePart, beside_language
from vllm_qoq.checkpoint.layout import FLOATS
from vllm_qoq.models.vision import vision_language
from vllm_qoq.quantizer import QuantizeError

if TYPE_CHECKING:
    import torch

_REMEDY = "download the model again"


def check_writers(checkpoint: Checkpoint, hidden: int) -> None:
    """Raise QuantizeError unless all that writes to the stream is there, with `hidden` outputs."""
    if not isinstance(checkpoint, LanguagePart):
        return
    weights = [name for name in beside_language(checkpoint) if name.endswith(".weight")]
    for glob in _globs(checkpoint):
        if not any(_matches(split_layer(name)[0], glob) for name in weights):
            raise QuantizeError(f"{checkpoint.path}: {glob} has no weight; {_REMEDY}")
    for name, info in beside_language(checkpoint).items():
        if info.dtype not in FLOATS:
            raise QuantizeError(
                f"{info.file}: {name}: is {info.dtype}, expected {' or '.join(sorted(FLOATS))}; "
                "give the model in bf16 or fp16"
            )
    for name, info in writers(checkpoint).items():
        if not info.shape or info.shape[0] != hidden:
            raise QuantizeError(
                f"{info.file}: {name}: is {list(info.shape)}, but the stream that it writes to has "
                f"{hidden} channels; {_REMEDY}"
            )


def writers(checkpoint: LanguagePart) -> Mapping[str, TensorInfo]:
    """List the weights and biases beside a language model that write to its stream."""
    globs = _globs(checkpoint)
    return {
        name: info
        for name, info in beside_language(checkpoint).items()
        if any(_matches(split_layer(name)[0], glob) for glob in globs)
    }


def rotated(checkpoint: LanguagePart, rotation: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rotate the outputs of what writes to the stream beside the language model.

    rotation  orthogonal, float64 [hidden, hidden]
    """
    found = {}
    for name in writers(checkpoint):
        stored = checkpoint.get(name)  # a weight [hidden, K] or a bias [hidden]
        turned = rotation.t() @ stored.to(rotation)
        found[name] = turned.to(stored)
    return found


def _globs(checkpoint: LanguagePart) -> tuple[str, ...]:
    known = vision_language(checkpoint.whole.config)
    assert known is not None
    return known.writers


def _matches(layer: str, glob: str) -> bool:
    return fnmatchcase(layer.removeprefix("model."), glob)

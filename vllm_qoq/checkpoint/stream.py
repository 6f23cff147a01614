"""The basis of the residual stream: what a source tells of it, and checks of what is stored."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.checkpoint.format import SECTION, STREAM, Section, Stream, split_layer, stream_shapes
from vllm_qoq.checkpoint.language import language_set
from vllm_qoq.checkpoint.layout import FLOATS
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.errors import FormatError
from vllm_qoq.models.config import CONFIG, text_config

_FINAL_NORM = "model.norm.weight"
_REMEDY = "download or quantize the model again"


def of_source(weights: StoredSet) -> Stream | None:
    """Find what the section of a checkpoint made of `weights` has to say of its stream.

    A final norm of ones was folded into lm_head, which tools do that rotate the stream. Reads the
    norm or, where one is stored, the rotation. Raises FormatError if that is no rotation.
    """
    weights = language_set(weights)
    if STREAM in weights.layers:
        if message := _rotation(weights.checkpoint):
            raise FormatError(f"{weights.checkpoint.path}: {message}")
        return Stream(rotation="stored")
    if _FINAL_NORM in weights.tensors and (weights.get(_FINAL_NORM) == 1).all():
        return Stream(rotation="unknown")
    return None


def structure(checkpoint: Checkpoint, section: Section) -> Iterator[str]:
    """Find what is wrong with names, dtypes and shapes of the tensors of a stored stream."""
    is_stored = section.stream is not None and section.stream.is_stored
    found = {n: info for n, info in checkpoint.tensors.items() if split_layer(n)[0] == STREAM}
    hidden = text_config(checkpoint.config).get("hidden_size")
    # A hidden_size that is no number is reported with the config.
    shapes = stream_shapes(hidden) if is_stored and isinstance(hidden, int) else {}
    for leaf, shape in shapes.items():
        info = found.pop(f"{STREAM}.{leaf}", None)
        dtypes = {"I8"} if leaf == "rotation" else FLOATS
        if info is None:
            yield f"{STREAM}.{leaf}: {CONFIG} announces it, but it is missing; {_REMEDY}"
        elif info.dtype not in dtypes or info.shape != shape:
            yield (
                f"{info.file}: {info.name}: is {info.dtype} {list(info.shape)}, expected "
                f"{' or '.join(sorted(dtypes))} {list(shape)}; {_REMEDY}"
            )
    for info in found.values():
        yield f"{info.file}: {info.name}: is not announced in {CONFIG}: {SECTION}.{STREAM}"


def contents(checkpoint: Checkpoint, section: Section) -> list[str]:
    """Find what is wrong with the numbers of a stored rotation, a line or none."""
    is_stored = section.stream is not None and section.stream.is_stored
    message = _rotation(checkpoint) if is_stored else None
    return [message] if message else []


def _rotation(checkpoint: Checkpoint) -> str | None:
    """Find what is wrong with the rotation's numbers; a wrong header is left to `structure`."""
    from vllm_qoq.numerics import rotation as basis

    info = checkpoint.tensors.get(f"{STREAM}.rotation")
    if info is None or info.dtype != "I8" or len(info.shape) != 2 or len(set(info.shape)) > 1:
        return None
    message = basis.finding(checkpoint.get(info.name))
    return f"{info.file}: {info.name}: {message}; {_REMEDY}" if message else None

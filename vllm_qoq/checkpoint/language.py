"""The language model in a checkpoint, as a model of its own.

Beside it may be what reads images, and modules that generation does without (`unused`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_qoq.checkpoint.folder import Checkpoint, TensorInfo
from vllm_qoq.checkpoint.stacked_experts import experts_apart
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.errors import FormatError
from vllm_qoq.models.table import architecture_of
from vllm_qoq.models.tensors import EMBEDDING
from vllm_qoq.models.vision import (
    language_config,
    language_name,
    outer_prefix,
    vision_language,
)

if TYPE_CHECKING:
    import torch


# Tensors that every language model has, outside of its decoder layers.
_IN_EVERY_MODEL = (EMBEDDING, "model.norm.weight")


class _Used(Checkpoint):
    """Some tensors of a checkpoint."""

    def __init__(self, whole: Checkpoint, tensors: dict[str, TensorInfo]) -> None:
        self._whole = whole
        super().__init__(whole.path, whole.config, tensors)

    def get(self, name: str) -> torch.Tensor:
        """The tensor `name` as stored, mapped from the file and not copied. Do not write to it."""
        return self._whole.get(name)


class LanguagePart(Checkpoint):
    """A language model, with the names and the config that it would have in a folder of its own.

    The tensors keep what they are called in the file as their `info.name`, for messages.

    whole  the checkpoint that has it
    """

    def __init__(self, whole: Checkpoint) -> None:
        self.whole = whole
        config = dict(language_config(whole.config))
        tensors = _used(config, _language_tensors(whole.tensors))
        self._stored = {name: info.name for name, info in tensors.items()}
        super().__init__(whole.path, config, tensors)

    def get(self, name: str) -> torch.Tensor:
        """The tensor `name` as stored, mapped from the file and not copied. Do not write to it."""
        return self.whole.get(self._stored.get(name, name))

    def check_links(self) -> None:
        """Raise FormatError if config.json or a weight file is a link that leaves the folder."""
        self.whole.check_links()


def language_part(checkpoint: Checkpoint) -> Checkpoint:
    """The language model of a checkpoint, without what is beside it, and with experts apart.

    Raises FormatError for a model of images and text whose language model is not known.
    """
    checkpoint = experts_apart(checkpoint)
    if vision_language(checkpoint.config) is not None:
        return LanguagePart(checkpoint)
    tensors = _used(checkpoint.config, checkpoint.tensors)
    if len(tensors) == len(checkpoint.tensors):
        return checkpoint
    return _Used(checkpoint, tensors)


def stored_name(name: str, tensors: Mapping[str, TensorInfo]) -> str:
    """Name a tensor or layer of a language model as its file does, or would if it had it.

    tensors  all those of the language model, by the names that it has by itself
    """
    if name in tensors:
        return tensors[name].name
    known = (outer_prefix(one, tensors[one].name) for one in _IN_EVERY_MODEL if one in tensors)
    prefix = next(known, "model.")
    if name.startswith("model."):
        return prefix + name.removeprefix("model.")
    return prefix.removesuffix("model.") + name


def unused(checkpoint: Checkpoint) -> dict[str, str]:
    """List the modules that generation does without, with what they are, by name."""
    known = architecture_of(language_config(checkpoint.config))
    owners = {name.partition(".")[0] for name in checkpoint.tensors}
    return {k: v for k, v in known.unused.items() if k in owners} if known is not None else {}


def beside_language(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """List the tensors of a model of images and text that are not its language model's."""
    if not isinstance(checkpoint, LanguagePart):
        return {}
    tensors = checkpoint.whole.tensors
    return {name: info for name, info in tensors.items() if language_name(name) is None}


def language_set(weights: StoredSet) -> StoredSet:
    """The language model of a set of a model of images and text; any other set as it is.

    Raises FormatError for a language model that is not known.
    """
    checkpoint = weights.checkpoint
    if vision_language(checkpoint.config) is None:
        return weights
    config = dict(language_config(checkpoint.config))
    return replace(
        weights,
        checkpoint=Checkpoint(checkpoint.path, config, checkpoint.tensors),
        tensors=_language_tensors(weights.tensors),
        base=language_set(weights.base) if weights.base is not None else None,
    )


def _used(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Leave out the tensors of modules that generation does without."""
    known = architecture_of(config)
    modules = known.unused if known is not None else {}
    return {k: info for k, info in tensors.items() if k.partition(".")[0] not in modules}


def _language_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for stored, info in tensors.items():
        name = language_name(stored)
        if name is None:
            continue
        if name in found:
            raise FormatError(
                f"{info.file}: {info.name}: is in the checkpoint twice, also as "
                f"{found[name].name}; download the model again"
            )
        found[name] = info
    return found

"""Experts that a checkpoint has as two tensors of three dimensions, as layers of their own.

transformers has `experts.gate_up_proj` [experts, 2 intermediate, hidden] and `experts.down_proj`
[experts, hidden, intermediate] in memory. It saves a tensor for each projection of each expert, and
some models are published as they are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_qoq.checkpoint.folder import Checkpoint, TensorInfo
from vllm_qoq.errors import FormatError

if TYPE_CHECKING:
    import torch

_GATE_UP, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"
_MOST_EXPERTS, _MOST_LAYERS = 4096, 1 << 20


class ApartExperts(Checkpoint):
    """A checkpoint whose stacked experts are named `experts.NUMBER.gate_proj.weight` and so on."""

    def __init__(self, stacked: Checkpoint) -> None:
        self._stacked = stacked
        self._places: dict[str, tuple[str, int, slice]] = {}
        tensors: dict[str, TensorInfo] = {}
        for name, info in stacked.tensors.items():
            if not _is_stacked(info):
                tensors[name] = info
                continue
            if len(self._places) > _MOST_LAYERS:
                raise FormatError(
                    f"{info.file}: {name}: has more than {_MOST_LAYERS} layers of experts with the "
                    "tensors before it; not a model that can be served"
                )
            for of_expert, place in _layers(info):
                self._places[of_expert] = place
                shape = (len(range(info.shape[1])[place[2]]), info.shape[2])
                tensors[of_expert] = replace(info, name=of_expert, shape=shape)
        super().__init__(stacked.path, stacked.config, tensors)

    def get(self, name: str) -> torch.Tensor:
        """The tensor `name` as stored, mapped from the file and not copied. Do not write to it."""
        if name not in self._places:
            return self._stacked.get(name)
        stacked, number, rows = self._places[name]
        return self._stacked.get(stacked)[number, rows]

    def check_links(self) -> None:
        """Raise FormatError if config.json or a weight file is a link that leaves the folder."""
        self._stacked.check_links()


def experts_apart(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a layer for each projection of each expert; one without a stack as it is.

    Names and shapes are all that is looked at. Raises FormatError for more layers than a model has.
    """
    if not any(map(_is_stacked, checkpoint.tensors.values())):
        return checkpoint
    return ApartExperts(checkpoint)


def _is_stacked(info: TensorInfo) -> bool:
    return (
        info.name.endswith((_GATE_UP, _DOWN))
        and len(info.shape) == 3
        and info.shape[0] <= _MOST_EXPERTS
        and all(info.shape)
    )


def _layers(info: TensorInfo) -> Iterator[tuple[str, tuple[str, int, slice]]]:
    """List the layers in a stack: name, and the stack, the number of the expert and its rows."""
    experts, _, leaf = info.name.rpartition(".")
    parts = {"down_proj": slice(None)}
    if leaf == "gate_up_proj":
        half = info.shape[1] // 2
        parts = {"gate_proj": slice(None, half), "up_proj": slice(half, None)}
    for number in range(info.shape[0]):
        for part, rows in parts.items():
            yield f"{experts}.{number}.{part}.weight", (info.name, number, rows)

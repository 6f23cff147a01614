"""The inputs of a layer that one rank has, which may begin and end within a group.

The inputs of a group share a scale. Where the inputs of a layer, or of a rank's slice of it, are
no multiple of the group size, the rank loads every group that it has inputs of. The GEMM on CUDA
reads whole blocks of 128 inputs, of which the first begins with a group, so codes are padded to
them with zeros, of weights once and of activations in every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from vllm.model_executor.parameter import GroupQuantScaleParameter

from vllm_qoq.numerics import group_count
from vllm_qoq.ops.w4a8_layout import BLOCK_K


@dataclass(frozen=True)
class InputSlice:
    """The inputs `first` to `first + count` of a layer; both are even.

    group_size  inputs that share a scale; None where all of a row do
    """

    first: int
    count: int
    group_size: int | None

    @property
    def lead(self) -> int:
        """The inputs of the first group that belong to the rank before."""
        return 0 if self.group_size is None else self.first % self.group_size

    @property
    def tail(self) -> int:
        """What the last block lacks, of which some inputs may belong to the next rank."""
        return -(self.lead + self.count) % BLOCK_K

    @property
    def groups(self) -> int:
        """The groups of which there are inputs here."""
        return group_count(self.lead + self.count, self.group_size or self.count)

    @property
    def columns(self) -> slice:
        """The place of the inputs among those of whole blocks."""
        return slice(self.lead, self.lead + self.count)

    def whole_blocks(self, packed: torch.Tensor, filler: int = 0) -> torch.Tensor:
        """Pad codes, uint8 [N, count / 2] with two in a byte, to whole blocks.

        filler  the byte to pad with
        """
        if not (self.lead or self.tail):
            return packed
        return pad(packed, (self.lead // 2, self.tail // 2), value=filler)

    def groups_of_blocks(self, of_groups: torch.Tensor, filler: int) -> torch.Tensor:
        """Pad scales or offsets [N, groups] to the groups of whole blocks with `filler`."""
        assert self.group_size is not None
        count = (self.lead + self.count + self.tail) // self.group_size
        return pad(of_groups, (0, count - self.groups), value=filler)

    def whole_blocks_of_tokens(self, codes: torch.Tensor) -> torch.Tensor:
        """Pad the codes of activations, int8 [M, count], to whole blocks with zeros."""
        return pad(codes, (self.lead, self.tail)) if self.lead or self.tail else codes


class GroupsOfSlice(GroupQuantScaleParameter):
    """A parameter [N, groups] for the groups of an InputSlice; neighbours may share one.

    stored_columns  the groups of the whole layer, as the checkpoint has them
    """

    def __init__(self, *, inputs: InputSlice, input_size: int, **more: Any) -> None:
        super().__init__(**more)
        assert inputs.group_size is not None
        self.stored_columns = group_count(input_size, inputs.group_size)
        self._first_group = inputs.first // inputs.group_size

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        """Take this rank's groups of a whole layer's."""
        count = self.data.shape[self.input_dim]
        part = loaded_weight.narrow(self.input_dim, self._first_group, count)
        assert self.data.shape == part.shape
        self.data.copy_(part)

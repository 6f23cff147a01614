"""The inputs of a layer that one rank has, which may begin and end within a group.

A group of 128 inputs shares a scale. Where the inputs of a layer, or of a rank's slice of it, are
no multiple of 128, the rank loads every group that it has inputs of. The GEMM on CUDA reads whole
groups, so codes are padded to them with zeros, of weights once and of activations in every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from vllm.model_executor.parameter import GroupQuantScaleParameter

from vllm_qoq.numerics import GROUP_SIZE, group_count


@dataclass(frozen=True)
class InputSlice:
    """The inputs `first` to `first + count` of a layer; both are even."""

    first: int
    count: int

    @property
    def lead(self) -> int:
        """The inputs of the first group that belong to the rank before."""
        return self.first % GROUP_SIZE

    @property
    def tail(self) -> int:
        """What the last group lacks, or the inputs of it that belong to the next rank."""
        return -(self.first + self.count) % GROUP_SIZE

    @property
    def groups(self) -> int:
        """The groups of which there are inputs here."""
        return group_count(self.lead + self.count)

    @property
    def columns(self) -> slice:
        """The place of the inputs among those of whole groups."""
        return slice(self.lead, self.lead + self.count)

    def whole_groups(self, packed: torch.Tensor, filler: int = 0) -> torch.Tensor:
        """Pad codes, uint8 [N, count / 2] with two in a byte, to whole groups.

        filler  the byte to pad with
        """
        if not (self.lead or self.tail):
            return packed
        return pad(packed, (self.lead // 2, self.tail // 2), value=filler)

    def whole_groups_of_tokens(self, codes: torch.Tensor) -> torch.Tensor:
        """Pad the codes of activations, int8 [M, count], to whole groups with zeros."""
        return pad(codes, (self.lead, self.tail)) if self.lead or self.tail else codes


class GroupsOfSlice(GroupQuantScaleParameter):
    """A parameter [N, groups] for the groups of an InputSlice; neighbours may share one.

    stored_columns  the groups of the whole layer, as the checkpoint has them
    """

    def __init__(self, *, inputs: InputSlice, input_size: int, **more: Any) -> None:
        super().__init__(**more)
        self.stored_columns = group_count(input_size)
        self._first_group = inputs.first // GROUP_SIZE

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        """Take this rank's groups of a whole layer's."""
        count = self.data.shape[self.input_dim]
        part = loaded_weight.narrow(self.input_dim, self._first_group, count)
        assert self.data.shape == part.shape
        self.data.copy_(part)

"""The rotary embedding of a block: which channels of a head turn together, and how fast.

Some models turn the channels 2 i and 2 i + 1 of a head together, others i and i + R / 2, and some
leave all channels from R on as they are. The steps know one order alone, in which the pairs are
(i, i + D / 2) and a pair may turn by no angle; `paired` brings the channels of a model into it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_qoq.models.table import LayerNames
from vllm_qoq.numerics.rope_pairs import paired_channels
from vllm_qoq.quantizer.model import Dimensions, Module


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a block.

    inv_freq  float32 [D / 2], the angle by which each pair turns from token to token
    longest   the most tokens of a text
    scaling   float32 [D / 2], the factor of the turned keys, which is 1 but for some kinds of long
              context
    channels  int64 [D], the channel of a head at each place of the paired order
    """

    inv_freq: torch.Tensor
    longest: int
    scaling: torch.Tensor
    channels: torch.Tensor

    def paired(self, x: torch.Tensor) -> torch.Tensor:
        """Bring the channels of heads, [..., D], into the order of pairs."""
        return x[..., self.channels.to(x.device)]

    def of_model(self, x: torch.Tensor) -> torch.Tensor:
        """Bring channels in the order of pairs, [..., D], back into that of the model."""
        return x[..., self.channels.argsort().to(x.device)]

    def of_channels(self, of_pairs: torch.Tensor) -> torch.Tensor:
        """Give each channel of the model what its pair has: [..., D / 2] to [..., D]."""
        return self.of_model(torch.cat((of_pairs, of_pairs), dim=-1))


def rope_of(model: Module, names: LayerNames, dimensions: Dimensions, index: int) -> Rope | None:
    """Read the rotary embedding of block `index` from the model; None for linear attention."""
    if not names.of_block(index).has_keys:
        return None
    rotary = model.get_submodule(names.rotary)
    # A model whose layers differ has one set of angles for each kind.
    kind = f"{model.config.layer_types[index]}_" if hasattr(rotary, "layer_types") else ""
    turning = getattr(rotary, f"{kind}inv_freq").detach().float()
    if names.still_kind is not None and model.config.layer_types[index] == names.still_kind:
        turning = torch.zeros_like(turning)
    scaling = torch.ones(dimensions.head_dim // 2)
    scaling[: len(turning)] = getattr(rotary, f"{kind}attention_scaling")
    still = torch.zeros(dimensions.head_dim // 2 - len(turning), device=turning.device)
    return Rope(
        inv_freq=torch.cat((turning, still)),
        longest=model.config.max_position_embeddings,
        scaling=scaling,
        channels=paired_channels(dimensions.head_dim, 2 * len(turning), names.neighbor_pairs),
    )

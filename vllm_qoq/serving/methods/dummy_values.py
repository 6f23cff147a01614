"""Valid values for QoQ tensors where `--load-format dummy` left memory as it was."""

from __future__ import annotations

from collections.abc import Mapping

import torch

# Leaves room for a residual: the int8 weights lie within -112 and 98.
_MOST_GROUP_SCALE = 14


def make_valid(tensors: Mapping[str, torch.Tensor]) -> None:
    """Set random codes and valid scales in place, in the tensors of a layer or of all experts.

    tensors  leaf -> tensor, as `vllm_qoq.checkpoint.format.QoQSet` has them

    Zeros would take a GPU less power than a model's weights, and so benchmarks would be too fast.
    """
    tensors["qweight"].random_(0, 256)
    tensors["channel_scale"].fill_(1e-3)
    if "channel_zero" in tensors:
        tensors["channel_zero"].zero_()
    else:
        tensors["group_scale"].random_(1, _MOST_GROUP_SCALE + 1)
        tensors["group_offset"].copy_(-8 * tensors["group_scale"].to(torch.int16))

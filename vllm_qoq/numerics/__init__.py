"""The meaning of the numbers: QoQ weights, quantized activations, and pages of the KV cache.

packing              two codes of 4 bits in a byte
reference            weights and activations, in plain PyTorch: the oracle of the kernels
kv_layout            a page of the KV cache
reference_attention  attention over such pages
key_bias             whether a bias of K spoils a quantized cache
rope_pairs           which channels of a head RoPE turns together
rotation             the basis of a rotated residual stream
"""

GROUP_SIZES = (128, 64, 32)
"""The numbers of inputs that may share a group_scale of a QoQ set."""

EXPERT_MULTIPLE = 128
"""What the kernels of experts in QoQ sets need hidden and intermediate sizes to be multiples of."""


EXPERT_GROUP_SIZES = (128, -1)
"""The group sizes of experts in QoQ sets for which there are kernels; -1 is none."""

EXPERT_MULTIPLE = 128
"""What the kernels of experts in QoQ sets need hidden and intermediate sizes to be multiples of."""


def group_count(inputs: int, group_size: int) -> int:
    """Count the groups of a layer's inputs, of which the last may be smaller."""
    return -(-inputs // group_size)


def group_size_of(inputs: int, groups: int) -> int | None:
    """Find the group size with which so many inputs have so many groups; None if there is none.

    There is one at most, but where a single group holds all inputs, whose size does not matter.
    """
    return next((size for size in GROUP_SIZES if group_count(inputs, size) == groups), None)


FP16_MAX = 65504.0
"""The largest number of fp16, in which scales and zeros of the KV cache are, and often keys."""

MAX_CLIPPED = 0.1
"""Share of a layer's weights that a nested set may clip, unless the user says otherwise."""

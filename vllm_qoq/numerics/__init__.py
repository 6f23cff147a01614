"""The meaning of the numbers: QoQ weights, quantized activations, and pages of the KV cache.

packing              two codes of 4 bits in a byte
reference            weights and activations, in plain PyTorch: the oracle of the kernels
kv_layout            a page of the KV cache
reference_attention  attention over such pages
key_bias             whether a bias of K spoils a quantized cache
rotation             the basis of a rotated residual stream
"""

GROUP_SIZE = 128
"""Inputs that share a group_scale of a QoQ set."""


def group_count(inputs: int) -> int:
    """Count the groups of a layer's inputs, of which the last may be smaller."""
    return -(-inputs // GROUP_SIZE)


FP16_MAX = 65504.0
"""The largest number of fp16, in which scales and zeros of the KV cache are, and often keys."""

MAX_CLIPPED = 0.1
"""Share of a layer's weights that a nested set may clip, unless the user says otherwise."""

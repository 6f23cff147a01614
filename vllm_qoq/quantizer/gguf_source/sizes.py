"""The sizes that the keys of a GGUF file say, held against each other and against its tensors.

For what is missing transformers would take its own defaults, and with what cannot be it ends in the
middle of its work, by errors that name no key.
"""

from __future__ import annotations

import math
from typing import NoReturn

from vllm_qoq.errors import shown
from vllm_qoq.quantizer import QuantizeError
from vllm_qoq.quantizer.gguf_source.header import Header

EMBEDDING = "token_embd.weight"
_NEEDED = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    "attention.head_count",
)
_OPTIONAL = ("attention.head_count_kv", "attention.key_length", "rope.dimension_count")
_MOST_BLOCKS, _MOST = 1024, 1 << 24
_EPSILON, _THETA = "attention.layer_norm_rms_epsilon", "rope.freq_base"


def check_sizes(header: Header) -> None:
    """Raise QuantizeError where the keys lack a size, or have one that the tensors do not."""
    sizes = {key: _count(header, key) for key in _NEEDED}
    sizes |= {key: _count(header, key) for key in _OPTIONAL if header.of_model(key) is not None}
    for key in (_EPSILON, _THETA):
        value = header.of_model(key)
        if value is None and key == _EPSILON:
            _refuse(header, key, "missing")
        if value is not None and not _is_positive(value):
            _refuse(header, key, f"{shown(value)} is no positive number")
    blocks = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if len(blocks) != sizes["block_count"]:
        found = f"{sizes['block_count']}, but there are tensors of {len(blocks)}"
        _refuse(header, "block_count", found)
    hidden, heads = sizes["embedding_length"], sizes["attention.head_count"]
    kv_heads = sizes.get("attention.head_count_kv", heads)
    if heads % kv_heads:
        _refuse(header, "attention.head_count_kv", f"{kv_heads} do not divide {heads} heads")
    head_dim = sizes.get("attention.key_length", hidden // heads)
    turned = sizes.get("rope.dimension_count", head_dim)
    if turned != head_dim:
        _refuse(header, "rope.dimension_count", f"{turned}, but heads have {head_dim}")
    for key, name, shape in (
        ("embedding_length", EMBEDDING, (None, hidden)),
        ("feed_forward_length", "blk.0.ffn_gate.weight", (sizes["feed_forward_length"], hidden)),
        ("attention.head_count", "blk.0.attn_q.weight", (heads * head_dim, hidden)),
        ("attention.head_count_kv", "blk.0.attn_k.weight", (kv_heads * head_dim, hidden)),
    ):
        _check_shape(header, key, name, shape)


def _check_shape(header: Header, key: str, name: str, shape: tuple[int | None, int]) -> None:
    """Refuse `key` unless the tensor `name` is there in this shape; None stands for any size."""
    tensor = header.tensors.get(name)
    if tensor is None:
        raise QuantizeError(
            f"{header.path}: {name} is missing; download the file again, or give the model in the "
            "format of Hugging Face"
        )
    rows, hidden = shape
    expected = (tensor.shape[0] if rows is None else rows, hidden)
    if tensor.shape != expected:
        _refuse(
            header,
            key,
            f"with an embedding_length of {hidden}, {name} would be {list(expected)}, but is "
            f"{list(tensor.shape)}",
        )


def _count(header: Header, key: str) -> int:
    value = header.of_model(key)
    if value is None:
        _refuse(header, key, "missing")
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        _refuse(header, key, f"{shown(value)} is no positive number")
    most = _MOST_BLOCKS if key == "block_count" else _MOST
    if value > most:
        _refuse(header, key, f"{value}, more than {most}")
    return value


def _is_positive(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value) and value > 0


def _refuse(header: Header, key: str, what: str) -> NoReturn:
    raise QuantizeError(
        f"{header.path}: {header.architecture}.{key}: {what}; download the file again, or give the "
        "model in the format of Hugging Face"
    )

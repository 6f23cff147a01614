"""The means of K that the section announces: their names and shapes, and checks of them."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_qoq.checkpoint.folder import Checkpoint, TensorInfo
from vllm_qoq.checkpoint.format import K_MEAN, SECTION, split_layer
from vllm_qoq.checkpoint.kv_config import UNQUANTIZED, KVCache
from vllm_qoq.checkpoint.language import language_part, stored_name
from vllm_qoq.errors import FormatError, shown
from vllm_qoq.models.config import CONFIG
from vllm_qoq.models.table import LINEAR, architecture_of
from vllm_qoq.models.tensors import LAYERS, expected_tensors

_ATTENTION = "self_attn"
_REMEDY = "download or quantize the model again"


def name_of(layer: int) -> str:
    """Name the mean of K of decoder layer `layer`."""
    return f"{LAYERS}{layer}.{_ATTENTION}.{K_MEAN}"


def stored(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """List the means of K that the files hold, announced or not, by name."""
    return {n: info for n, info in checkpoint.tensors.items() if split_layer(n)[1] == K_MEAN}


def unannounced(name: str) -> str:
    """Say that the section does not announce the mean of K `name`, and what to do."""
    return (
        f"{name}: is not announced in {CONFIG}, so nothing would load it; write "
        f'"{K_MEAN}": true into {SECTION}.kv_cache there if it is a mean of this model\'s keys, '
        f"else {_REMEDY}"
    )


def structure(checkpoint: Checkpoint, cache: KVCache | None) -> Iterator[str]:
    """Find what is wrong with names, dtypes and shapes of the means of K. Reads no tensor.

    cache  the KV cache that announces them; None without one
    """
    checkpoint = language_part(checkpoint)
    found = stored(checkpoint)
    if cache is None or not cache.k_mean:
        for info in found.values():
            yield f"{info.file}: {unannounced(info.name)}"
        return
    try:
        expected = expected_tensors(checkpoint.config)
    except FormatError:
        if architecture_of(checkpoint.config) is not None:
            return  # What is wrong with its sizes is found where they are checked.
        architectures = shown(checkpoint.config.get("architectures"))
        yield (
            f"{CONFIG}: {SECTION}.kv_cache.{K_MEAN}: is true, but the heads of K of "
            f"{architectures} are not known; take it out"
        )
        return
    for layer in range(expected.layers):
        name = name_of(layer)
        if expected.kinds and expected.kinds[layer] == LINEAR:
            continue  # It has no keys, so a mean of it is a surplus.
        if name in found:
            yield from _misshapen(found.pop(name), expected.key_heads)
        elif cache.bits_of(f"{LAYERS}{layer}.{_ATTENTION}.attn") != UNQUANTIZED:
            name = stored_name(name, checkpoint.tensors)
            yield f"{name}: {CONFIG} announces it, but it is missing; {_REMEDY}"
    for info in found.values():
        yield f"{info.file}: {info.name}: the model has no such layer; {_REMEDY}"


def _misshapen(info: TensorInfo, shape: tuple[int, int]) -> Iterator[str]:
    if (info.dtype, info.shape) != ("F32", shape):
        yield (
            f"{info.file}: {info.name}: is {info.dtype} {list(info.shape)}, expected F32 "
            f"{list(shape)} (num_key_value_heads, head_dim); {_REMEDY}"
        )

"""RoPE scaling of a GGUF file, which transformers leaves out without a word.

llama.cpp stores the scaling of Llama 3.1 and later as a tensor, `rope_freqs.weight`, float32
[head_dim / 2]: what each frequency is divided by. From it the numbers of `config.json` are found
again, and tried: nothing is taken that does not reproduce the tensor. Any other scaling is refused.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vllm_qoq.errors import shown
from vllm_qoq.quantizer import QuantizeError
from vllm_qoq.quantizer.gguf_source.header import Header

FREQUENCIES = "rope_freqs.weight"
# All models with this scaling have these; only the factor differs.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_MOST_DIFFERENCE = 1e-4
_REMEDY = "give the model in the format of Hugging Face"


def scaling(header: Header) -> dict[str, Any] | None:
    """Find the `rope_parameters`, without rope_theta, of a file; None where nothing is scaled.

    Raises QuantizeError for a scaling that cannot be restored.
    """
    kind = header.of_model("rope.scaling.type")
    if kind not in (None, "none"):
        raise QuantizeError(
            f"{header.path}: {header.architecture}.rope.scaling.type: {shown(kind)} is not "
            f"restored from GGUF; {_REMEDY}"
        )
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        if header.of_model(key) not in (None, 0, 1):
            raise QuantizeError(
                f"{header.path}: {header.architecture}.{key}: {shown(header.of_model(key))} is not "
                f"restored from GGUF; {_REMEDY}"
            )
    if FREQUENCIES not in header.tensors:
        return None
    stored, theta = _stored(header), float(header.of_model("rope.freq_base") or 10000.0)
    found = {"rope_type": "llama3", "factor": round(float(stored.max()), 4), **_LLAMA3}
    if np.abs(stored / _llama3(len(stored), theta, found) - 1).max() > _MOST_DIFFERENCE:
        raise QuantizeError(
            f"{header.path}: {FREQUENCIES}: is not the scaling of Llama 3.1, which alone is "
            f"restored from GGUF; {_REMEDY}"
        )
    return found


def _stored(header: Header) -> np.ndarray:
    tensor = header.tensors[FREQUENCIES]
    if tensor.type != "F32" or len(tensor.shape) != 1 or not 1 <= tensor.shape[0] <= 1024:
        raise QuantizeError(
            f"{header.path}: {FREQUENCIES}: is {tensor.type} {list(tensor.shape)}, expected F32 "
            "[head_dim / 2]; download the file again"
        )
    stored = np.fromfile(header.path, "<f4", tensor.shape[0], offset=tensor.start)
    if not (np.isfinite(stored).all() and (stored > 0).all()):
        raise QuantizeError(
            f"{header.path}: {FREQUENCIES}: holds a number that is not positive; download the file "
            "again"
        )
    return stored


def _llama3(count: int, theta: float, found: dict[str, Any]) -> np.ndarray:
    """Compute what `found` divides each of `count` frequencies by, as transformers does."""
    low, high = found["low_freq_factor"], found["high_freq_factor"]
    context, factor = found["original_max_position_embeddings"], found["factor"]
    wavelength = 2 * math.pi * theta ** (np.arange(count) / count)
    smooth = ((context / wavelength - low) / (high - low)).clip(0, 1)
    divisor: np.ndarray = 1 / ((1 - smooth) / factor + smooth)
    return divisor

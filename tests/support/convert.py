"""The W4A16 fixture in the formats of other tools, GPTQ and AWQ, with equal weights.

compressed-tensors packs eight codes along K in an int32, the lowest k in the lowest
nibble, a code being q + 8: weight_packed [N, K/8], weight_scale [N, K/G].
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

GROUP_SIZE = 128
NIBBLES = torch.arange(0, 32, 4)
# AWQ keeps these of eight neighbouring columns in the lowest nibble, the next, ...
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def to_gptq(source: Path, out: Path) -> Path:
    """AutoGPTQ's format: packed along K, zero points stored less one ("v1")."""
    config = {"quant_method": "gptq", "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
    return _convert(source, out, config, _gptq)


def to_auto_round(source: Path, out: Path) -> Path:
    """auto-round's format with GPTQ's packing."""
    config = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "sym": True}
    return _convert(source, out, config, _gptq)


def to_awq(source: Path, out: Path) -> Path:
    """AutoAWQ's format: packed along N, eight columns interleaved."""
    config = {"quant_method": "awq", "zero_point": True, "version": "gemm"}
    return _convert(source, out, config, _awq)


def _gptq(packed: torch.Tensor, scales: torch.Tensor) -> Tensors:
    groups, n = scales.shape
    k = packed.shape[1] * 8
    return {
        "qweight": packed.T.contiguous(),
        "qzeros": pack(torch.full((groups, n), 8 - 1)),
        "scales": scales,
        "g_idx": torch.arange(k, dtype=torch.int32) // GROUP_SIZE,
    }


def _awq(packed: torch.Tensor, scales: torch.Tensor) -> Tensors:
    codes = ((packed.unsqueeze(-1) >> NIBBLES) & 0xF).flatten(1).T
    columns = codes.reshape(len(codes), -1, 8)[:, :, AWQ_ORDER]
    return {
        "qweight": pack(columns.flatten(1)),
        "qzeros": pack(torch.full(scales.shape, 8)),
        "scales": scales,
    }


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Eight neighbours of a row in one int32, the first in the lowest nibble."""
    words = (codes.long().reshape(len(codes), -1, 8) << NIBBLES).sum(-1)
    return words.to(torch.int32)  # keeps the low 32 bits


def _convert(
    source: Path,
    out: Path,
    quantization: dict[str, Any],
    convert: Callable[[torch.Tensor, torch.Tensor], Tensors],
) -> Path:
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors", "recipe.yaml"))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"bits": 4, "group_size": GROUP_SIZE, **quantization}
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        layer = name.removesuffix(".weight_packed")
        del tensors[f"{layer}.weight_shape"]
        scales = tensors.pop(f"{layer}.weight_scale").T.contiguous()
        made = convert(tensors.pop(name), scales)
        tensors |= {f"{layer}.{leaf}": tensor for leaf, tensor in made.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out

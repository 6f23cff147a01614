"""LoRA adapters in PEFT's format, with random numbers, and what they add to a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_qoq.checkpoint import transforms
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.checkpoint.weights_digest import weights_digest

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA = 16


def write_adapter(
    model: Path,
    out: Path,
    seed: int,
    rank: int = 8,
    strength: float = 0.3,
    targets: tuple[str, ...] = TARGETS,
    prefix: str = "base_model.model.",
) -> Path:
    """An adapter of a model, whose products are `strength` times as large as its weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if not layer.endswith(targets):
            continue
        a = torch.randn(rank, weight.shape[1], generator=generator)
        b = torch.randn(weight.shape[0], rank, generator=generator)
        b *= strength * weight.float().norm() / ((ALPHA / rank) * (b @ a).norm())
        tensors[f"{prefix}{layer}.lora_A.weight"] = a
        tensors[f"{prefix}{layer}.lora_B.weight"] = b
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    write_config(out, r=rank, target_modules=list(targets))
    return out


def write_config(adapter: Path, **changes: object) -> None:
    """The adapter_config.json of an adapter."""
    config = {
        "base_model_name_or_path": "tiny",
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": list(TARGETS),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))


def write_transforms(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """The file that says how the weights of a checkpoint were transformed, as `quantize` does."""
    opened = Checkpoint.open(folder)
    own = weights_digest(opened.tensors.values(), opened.get)
    (folder / transforms.FILE).write_bytes(transforms.encoded(tensors, own))
    return folder / transforms.FILE


def products(adapter: Path) -> Mapping[str, torch.Tensor]:
    """Layer -> what an adapter adds to its weight, float64 [N, K]."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): scale
        * (tensors[name.replace("lora_A", "lora_B")].double() @ a.double())
        for name, a in tensors.items()
        if name.endswith(".lora_A.weight")
    }


def write_merged(model: Path, adapter: Path, out: Path) -> Path:
    """A model in floating point with an adapter added to its weights, in float32."""
    shutil.copytree(model, out)
    added = {f"{layer}.weight": delta for layer, delta in products(adapter).items()}
    tensors = {
        name: (tensor.double() + added.get(name, 0)).float()
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out

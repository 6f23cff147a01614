"""Tiny mixtures of experts with random weights, and checkpoints of them with two sets."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from rtn_checkpoints import FILES, edit, w8a8
from transformers import AutoModelForCausalLM

SIZES = {
    **{"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64},
    **{"max_position_embeddings": 512, "initializer_range": 0.1, "tie_word_embeddings": False},
    **{"bos_token_id": 0, "eos_token_id": 1},
}
QWEN = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": QWEN | {"norm_topk_prob": True},
    "Qwen2Moe": QWEN | {"shared_expert_intermediate_size": 64},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}


def write_model(tiny_model: Path, out: Path, family: str = "Qwen3Moe", **sizes: Any) -> Path:
    """A model in bf16 as transformers saves it, each expert for itself, with a tokenizer."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | sizes)
    config.architectures = [f"{family}ForCausalLM"]
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("norm.weight"):  # all ones, as after a rotation
                tensor.add_(torch.rand_like(tensor) * 0.3)
    model.bfloat16().save_pretrained(out)
    for name in FILES:
        shutil.copyfile(tiny_model / name, out / name)
    return out


def float_experts(model: Path, out: Path, seed: int) -> Path:
    """A W8A8 set of `model` whose experts stay in float; another seed means other experts."""
    w8a8(model, out, skip=("mlp", "block_sparse_moe"))

    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        random = torch.Generator().manual_seed(seed)
        for name in sorted(tensors):
            if ".experts." in name:
                noise = torch.randn(tensors[name].shape, generator=random) * 0.1
                tensors[name] = noise.to(tensors[name].dtype)

    return edit(out, change)

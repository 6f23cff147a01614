"""The tiny model with biases, in every place where the models that `quantize` takes have some."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# Standard deviations. The float model keeps its sense, and notices each that is lost or doubled:
# without q, k, gate, up or down the perplexity changes by 8 % and more, without v or o the model is
# lost, because o's bias takes back what v's adds.
_SPREADS = {"q": 0.5, "k": 1.0, "v": 0.5, "gate": 0.2, "up": 0.2, "down": 0.1}
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
HEAD, LAYERS = 64, 2


def write_llama(model: Path, out: Path, without: str = "") -> Path:
    """Llama with `attention_bias` and `mlp_bias`; the biases of `without` are zeros."""
    tensors, config = _read(model)
    for name, bias in _biases(tensors).items():
        kind = name.rpartition("_proj.")[0].rpartition(".")[2]
        tensors[name] = torch.zeros_like(bias) if kind == without else bias
    return _write(model, out, tensors, config | {"attention_bias": True, "mlp_bias": True})


def write_qwen2(model: Path, out: Path, key: float = 0.0) -> Path:
    """Qwen2, with biases of q, k and v; `key` is added to the slowest channels of K's.

    All scores of a query change nearly alike by `key`, so the float model hardly does.
    """
    tensors, config = _read(model)
    for name, bias in _biases(tensors).items():
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            tensors[name] = bias
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.self_attn"
        tensors[f"{prefix}.v_proj.bias"] = torch.full((2 * HEAD,), 0.01, dtype=torch.bfloat16)
        k = tensors[f"{prefix}.k_proj.bias"].view(2, HEAD)
        k[:, HEAD // 2 - 1] += key
        k[:, HEAD - 1] -= key
    for other in ("attention_bias", "mlp_bias", "pretraining_tp"):
        config.pop(other)
    named = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return _write(model, out, tensors, config | named | {"use_sliding_window": False})


def _biases(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for kind, spread in _SPREADS.items():
            module = "self_attn" if kind in ATTENTION else "mlp"
            name = f"{prefix}.{module}.{kind}_proj"
            size = tensors[f"{name}.weight"].shape[0]
            found[f"{name}.bias"] = (torch.randn(size, generator=generator) * spread).bfloat16()
        # The weights of attention add up to 1, so a constant value goes through it unchanged.
        v = found[f"{prefix}.self_attn.v_proj.bias"].float().view(2, 1, HEAD)
        o = tensors[f"{prefix}.self_attn.o_proj.weight"].float()
        constant = v.expand(2, o.shape[1] // (2 * HEAD), HEAD).flatten()
        found[f"{prefix}.self_attn.o_proj.bias"] = -(o @ constant).bfloat16()
    return found


def _read(model: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    return load_file(model / "model.safetensors"), json.loads((model / "config.json").read_text())


def _write(
    model: Path, out: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]
) -> Path:
    shutil.copytree(model, out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out

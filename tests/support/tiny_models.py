"""A tiny random model of every class that `quantize` takes, with all that its kind has."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# The window is shorter than the texts of the tests.
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
_EXPERTS = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
_LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "layer_types": ["linear_attention", "full_attention"],
}
MODELS = {
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "MistralForCausalLM": ("MistralConfig", {"sliding_window": None}),
    "Qwen2ForCausalLM": ("Qwen2Config", {}),
    "Qwen3ForCausalLM": ("Qwen3Config", {}),
    "Phi3ForCausalLM": ("Phi3Config", {}),
    "Phi3ForCausalLM, partial rotary": ("Phi3Config", {"partial_rotary_factor": 0.75}),
    "GemmaForCausalLM": ("GemmaConfig", {}),
    "Gemma2ForCausalLM": ("Gemma2Config", _TWO_KINDS),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", _TWO_KINDS),
    "GraniteForCausalLM": (
        "GraniteConfig",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "Olmo2ForCausalLM": ("Olmo2Config", {}),
    "Glm4ForCausalLM": ("Glm4Config", {}),
    "GlmForCausalLM": ("GlmConfig", {}),
    "CohereForCausalLM": ("CohereConfig", {"logit_scale": 1.0}),
    # vLLM's window has a token more than that of transformers, so no text is longer.
    "Cohere2ForCausalLM": (
        "Cohere2Config",
        {"logit_scale": 1.0} | _TWO_KINDS | {"sliding_window": 128},
    ),
    "Ministral3ForCausalLM": ("Ministral3Config", {}),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", _EXPERTS | {"shared_expert_intermediate_size": 64}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", _EXPERTS | {"mlp_only_layers": [1]}),
    "MixtralForCausalLM": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": None}),
    "Qwen3NextForCausalLM": (
        "Qwen3NextConfig",
        _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 64},
    ),
    "Qwen3_5ForCausalLM": ("Qwen3_5TextConfig", _LINEAR),
    "Qwen3_5MoeForCausalLM": (
        "Qwen3_5MoeTextConfig",
        _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 64},
    ),
}
"""Name -> class of the config, and what it has besides the sizes; the class comes first."""


def write(name: str, folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """Write the model `name` in float32, with random norms and biases and a tokenizer's files.

    changes  of its config
    """
    kind, own = MODELS[name]
    config = getattr(transformers, kind)(**_SIZES | own | changes)
    torch.manual_seed(0)
    model = getattr(transformers, name.partition(",")[0])(config)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:  # norms and biases, which are born as ones and zeros
                tensor.add_(torch.randn_like(tensor) * 0.2)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / file, folder / file)
    return folder

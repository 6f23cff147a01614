"""The shapes of well-known models, so that speed is measured without a download.

The sizes are those of the `config.json` that each model's authors publish. Speed depends on nothing
else of a model, so vLLM's dummy weights do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """The sizes of a decoder.

    architecture  the class in transformers and vLLM
    inner         the width of the MLP
    context       the most tokens of a sequence
    experts       the keys of `config.json` that a mixture of experts has besides
    """

    architecture: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    experts: Mapping[str, Any] = MappingProxyType({})

    def config(self) -> dict[str, Any]:
        """Make the `config.json` of the unquantized model in bf16."""
        return {
            "architectures": [self.architecture],
            "model_type": self._type(),
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": 128,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            **self.experts,
        }

    def _type(self) -> str:
        """Spell the architecture as transformers does its `model_type`: Qwen3Moe is qwen3_moe."""
        name = self.architecture.removesuffix("ForCausalLM")
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


_LLAMA, _MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"
_QWEN2, _QWEN3 = "Qwen2ForCausalLM", "Qwen3ForCausalLM"
_MIXTRAL, _QWEN3_MOE = "MixtralForCausalLM", "Qwen3MoeForCausalLM"
_EXPERTS_OF_MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
_EXPERTS_OF_QWEN3 = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
SHAPES = {
    "llama-3-8b": Shape(_LLAMA, 32, 4096, 14336, 32, 8, 128256, 8192),
    "llama-2-7b": Shape(_LLAMA, 32, 4096, 11008, 32, 32, 32000, 4096),
    "mistral-7b": Shape(_MISTRAL, 32, 4096, 14336, 32, 8, 32000, 32768),
    "llama-2-13b": Shape(_LLAMA, 40, 5120, 13824, 40, 40, 32000, 4096),
    "llama-30b": Shape(_LLAMA, 60, 6656, 17920, 52, 52, 32000, 2048),
    "yi-34b": Shape(_LLAMA, 60, 7168, 20480, 56, 8, 64000, 4096),
    "llama-2-70b": Shape(_LLAMA, 80, 8192, 28672, 64, 8, 32000, 4096),
    "qwen1.5-72b": Shape(_QWEN2, 80, 8192, 24576, 64, 64, 152064, 32768),
    "llama-3.1-70b": Shape(_LLAMA, 80, 8192, 28672, 64, 8, 128256, 131072),
    "qwen3-32b": Shape(_QWEN3, 64, 5120, 25600, 64, 8, 151936, 40960),
    "qwen2.5-7b": Shape(_QWEN2, 28, 3584, 18944, 28, 4, 152064, 32768),
    "mixtral-8x7b": Shape(_MIXTRAL, 32, 4096, 14336, 32, 8, 32000, 32768, _EXPERTS_OF_MIXTRAL),
    "qwen3-30b-a3b": Shape(_QWEN3_MOE, 48, 2048, 6144, 32, 4, 151936, 40960, _EXPERTS_OF_QWEN3),
}

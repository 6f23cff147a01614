"""The table of expected tensors, held against the models of transformers."""

import json

import pytest
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from vllm_qoq.errors import FormatError
from vllm_qoq.models.table import ARCHITECTURES, LayerSpec
from vllm_qoq.models.tensors import expected_tensors

SIZES = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
}
BIASED = {"attention_bias": True, "mlp_bias": True}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
HYBRID = {
    **{"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_conv_kernel_dim": 3},
    "layer_types": ["linear_attention", "full_attention"],
}
TEXT = ("Gemma3", "Qwen3_5", "Qwen3_5Moe")  # the config of the language model has another name
CASES = {
    "llama": ("Llama", {}),
    "llama, biases": ("Llama", BIASED),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, other heads": ("Llama", {"head_dim": 24}),
    "mistral": ("Mistral", {"head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, biases": ("Qwen3", {"attention_bias": True, "head_dim": 16}),
    "phi3": ("Phi3", {}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16}),
    "gemma2, untied": ("Gemma2", {"head_dim": 16, "tie_word_embeddings": False}),
    "granite": ("Granite", BIASED),
    "olmo2": ("Olmo2", {}),
    "glm": ("Glm", {"head_dim": 16}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "glm4, without biases": ("Glm4", {"head_dim": 16, "attention_bias": False}),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", {}),
    "ministral3": ("Ministral3", {"head_dim": 16}),
    "gemma3": ("Gemma3", {"head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2 moe": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 40}),
    "qwen2 moe, no biases": (
        "Qwen2Moe",
        MOE | {"shared_expert_intermediate_size": 40, "qkv_bias": False, "mlp_only_layers": [1]},
    ),
    "qwen3 moe": ("Qwen3Moe", MOE | {"head_dim": 16}),
    "qwen3 moe, some dense": ("Qwen3Moe", MOE | {"num_hidden_layers": 4, "mlp_only_layers": [1]}),
    "qwen3 next": ("Qwen3Next", HYBRID | MOE | {"shared_expert_intermediate_size": 40}),
    "qwen3 next, some dense": (
        "Qwen3Next",
        HYBRID
        | MOE
        | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]}
        | {"layer_types": ["full_attention", "linear_attention"]},
    ),
    "qwen3.5": ("Qwen3_5", HYBRID),
    "qwen3.5, tied": ("Qwen3_5", HYBRID | {"tie_word_embeddings": True}),
    "qwen3.5 moe": ("Qwen3_5Moe", HYBRID | MOE | {"shared_expert_intermediate_size": 40}),
    "qwen3 moe, every other": ("Qwen3Moe", MOE | {"decoder_sparse_step": 2}),
}


@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES)
def test_the_table_has_what_transformers_saves(tmp_path, family, changes):
    name = f"{family}{'Text' if family in TEXT else ''}Config"
    config = getattr(transformers, name)(**(SIZES | changes))
    config.architectures = [f"{family}ForCausalLM"]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    saved = {}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for tensor in file.keys():  # noqa: SIM118 - not a mapping
            saved[tensor] = tuple(file.get_slice(tensor).get_shape())
    expected = expected_tensors(json.loads((tmp_path / "config.json").read_text()))
    assert dict(expected) == saved
    assert len(expected) == len(saved) and all(expected[name] == saved[name] for name in saved)


def test_every_architecture_is_tried():
    assert {f"{family}ForCausalLM" for family, _ in CASES.values()} == set(ARCHITECTURES)


LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"]}
REFUSED = {
    "hidden_size": (None, "32", -1, 0, 1.5, True, [32], 1 << 40, 34),
    "num_hidden_layers": (None, "2", -1, 0, 1_000_000, {}),
    "num_attention_heads": (None, 0, "4", 3, 5),
    "num_key_value_heads": (0, -2, 3, "2"),
    "vocab_size": (None, 0, "many"),
    "head_dim": (0, "16"),
    "architectures": (None, [], [5], "LlamaForCausalLM", ["Unknown"], ["LlamaForCausalLM"] * 2),
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values]
)
def test_a_key_that_cannot_be_is_named(key, value):
    with pytest.raises(FormatError, match=key):
        expected_tensors(LLAMA | {key: value})


def test_a_bias_may_be_on_by_default():
    layer, on = LayerSpec(("hidden",), ("attention_bias",)), {"attention_bias": True}
    assert layer.has_bias({}, on) and layer.has_bias({"attention_bias": True}, {})
    assert not layer.has_bias({}, {}) and not layer.has_bias({"attention_bias": False}, on)

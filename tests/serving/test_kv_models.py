"""Models whose attention is not alike in all layers, over a quantized cache in vLLM on the CPU.

Each is a small random model of the real class, beside vLLM's own cache of 16 bits.
"""

import shutil
from functools import cache

import pytest
import torch
from engines import PROMPTS, engine, generate, largest_gap
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Qwen3NextConfig,
)

from vllm_qoq.bench.perplexity import text_perplexity

# Prompts in pieces of 16 tokens, whose history is quantized, as generated tokens' history is.
CHUNKED = {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}
SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MODELS = {
    # Capped scores; a window in every second layer.
    "gemma2": Gemma2Config(
        **SIZES,
        **{"intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64, "sliding_window": 32},
        query_pre_attn_scalar=16,
        attn_logit_softcapping=1.5,
    ),
    # Full attention in one of six layers.
    "gemma3": Gemma3TextConfig(
        **SIZES,
        **{"intermediate_size": 256, "num_hidden_layers": 6, "head_dim": 64, "sliding_window": 32},
        query_pre_attn_scalar=16,
    ),
    # Attention sinks; a window in every second layer.
    "gpt-oss": GptOssConfig(
        **SIZES,
        **{"intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 64, "sliding_window": 32},
        num_local_experts=2,
        num_experts_per_tok=2,
    ),
    # Linear attention in three of four layers, heads of 256.
    "qwen3-next": Qwen3NextConfig(
        **SIZES,
        **{"intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 256},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
        **{"linear_key_head_dim": 64, "linear_value_head_dim": 64},
        **{"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        shared_expert_intermediate_size=64,
    ),
}


@pytest.fixture(scope="module")
def measure(tiny_model, heldout_text, tmp_path_factory):
    """`measure(MODEL, BITS)`: what an engine with a cache of 4, 8 or 16 bits gives, once."""
    prompts = tuple(prompt * 6 for prompt in PROMPTS)
    text = heldout_text.read_text()[:1500]

    @cache
    def write(name):
        folder = tmp_path_factory.mktemp("kv-models") / name
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(MODELS[name])
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.data.normal_(mean=12)  # as large as scores
        model.to(torch.bfloat16).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tiny_model / file, folder / file)
        return folder

    @cache
    def measured(name, bits):
        qoq = {} if bits == 16 else {"kv_bits": bits}
        options = {} if bits == 16 else {"quantization": "qoq", **CHUNKED}
        llm = engine(write(name), qoq, dtype="bfloat16", **options)
        return generate(llm, prompts), text_perplexity(llm, text, 256)["perplexity"]

    return measured


@pytest.mark.parametrize(
    ("name", "bits", "off"),
    [
        ("qwen3-next", 8, 0.002),
        ("qwen3-next", 4, 0.005),
        ("gpt-oss", 8, 0.005),
        ("gemma2", 8, 0.002),
        ("gemma3", 4, 0.04),
    ],
)
def test_it_is_served_as_with_vllms_own_cache(measure, name, bits, off):
    expected, plain = measure(name, 16)
    found, ours = measure(name, bits)
    assert ours == pytest.approx(plain, rel=off)
    assert ours != plain
    if bits == 8:
        assert largest_gap(found, expected) < 0.2

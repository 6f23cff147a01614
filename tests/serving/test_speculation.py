"""Speculative decoding with routed weights and a quantized KV cache, in vLLM on the CPU.

vLLM's second model runner needs Triton, so that it runs on GPUs alone (tests/gpu).
"""

import json
from types import SimpleNamespace

import pytest
import torch
from engines import engine, generate
from safetensors.torch import load_file, save_file

import vllm_qoq
from vllm_qoq.errors import UserError
from vllm_qoq.serving.speculation import check_speculation

# Longer than what a request verifies, and such that n-grams repeat.
PROMPTS = (
    "def f(a):\n    return a\n\ndef g(a):\n    return a\n\ndef h(a):\n    return",
    "import os\nimport sys\nimport os\nimport",
    "for i in range(10):\n    print(i)\nfor i in range(10):\n   ",
    "# The quick brown fox jumps",
)
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


def accepted(llm):
    """How many speculated tokens turned out right."""
    name = "vllm:spec_decode_num_accepted_tokens"
    (metric,) = (metric for metric in llm.get_metrics() if metric.name == name)
    return metric.value


def plain(checkpoint, bits):
    return generate(engine(checkpoint, {"kv_bits": bits}), PROMPTS, max_tokens=24)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_what_is_verified_is_what_would_be_generated(nested_dir, bits):
    """Tokens and log-probabilities to the bit: keys of verified tokens are read from the pages."""
    options = {"speculative_config": NGRAM, "disable_log_stats": False}
    llm = engine(nested_dir, {"kv_bits": bits}, **options)
    assert generate(llm, PROMPTS, max_tokens=24) == plain(nested_dir, bits)
    assert accepted(llm) > 20
    # Steps that verify run in the set that generates.
    steps = vllm_qoq.step_counts(llm)
    assert steps["prefill", "w8a8"] == 1 and steps["decode", "w4a8"] < 24
    assert steps["decode", "w8a8"] == steps["prefill", "w4a8"] == 0


def test_a_draft_model_may_be_routed_and_have_a_quantized_cache(nested_dir, tmp_path):
    """The model drafts for itself, and is right but for the tokens that prefill sets make."""
    trace, draft = tmp_path / "steps.jsonl", str(nested_dir)
    speculative = {"method": "draft_model", "model": draft, "num_speculative_tokens": 3}
    options = {"speculative_config": speculative, "disable_log_stats": False}
    llm = engine(nested_dir, {"kv_bits": 4, "trace": str(trace)}, **options)
    assert generate(llm, PROMPTS, max_tokens=24) == plain(nested_dir, 4)
    assert accepted(llm) > 60
    # Of both models: only a prompt is a prefill step, not the first step of a draft, in which a
    # request has one token more than in a step that verifies.
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [step["phase"] for step in steps].count("prefill") == 2
    assert max(step["num_tokens"] for step in steps if step["phase"] == "decode") == 20


@pytest.fixture
def eagle_head(tiny_model, tmp_path):
    """A float head for EAGLE that is the model's last layer behind the sum of its two inputs."""
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    weights = load_file(tiny_model / "model.safetensors")
    last = "model.layers.1."
    head = {f"layers.0.{k.removeprefix(last)}": v for k, v in weights.items() if last in k}
    del head["layers.0.input_layernorm.weight"]  # EAGLE's first layer has none
    head["fc.weight"] = torch.eye(config["hidden_size"]).repeat(1, 2).bfloat16()
    save_file(head, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def test_a_float_head_drafts_from_hidden_states_that_are_not_rotated(nested_dir, eagle_head):
    """Its cache has 16 bits beside the model's 4; a rotated checkpoint refuses it."""
    speculative = {"method": "eagle", "model": str(eagle_head), "num_speculative_tokens": 3}
    options = {"speculative_config": speculative, "disable_log_stats": False}
    llm = engine(nested_dir, {"kv_bits": 4}, **options)
    assert generate(llm, PROMPTS, max_tokens=24) == plain(nested_dir, 4)
    assert accepted(llm) > 0


def test_hybrids_are_refused_where_vllm_answers_wrongly():
    """On a CPU, for the float model, too: what was rejected stays in the state."""
    model = SimpleNamespace(model="MODEL", is_hybrid=True)
    config = SimpleNamespace(speculative_config=None, model_config=model)
    check_speculation(config)
    config.speculative_config = object()
    with pytest.raises(UserError, match=r"wrong answers to MODEL.*leave it out"):
        check_speculation(config)
    model.is_hybrid = False
    check_speculation(config)

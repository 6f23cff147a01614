"""Speculative decoding with routed weights and a quantized KV cache, in vLLM on the CPU.

vLLM's second model runner needs Triton, so that it runs on GPUs alone (tests/gpu).
"""

import json
from types import SimpleNamespace

import pytest
import torch
from engines import TRACED, engine, generate
from rotated_models import Original, write_rotated
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

import vllm_qoq
from vllm_qoq.errors import UserError
from vllm_qoq.serving.kv.backend import QuantizedKVBackend
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
    """Its cache has 16 bits beside the model's 4."""
    speculative = {"method": "eagle", "model": str(eagle_head), "num_speculative_tokens": 3}
    options = {"speculative_config": speculative, "disable_log_stats": False}
    llm = engine(nested_dir, {"kv_bits": 4}, **options)
    assert generate(llm, PROMPTS, max_tokens=24) == plain(nested_dir, 4)
    assert accepted(llm) > 0


@pytest.fixture(scope="module")
def rotated(tiny_model, tmp_path_factory):
    return write_rotated(tiny_model, tmp_path_factory.mktemp("rotated") / "rotated")


@pytest.fixture(scope="module")
def original(tiny_model, heldout_text):
    return Original(tiny_model, heldout_text.read_text())


@pytest.mark.skipif(not current_platform.is_cpu(), reason="tests/gpu has it for GPUs")
@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp"])
def test_heads_of_the_original_model_draft_for_a_rotated_one(rotated, original, tmp_path, method):
    """What they take, share and draft is what it would be beside the original model."""
    head = original.write(method, tmp_path / "head")
    count = 1 if method == "mtp" else 3
    speculative = {"method": method, "model": str(head), "num_speculative_tokens": count}
    options = {"speculative_config": speculative, "disable_log_stats": False}
    if method == "eagle":
        options |= TRACED
    if method == "mtp":
        # A layer of Llama, with which heads of Ernie are built: their config is the model's own.
        options["hf_overrides"] = {"num_nextn_predict_layers": 1}
    llm = engine(rotated, {"kv_bits": 4}, **options)
    drafter = llm.llm_engine.model_executor.driver_worker.model_runner.drafter
    caches = [m.attn_backend for m in drafter.model.modules() if isinstance(m, Attention)]
    assert caches and not any(issubclass(cache, QuantizedKVBackend) for cache in caches)
    seen = []
    hook = drafter.model.register_forward_hook(
        lambda module, _, kwargs, output: seen.append((kwargs["hidden_states"].clone(), output)),
        with_kwargs=True,
    )
    tokens = original.tokens[0].tolist()
    llm.generate([{"prompt_token_ids": tokens}], SamplingParams(max_tokens=1), use_tqdm=False)
    hook.remove()

    states, output = seen[0]
    drafted = output[0] if isinstance(output, tuple) else output
    states, drafted = (part[: len(tokens)].double() for part in (states, drafted))
    rows = drafter.model.model.embed_tokens(torch.arange(len(original.embedding)))
    logits = drafter.model.compute_logits(drafted.bfloat16())
    assert apart(rows, original.embedding) < 0.01  # of bf16 alone
    assert apart(logits, drafted @ original.lm_head.T) < 0.01
    taken, made = (part[0] for part in original.expected[method])
    assert apart(states, taken) < 0.1  # of the model's 8 bits
    agree = logits[:-1].argmax(-1) == (made @ original.lm_head.T).argmax(-1)
    assert agree.double().mean() > 0.85

    assert generate(llm, PROMPTS, max_tokens=24) == plain(rotated, 4)
    assert accepted(llm) > 10


@pytest.mark.skipif(not current_platform.is_cpu(), reason="not tried on a GPU")
def test_heads_of_medusa_take_the_states_of_the_original_model(rotated, original, tmp_path):
    head = original.write("medusa", tmp_path / "head")
    speculative = {"method": "medusa", "model": str(head), "num_speculative_tokens": 3}
    options = {"speculative_config": speculative, "disable_log_stats": False}
    llm = engine(rotated, {"kv_bits": 4}, **options)
    drafter, seen = llm.llm_engine.model_executor.driver_worker.model_runner.drafter, []
    hook = drafter.model.register_forward_pre_hook(lambda _, taken: seen.append(*taken))
    tokens = original.tokens[0].tolist()
    llm.generate([{"prompt_token_ids": tokens}], SamplingParams(max_tokens=2), use_tqdm=False)
    hook.remove()
    assert apart(seen[0][0], original.last[0, -1]) < 0.1
    assert generate(llm, PROMPTS, max_tokens=24) == plain(rotated, 4)
    assert accepted(llm) > 10


def apart(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def test_hybrids_are_refused_where_vllm_answers_wrongly():
    """On a CPU, for the float model, too: what was rejected stays in the state."""
    model = SimpleNamespace(model="MODEL", is_hybrid=True)
    config = SimpleNamespace(speculative_config=None, model_config=model)
    check_speculation(config)
    config.speculative_config = SimpleNamespace(method="ngram")
    with pytest.raises(UserError, match=r"wrong answers to MODEL.*leave it out"):
        check_speculation(config)
    model.is_hybrid = False
    check_speculation(config)

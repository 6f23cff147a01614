"""The quantized KV cache in vLLM on a GPU: graphs, both model runners, prompts in pieces."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from engine_process import EAGER, GRAPHS, run_engines
from engines import largest_gap
from safetensors.torch import load_file, save_file

from vllm_qoq import ops
from vllm_qoq.numerics.kv_layout import slot_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ops.has_kernels("cuda"), reason="this build has no CUDA kernels (VLLM_QOQ_CUDA=1)"
    ),
]

HEAD, KV_HEADS, LAYERS = 64, 2, 2  # tests/data/tiny-llama
MODEL = {"quantization": "qoq"}  # it has no section, only its cache is quantized
# Prompts in pieces of 16 tokens, whose history is quantized, as generated tokens' history is.
CHUNKED = {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}


def spec(model, bits, options, **more):
    return {
        "checkpoint": str(model),
        "qoq": {"kv_bits": bits},
        "options": MODEL | options,
        **more,
    }


@pytest.mark.parametrize("bits", [4, "k8v4"])
def test_graphs_equal_eager(runner, tiny_model, tmp_path, bits):
    specs = [spec(tiny_model, bits, options, max_tokens=40) for options in (EAGER, GRAPHS)]
    eager, graphs = run_engines(tmp_path, specs, **runner)
    assert graphs["generation"] == eager["generation"]


V2_NGRAM = "vllm.v1.worker.gpu.spec_decode.ngram"
REPEATING = (
    "def f(a):\n    return a\n\ndef g(a):\n    return a\n\ndef h(a):\n    return",
    "import os\nimport sys\nimport os\nimport",
    "for i in range(10):\n    print(i)\nfor i in range(10):\n   ",
)


@pytest.mark.parametrize("bits", [4, 8, "k8v4"])
def test_what_is_verified_is_what_would_be_generated(runner, tiny_model, tmp_path, bits):
    """But for rounding: in graphs and without them, with n-grams and with the model as a draft."""
    if runner["VLLM_USE_V2_MODEL_RUNNER"] == "1" and find_spec(V2_NGRAM) is None:
        pytest.skip("the second model runner of this vLLM has neither n-grams nor draft models")
    ngram = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    draft = {"method": "draft_model", "model": str(tiny_model)}
    counted = {"disable_log_stats": False}
    speculating = [
        options | counted | {"speculative_config": method | {"num_speculative_tokens": 3}}
        for options in (EAGER, GRAPHS)
        for method in (ngram, draft)
    ]
    more = {"prompts": list(REPEATING), "max_tokens": 60}
    specs = [spec(tiny_model, bits, options, **more) for options in (EAGER, *speculating)]
    plain, *results = run_engines(tmp_path, specs, **runner)
    for result in results:
        assert result["accepted"] > 30
        assert largest_gap(result["generation"], plain["generation"]) < 0.3


def test_thousands_of_steps_with_preemption_equal_fresh_runs(runner, tiny_model, tmp_path):
    """64 requests of 300 tokens, 8 at a time in a pool for 5."""
    room = 1500 * LAYERS * KV_HEADS * slot_bytes(HEAD, 8)
    crowded = EAGER | {"kv_cache_memory_bytes": room, "disable_log_stats": False}
    more = {"prompts": [f"def f{i}(a, b):\n    " for i in range(64)], "max_tokens": 300}
    specs = [spec(tiny_model, 8, crowded | {"seed": seed}, **more) for seed in (0, 1)]
    specs.append(spec(tiny_model, 8, EAGER | {"disable_log_stats": False}, **more))
    first, second, roomy = run_engines(tmp_path, specs, **runner)
    assert first["preemptions"] > 20 and roomy["preemptions"] == 0
    assert first["generation"] == second["generation"]
    # What was generated before a preemption is computed again as a prompt, whose own keys and
    # values are not quantized, and batches of other sizes round in other orders.
    assert largest_gap(first["generation"], roomy["generation"]) < 0.3


def test_perplexity_over_quantized_history(tiny_model, heldout_text, tmp_path):
    text = heldout_text.read_text()[:8000]
    specs = [
        spec(tiny_model, bits, EAGER | options, text=text)
        for bits, options in ((8, {}), (8, CHUNKED), ("k8v4", CHUNKED), (4, CHUNKED))
    ]
    whole, eight, mixed, four = run_engines(tmp_path, specs)
    assert eight["perplexity"] == pytest.approx(whole["perplexity"], rel=0.003)
    assert four["perplexity"] == pytest.approx(whole["perplexity"], rel=0.025)
    assert four["perplexity"] > whole["perplexity"] * 1.001
    assert mixed["perplexity"] == pytest.approx(whole["perplexity"], rel=0.025)
    assert len({run["perplexity"] for run in (eight, mixed, four)}) == 3
    # The pool of 64 MiB, by vLLM's count.
    for result, bits in ((eight, 8), (mixed, "k8v4"), (four, 4)):
        bytes_per_token = LAYERS * KV_HEADS * slot_bytes(HEAD, bits)
        assert result["cache_tokens"] == pytest.approx((64 << 20) / bytes_per_token, rel=0.01)


def test_a_mean_of_k_is_left_out_of_all_keys_that_a_softmax_sees(
    tiny_model, heldout_text, tmp_path
):
    """Those of the pages and those of the piece that runs; any numbers will do for a mean."""
    folder = tmp_path / "with_means"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "qoq",
        "kv_cache": {"bits": 8, "k_mean": True},
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        mean = 2 * torch.randn(KV_HEADS, HEAD, generator=random)
        weights[f"model.layers.{layer}.self_attn.k_mean"] = mean
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    text = heldout_text.read_text()[:8000]
    specs = [
        spec(model, 8, EAGER | CHUNKED, text=text, max_tokens=40) for model in (tiny_model, folder)
    ]
    without, subtracted = run_engines(tmp_path, specs)
    assert subtracted["perplexity"] == pytest.approx(without["perplexity"], rel=0.01)
    # It was subtracted: the codes are of other numbers.
    assert subtracted["perplexity"] != without["perplexity"]


def test_pages_that_were_offloaded_come_back_to_the_bit(runner, tiny_model, tmp_path):
    """To the memory of the host, by vLLM's own connector; tails that fill no block are not kept.

    A prompt whose blocks all come back has its last token computed again, so these have a tail.
    """
    block = 64
    options = EAGER | {"kv_offloading_size": 0.25, "block_size": block}
    prompts = [f"def f{i}(a, b, c):\n    return a + b\n" * 21 for i in range(3)]
    (found,) = run_engines(
        tmp_path,
        [spec(tiny_model, 4, options, prompts=prompts, max_tokens=8, forget=True)],
        **runner,
    )
    before, after = map(set, found["pages"])
    assert all(tokens >= 2 * block and tokens % block == 0 for tokens in found["kept"])
    assert len(before & after) >= sum(found["kept"]) // block * LAYERS

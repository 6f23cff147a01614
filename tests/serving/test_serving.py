"""End to end in vLLM on the CPU: a forced set is the single-set checkpoint, to the bit."""

import json

import pytest
import torch
from cpu_kernels import HAS_WNA16, needs_wna16
from engine_process import run_engines
from engines import PROMPTS, engine, generate, largest_gap

import vllm_qoq
from vllm_qoq.bench.perplexity import text_perplexity

# Where a set carries an input_ratio, its input is rounded to bf16 once more.
BF16_ROUNDING = 0.15


def test_forced_prefill_set_equals_its_single_set_checkpoint(w8a8_dir, merged_dir):
    assert generate(engine(merged_dir, {"force_set": "w8a8"})) == generate(engine(w8a8_dir))


@needs_wna16
def test_forced_decode_set_equals_its_single_set_checkpoint(w4a16_dir, merged_for_w4a16_dir):
    forced = engine(merged_for_w4a16_dir, {"force_set": "w4a16"})
    assert generate(forced) == generate(engine(w4a16_dir))


@needs_wna16
def test_input_ratio_makes_up_for_another_norm(w4a16_dir, w8a8_dir, merged_dir):
    single = generate(engine(w4a16_dir))
    with_ratio = generate(engine(merged_dir, {"force_set": "w4a16"}))
    other_set = generate(engine(w8a8_dir))
    assert largest_gap(single, with_ratio) < BF16_ROUNDING
    # The bound separates: another quantization of the same model is farther away.
    assert largest_gap(single, other_set) > BF16_ROUNDING


def test_steps_are_routed_by_phase_and_batch(two_sets_dir, tmp_path):
    trace = tmp_path / "trace.jsonl"
    llm = engine(two_sets_dir, {"trace": str(trace)})
    before = vllm_qoq.step_counts(llm)
    generate(llm, PROMPTS[:3], max_tokens=12)
    generate(llm, tuple(f"{prompt} # {i}" for prompt in PROMPTS for i in (1, 2)), max_tokens=3)
    counts = {key: n - before[key] for key, n in vllm_qoq.step_counts(llm).items()}
    assert counts == {
        ("prefill", "w8a8"): 2,
        ("prefill", "w4a8"): 0,
        ("decode", "w4a8"): 11,
        ("decode", "w8a8"): 2,
    }
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [(s["phase"], s["set"], s["num_tokens"]) for s in steps[1:12]] == [
        ("decode", "w4a8", 3)
    ] * 11
    assert [(s["phase"], s["set"], s["num_tokens"]) for s in steps[-2:]] == [
        ("decode", "w8a8", 8)
    ] * 2


def test_routed_run_begins_like_the_prefill_set(merged_dir, w8a8_dir):
    """The first token comes out of the prompt's step, so it is exactly the prefill set's."""
    routed = generate(engine(merged_dir, {"trace": "/dev/null"}), max_tokens=1)
    assert routed == generate(engine(w8a8_dir), max_tokens=1)


def test_layer_rules_move_single_layers(two_sets_dir, w8a8_dir):
    everything = {
        "prefill": "w8a8",
        "decode": "w4a8",
        "layers": [{"match": "*", "decode": "w8a8"}],
    }
    moved = generate(engine(two_sets_dir, {"routing": everything}))
    assert moved == generate(engine(w8a8_dir))
    one = {
        "prefill": "w8a8",
        "decode": "w4a8",
        "layers": [{"match": "*.0.mlp.*", "decode": "w8a8"}],
    }
    partly = generate(engine(two_sets_dir, {"routing": one}))
    assert partly != moved


def test_chunked_prefill_and_mixed_steps_equal_the_single_set(merged_dir, w8a8_dir, tmp_path):
    options = {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}
    prompts = tuple(f"class C{i}:\n    def method(self, argument):\n        " for i in range(6))
    trace = tmp_path / "trace.jsonl"
    forced = engine(merged_dir, {"force_set": "w8a8", "trace": str(trace)}, **options)
    assert generate(forced, prompts) == generate(engine(w8a8_dir, **options), prompts)
    sizes = [json.loads(line)["num_tokens"] for line in trace.read_text().splitlines()]
    assert max(sizes) == 16 and sizes.count(16) > 3, "the prompts were not chunked"


def test_prefix_caching_reuses_the_cache_across_sets(merged_dir, w8a8_dir):
    prefix = "import os\n" * 40
    prompts = tuple(prefix + tail for tail in ("def first():", "def second():"))
    routed, single = engine(merged_dir, {"force_set": "w8a8"}), engine(w8a8_dir)
    for prompt in prompts:  # one after the other, so that the second finds the first's pages
        assert generate(routed, (prompt,)) == generate(single, (prompt,))
    sampling_output = routed.generate([prefix + "def third():"], use_tqdm=False)[0]
    assert sampling_output.num_cached_tokens > 0


def test_compiled_equals_compiled_single_set(merged_dir, w8a8_dir):
    compiled = {"enforce_eager": False}
    w8a8 = engine(merged_dir, {"force_set": "w8a8"}, **compiled)
    assert generate(w8a8) == generate(engine(w8a8_dir, **compiled))


@needs_wna16
def test_compiled_equals_compiled_single_set_of_four_bits(merged_for_w4a16_dir, w4a16_dir):
    compiled = {"enforce_eager": False}
    w4a16 = engine(merged_for_w4a16_dir, {"force_set": "w4a16"}, **compiled)
    assert generate(w4a16) == generate(engine(w4a16_dir, **compiled))


def test_compiled_model_still_routes(two_sets_dir):
    """A branch outside the opaque op would be frozen to the profiling run's set."""
    llm = engine(two_sets_dir, enforce_eager=False)
    before = vllm_qoq.step_counts(llm)
    generate(llm, PROMPTS[:2], max_tokens=5)
    counts = {key: n - before[key] for key, n in vllm_qoq.step_counts(llm).items()}
    assert counts[("prefill", "w8a8")] == 1 and counts[("decode", "w4a8")] == 4
    assert sum(counts.values()) == 5


@pytest.mark.parametrize("force_set", ["w8a8", "w4a16"])
def test_a_forced_set_is_the_only_one_in_memory(merged_dir, w8a8_dir, w4a16_dir, force_set):
    """One checkpoint serves prefill-only and decode-only instances."""
    single = engine({"w8a8": w8a8_dir, "w4a16": w4a16_dir}[force_set])
    forced = engine(merged_dir, {"force_set": force_set})
    both = engine(merged_dir, {"trace": "/dev/null"})
    used, alone, all_sets = (llm.apply_model(_parameter_bytes)[0] for llm in (forced, single, both))
    ratios = 2 * 2 * 256 * 4 if force_set == "w4a16" else 0  # layers x norms x channels x float32
    assert used == alone + ratios
    assert all_sets > used


def _parameter_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def test_explicit_flexquant_class_equals_the_hook(merged_dir):
    explicit = engine(
        merged_dir,
        {"force_set": "w8a8"},
        hf_overrides={"architectures": ["FlexQuantLlamaForCausalLM"]},
    )
    assert generate(explicit) == generate(engine(merged_dir, {"force_set": "w8a8"}))


@pytest.fixture(scope="module")
def measured(heldout_text):
    """A function that measures the perplexity of a checkpoint, of one set where it is named."""
    text = heldout_text.read_text()[:20_000]

    def measure(checkpoint, force_set=None):
        qoq = {"force_set": force_set} if force_set else None
        return text_perplexity(engine(checkpoint, qoq), text, 256)["perplexity"]

    return measure


def test_perplexity_of_sets_and_checkpoints_agree(tiny_model, w8a8_dir, merged_dir, measured):
    base, w8a8 = measured(tiny_model), measured(w8a8_dir)
    assert 5 < base < 20, "the fixture is a trained model"
    assert measured(merged_dir, "w8a8") == w8a8 < base * 1.02


@needs_wna16
def test_perplexity_of_four_bits_agrees(tiny_model, w4a16_dir, merged_dir, measured):
    base, w4a16 = measured(tiny_model), measured(w4a16_dir)
    assert measured(merged_dir, "w4a16") == pytest.approx(w4a16, rel=0.003)
    assert base < w4a16 < base * 1.08


def test_tensor_parallel_equals_the_single_set(
    merged_dir, merged_for_w4a16_dir, w8a8_dir, w4a16_dir, two_sets_dir, tmp_path
):
    options = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 32 << 20}
    specs = [
        {"checkpoint": str(w8a8_dir)},
        {"checkpoint": str(merged_dir), "qoq": {"force_set": "w8a8"}},
        {"checkpoint": str(merged_dir), "qoq": {"force_set": "w8a8", "kv_bits": 8}},
        {"checkpoint": str(two_sets_dir)},
    ]
    if HAS_WNA16:
        specs += [
            {"checkpoint": str(w4a16_dir)},
            {"checkpoint": str(merged_for_w4a16_dir), "qoq": {"force_set": "w4a16"}},
        ]
    results = run_engines(
        tmp_path,
        [spec | {"options": options} for spec in specs],
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    w8a8, forced, small_cache, routed, *w4a16 = (result["generation"] for result in results)
    assert forced == w8a8
    assert all(generation == w4a16[0] for generation in w4a16)
    assert [g[0][0] for g in routed] == [g[0][0] for g in w8a8]
    assert small_cache != w8a8 and largest_gap(small_cache, w8a8) < 2 * BF16_ROUNDING
    # Only the first rank counts, in a process of its own, and the front end reads it.
    assert results[3]["counts"] == {
        "prefill w8a8": 1,
        "prefill w4a8": 0,
        "decode w8a8": 0,
        "decode w4a8": 11,
    }

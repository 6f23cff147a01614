"""QoQ sets on a GPU: the kernels inside vLLM, its graphs and both of its model runners."""

import pytest
import torch
from engine_process import DEFAULT, EAGER, GRAPHS, run_engines
from qoq_checkpoints import write_dequantized

from vllm_qoq import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ops.has_kernels("cuda"), reason="this build has no CUDA kernels (VLLM_QOQ_CUDA=1)"
    ),
]


def test_graphs_equal_eager(runner, w4a8_dir, w4a8_per_channel_dir, tmp_path):
    specs = [
        {"checkpoint": str(folder), "options": options}
        for folder in (w4a8_dir, w4a8_per_channel_dir)
        for options in (EAGER, GRAPHS)
    ]
    eager, graphs, eager_per_channel, graphs_per_channel = run_engines(tmp_path, specs, **runner)
    assert graphs["generation"] == eager["generation"]
    assert graphs_per_channel["generation"] == eager_per_channel["generation"]


def test_perplexity_is_that_of_the_dequantized_weights(
    tiny_model, w4a8_dir, heldout_text, tmp_path
):
    dequantized = write_dequantized(tiny_model, tmp_path / "dequantized")
    text = heldout_text.read_text()[:20_000]
    specs = [
        {"checkpoint": str(folder), "options": DEFAULT, "text": text}
        for folder in (dequantized, w4a8_dir)
    ]
    rounded, w4a8 = run_engines(tmp_path, specs)
    # What is left is int8 activations.
    assert w4a8["perplexity"] == pytest.approx(rounded["perplexity"], rel=0.005)


def test_prompts_and_generation_use_their_sets_in_full_graphs(runner, two_sets_dir, tmp_path):
    trace = str(tmp_path / "trace.jsonl")
    specs = [{"checkpoint": str(two_sets_dir), "options": DEFAULT, "qoq": {"trace": trace}}]
    (routed,) = run_engines(tmp_path, specs, **runner)
    assert routed["counts"] == {
        "prefill w8a8": 1,
        "prefill w4a8": 0,
        "decode w8a8": 0,
        "decode w4a8": 11,
    }
    assert routed["traced"] <= 1, "decode steps left the graphs"


def test_both_planes_of_a_nested_set(runner, nested_dir, heldout_text, tmp_path):
    text = heldout_text.read_text()[:20_000]
    specs = [
        {"checkpoint": str(nested_dir), "options": EAGER, "text": text},
        {"checkpoint": str(nested_dir), "options": GRAPHS},
        {
            "checkpoint": str(nested_dir),
            "options": EAGER,
            "qoq": {"force_set": "w4a8"},
            "text": text,
        },
    ]
    eager, graphs, four = run_engines(tmp_path, specs, **runner)
    assert eager["counts"]["prefill w8a8"] == 1 and eager["counts"]["decode w4a8"] == 11
    assert graphs["generation"] == eager["generation"]
    # Prompts are in 8 bits.
    assert eager["perplexity"] < 0.99 * four["perplexity"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensor_parallel_has_the_same_perplexity(w4a8_dir, heldout_text, tmp_path):
    text = heldout_text.read_text()[:20_000]
    specs = [
        {
            "checkpoint": str(w4a8_dir),
            "options": DEFAULT | {"tensor_parallel_size": size},
            "text": text,
        }
        for size in (1, 2)
    ]
    # A process each: vLLM forks its workers, which CUDA in the parent does not survive.
    one, two = (run_engines(tmp_path, [spec])[0] for spec in specs)
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=0.002)

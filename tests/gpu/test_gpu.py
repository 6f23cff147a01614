"""On a GPU: CUDA graphs, torch.compile and both of vLLM's model runners."""

import pytest
import torch
from engine_process import DEFAULT, EAGER, GRAPHS, run_engines

pytestmark = pytest.mark.gpu


def test_forced_sets_equal_single_sets_and_decode_replays_full_graphs(
    runner, w8a8_dir, w4a16_dir, merged_dir, merged_for_w4a16_dir, tmp_path
):
    trace = str(tmp_path / "trace.jsonl")
    specs = [
        {"checkpoint": str(w8a8_dir)},
        {"checkpoint": str(merged_dir), "qoq": {"force_set": "w8a8"}},
        {"checkpoint": str(w4a16_dir)},
        {"checkpoint": str(merged_for_w4a16_dir), "qoq": {"force_set": "w4a16"}},
        {"checkpoint": str(merged_dir), "qoq": {"trace": trace}},
    ]
    results = run_engines(tmp_path, [spec | {"options": DEFAULT} for spec in specs], **runner)
    w8a8, forced_w8a8, w4a16, forced_w4a16, routed = results
    assert forced_w8a8["generation"] == w8a8["generation"]
    assert forced_w4a16["generation"] == w4a16["generation"]
    # Every step counted itself, and none entered Python: the graphs hold the right set.
    assert routed["counts"] == {
        "prefill w8a8": 1,
        "prefill w4a16": 0,
        "decode w8a8": 0,
        "decode w4a16": 11,
    }
    assert routed["traced"] <= 1, "decode steps left the graphs"


@pytest.mark.parametrize("force_set", ["w8a8", "w4a16"])
def test_graphs_equal_eager(runner, merged_dir, force_set, tmp_path):
    specs = [
        {"checkpoint": str(merged_dir), "qoq": {"force_set": force_set}, "options": options}
        for options in (EAGER, GRAPHS)
    ]
    eager, graphs = run_engines(tmp_path, specs, **runner)
    assert graphs["counts"] == eager["counts"]
    assert graphs["generation"] == eager["generation"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensor_parallel_equals_the_single_set(
    w8a8_dir, w4a16_dir, merged_dir, merged_for_w4a16_dir, tmp_path
):
    options = DEFAULT | {"tensor_parallel_size": 2}
    specs = [
        {"checkpoint": str(w8a8_dir)},
        {"checkpoint": str(merged_dir), "qoq": {"force_set": "w8a8"}},
        {"checkpoint": str(w4a16_dir)},
        {"checkpoint": str(merged_for_w4a16_dir), "qoq": {"force_set": "w4a16"}},
        {"checkpoint": str(merged_dir)},
    ]
    results = run_engines(tmp_path, [spec | {"options": options} for spec in specs])
    w8a8, forced_w8a8, w4a16, forced_w4a16, routed = results
    assert forced_w8a8["generation"] == w8a8["generation"]
    assert forced_w4a16["generation"] == w4a16["generation"]
    assert routed["counts"] == {
        "prefill w8a8": 1,
        "prefill w4a16": 0,
        "decode w8a8": 0,
        "decode w4a16": 11,
    }

"""QoQ sets on a GPU: the kernels inside vLLM, its graphs and both of its model runners."""

import math

import pytest
import torch
from engine_process import DEFAULT, EAGER, GRAPHS, run_engines
from engines import engine, largest_gap
from lora_adapters import write_adapter
from qoq_checkpoints import write_checkpoint, write_dequantized
from rotated_models import write_rotated

from vllm_qoq import ops
from vllm_qoq.numerics import GROUP_SIZES
from vllm_qoq.routing.table import RoutingError

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

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


def test_graphs_and_compiled_steps_give_every_request_its_adapter(
    runner, nested_dir, tiny_model, tmp_path
):
    one, other = (write_adapter(tiny_model, tmp_path / f"{seed}", seed) for seed in (1, 2))
    adapters = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    spec = {"checkpoint": str(nested_dir), "adapters": [str(one), str(other), None, None]}
    specs = [spec | {"options": options | adapters} for options in (EAGER, GRAPHS, DEFAULT)]
    specs.append({"checkpoint": str(nested_dir), "options": EAGER})
    found = run_engines(tmp_path, specs, **runner)
    eager, graphs, compiled, without = (result["generation"] for result in found)
    # Inductor's fusions round differently, and int8 codes of inputs follow.
    assert largest_gap(graphs, eager) < 0.1 and largest_gap(compiled, eager) < 0.4
    assert largest_gap(eager[2:], without[2:]) < 0.1
    # An adapter changes its answer by more than a rounding.
    assert all(largest_gap([eager[i]], [without[i]]) == math.inf for i in (0, 1))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_perplexity_is_that_of_the_dequantized_weights(
    tiny_model, heldout_text, tmp_path, group_size
):
    w4a8_dir = write_checkpoint(tiny_model, tmp_path / "w4a8", group_size)
    dequantized = write_dequantized(tiny_model, tmp_path / "dequantized", group_size)
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


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=needs_two_gpus)])
@pytest.mark.parametrize(("calm", "busy"), [("w8a8", "w4a8"), ("w4a8", "w8a8")])
def test_captured_graphs_follow_the_load(runner, nested_dir, tmp_path, calm, busy, size):
    trace = str(tmp_path / "trace.jsonl")
    load = {"enter": 4, "leave": 1, "prefill": busy, "decode": busy}
    options = GRAPHS | {"tensor_parallel_size": size}
    specs = [
        {
            "checkpoint": str(nested_dir),
            "options": options,
            "qoq": {"routing": {"prefill": calm, "decode": calm, "load": load}, "trace": trace},
            "waiting": [0, 4, 2, 1, 5],
        },
        *(
            {"checkpoint": str(nested_dir), "options": options, "qoq": {"force_set": name}}
            for name in (calm, busy)
        ),
    ]
    # A process each: vLLM forks its workers, which CUDA in the parent does not survive.
    followed, *forced = (run_engines(tmp_path, [spec], **runner)[0] for spec in specs)
    sets = dict(zip((calm, busy), (result["generation"] for result in forced), strict=True))
    assert sets[calm] != sets[busy]
    assert followed["generation"] == sets[calm]
    for result, name in zip(followed["loads"], (calm, busy, busy, calm, busy), strict=True):
        assert result["generation"] == sets[name]
        counts = {key: n for key, n in result["counts"].items() if n}
        assert counts == {f"prefill {name}": 1, f"decode {name}": 11}
        assert result["traced"] <= 1, "decode steps left the graphs"


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_other_graphs_follow_the_load(nested_dir, tmp_path, mode):
    load = {"enter": 4, "leave": 1, "prefill": "w4a8", "decode": "w4a8"}
    compilation = GRAPHS["compilation_config"] | {"cudagraph_mode": mode}
    options = GRAPHS | {"compilation_config": compilation}
    specs = [
        {
            "checkpoint": str(nested_dir),
            "options": options,
            "qoq": {"routing": {"prefill": "w8a8", "decode": "w8a8", "load": load}},
            "waiting": [4, 0],
        },
        *(
            {"checkpoint": str(nested_dir), "options": options, "qoq": {"force_set": name}}
            for name in ("w4a8", "w8a8")
        ),
    ]
    followed, four, eight = run_engines(tmp_path, specs)
    assert [result["generation"] for result in followed["loads"]] == [
        four["generation"],
        eight["generation"],
    ]
    for result, name in zip(followed["loads"], ("w4a8", "w8a8"), strict=True):
        by_set = {key.split()[1]: n for key, n in result["counts"].items() if n}
        assert by_set.keys() == {name}


def test_graphs_refuse_a_load_between_sets_that_are_not_nested(two_sets_dir):
    routing = {
        "prefill": "w8a8",
        "decode": "w8a8",
        "load": {"enter": 4, "leave": 1, "decode": "w4a8"},
    }
    with pytest.raises(RoutingError, match=r"from 'w8a8' to 'w4a8'.*--enforce-eager"):
        engine(two_sets_dir, {"routing": routing}, **DEFAULT)


@needs_two_gpus
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


@pytest.fixture
def rotated_dir(tiny_model, tmp_path):
    return write_rotated(tiny_model, tmp_path / "rotated")


@pytest.mark.alone  # vLLM asserts that the GPU's memory shrinks
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("checkpoint", ["nested_dir", "w4a8_per_channel_dir", "rotated_dir"])
def test_it_wakes_as_it_fell_asleep(request, tmp_path, checkpoint, level):
    spec = {
        "checkpoint": str(request.getfixturevalue(checkpoint)),
        "options": GRAPHS | {"enable_sleep_mode": True},
        "sleep": [level, level],
    }
    (result,) = run_engines(tmp_path, [spec])
    assert result["awake"] == [result["generation"], result["generation"]]
    assert result["counters"] == 0

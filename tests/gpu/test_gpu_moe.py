"""Two quantized sets of a mixture of experts on a GPU: vLLM's kernels, its graphs and its ranks."""

import pytest
import torch
from engine_process import DEFAULT, EAGER, GRAPHS, run_engines
from moe_models import write_model
from rtn_checkpoints import w4a16, w8a8

import vllm_qoq

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

pytestmark = pytest.mark.gpu

SIZES = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256}
ROUTERS = {"ignore": ["lm_head", r"re:.*mlp\.gate$"]}


@pytest.fixture(scope="module")
def checkpoints(tiny_model, tmp_path_factory):
    """W8A8 and W4A16 of a Qwen3-MoE, and both in one: prompts in W8A8, generation in W4A16."""
    folder = tmp_path_factory.mktemp("gpu-moe")
    model = write_model(tiny_model, folder / "model", "Qwen3Moe", **SIZES)
    sets = {
        "w8a8": w8a8(model, folder / "w8a8", **ROUTERS),
        "w4a16": w4a16(model, folder / "w4a16", **ROUTERS),
    }
    vllm_qoq.merge(sets, folder / "merged")
    return sets | {"merged": folder / "merged"}


@pytest.mark.parametrize("options", [EAGER, GRAPHS], ids=["eager", "graphs"])
def test_a_forced_set_equals_its_single_set_checkpoint(runner, checkpoints, tmp_path, options):
    sets = ("w8a8", "w4a16")
    specs = [{"checkpoint": str(checkpoints[name]), "options": options} for name in sets]
    merged = str(checkpoints["merged"])
    specs += [
        {"checkpoint": merged, "options": options, "qoq": {"force_set": name}} for name in sets
    ]
    w8a8_alone, w4a16_alone, forced_w8a8, forced_w4a16 = run_engines(tmp_path, specs, **runner)
    assert forced_w8a8["generation"] == w8a8_alone["generation"]
    assert forced_w4a16["generation"] == w4a16_alone["generation"]
    assert w8a8_alone["generation"] != w4a16_alone["generation"], "the sets cannot be told apart"


def test_prompts_and_generation_use_their_sets_in_full_graphs(runner, checkpoints, tmp_path):
    trace = str(tmp_path / "trace.jsonl")
    specs = [
        {"checkpoint": str(checkpoints["merged"]), "options": DEFAULT, "qoq": {"trace": trace}}
    ]
    (routed,) = run_engines(tmp_path, specs, **runner)
    assert routed["counts"] == {
        "prefill w8a8": 1,
        "prefill w4a16": 0,
        "decode w8a8": 0,
        "decode w4a16": 11,
    }
    assert routed["traced"] <= 1, "decode steps left the graphs"


def test_graphs_choose_the_experts_that_eager_steps_choose(runner, checkpoints, tmp_path):
    other_experts = {
        "prefill": "w8a8",
        "decode": "w4a16",
        "layers": [{"match": "*.experts", "decode": "w8a8"}],
    }
    merged = str(checkpoints["merged"])
    specs = [
        {"checkpoint": merged, "options": options, "qoq": qoq}
        for qoq in ({}, {"routing": other_experts})
        for options in (EAGER, GRAPHS)
    ]
    eager, graphs, other_eager, other_graphs = run_engines(tmp_path, specs, **runner)
    assert graphs["generation"] == eager["generation"]
    assert other_graphs["generation"] == other_eager["generation"]
    assert other_eager["generation"] != eager["generation"], "experts did not follow the rule"


@needs_two_gpus
@pytest.mark.parametrize("is_expert_parallel", [False, True], ids=["tensor", "expert"])
def test_two_ranks_equal_their_single_set_checkpoints(checkpoints, tmp_path, is_expert_parallel):
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": is_expert_parallel}
    options = EAGER | parallel
    specs = []
    for name in ("w8a8", "w4a16"):
        specs.append({"checkpoint": str(checkpoints[name]), "options": options})
        forced = {"qoq": {"force_set": name}, "options": options}
        specs.append({"checkpoint": str(checkpoints["merged"])} | forced)
    w8a8_alone, w8a8_forced, w4a16_alone, w4a16_forced = run_engines(tmp_path, specs)
    assert w8a8_forced["generation"] == w8a8_alone["generation"]
    assert w4a16_forced["generation"] == w4a16_alone["generation"]

"""Mixtures of experts in vLLM on the CPU: two sets of experts in one checkpoint, by step.

The experts are in bf16, because vLLM's int8 and 4-bit experts need AMX on x86. Everything else of
the two sets is equal, so what differs between steps is the experts.
"""

from functools import cache
from types import SimpleNamespace

import pytest
from engines import PROMPTS, TRACED, engine, generate
from moe_models import FAMILIES, SIZES, float_experts, write_model

import vllm_qoq
from vllm_qoq.serving.methods.routed_experts import FlexMoEMethod

LAYERS = SIZES["num_hidden_layers"]


@pytest.fixture(scope="module")
def checkpoints(tiny_model, tmp_path_factory):
    """Makes the two single-set checkpoints of a family, and both in one; each once."""

    @cache
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        model = write_model(tiny_model, folder / "model", family)
        sets = {f"s{x}": float_experts(model, folder / f"s{x}", ord(x)) for x in "ab"}
        vllm_qoq.merge(sets, folder / "merged")
        return SimpleNamespace(**sets, merged=folder / "merged")

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forced_set_equals_its_single_set_checkpoint(checkpoints, family):
    found = checkpoints(family)
    single = {name: generate(engine(getattr(found, name))) for name in ("sa", "sb")}
    assert single["sa"] != single["sb"], "the sets cannot be told apart"
    for name, tokens in single.items():
        assert generate(engine(found.merged, {"force_set": name})) == tokens


@pytest.mark.parametrize("options", [{}, TRACED], ids=["eager", "traced"])
def test_experts_go_by_the_phase(checkpoints, options):
    """A choice outside of the op would be frozen to the profiling run's."""
    llm = engine(checkpoints("Qwen3Moe").merged, **options)
    used = watch(llm)
    before = vllm_qoq.step_counts(llm)
    generate(llm, PROMPTS[:2], max_tokens=5)
    counts = {key: n - before[key] for key, n in vllm_qoq.step_counts(llm).items()}
    assert used == ["sa"] * LAYERS + ["sb"] * LAYERS * 4
    assert (counts["prefill", "sa"], counts["decode", "sb"]) == (1, 4)


def watch(llm):
    """A list that gets the name of the set each time when experts compute."""
    used = []

    def find(model):
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            for name in method.sets if isinstance(method, FlexMoEMethod) else ():
                own = method.experts(name).method
                own.apply = noting(own.apply, name)

    def noting(compute, name):
        def apply(*arguments):
            used.append(name)
            return compute(*arguments)

        return apply

    llm.apply_model(find)
    return used

"""GPTQ, AWQ, auto-round and W8A8 in one checkpoint: each is its own checkpoint, to the bit."""

import pytest
from conftest import merge
from convert import to_auto_round, to_awq, to_gptq
from cpu_kernels import needs_wna16
from engines import PROMPTS, engine, generate

import vllm_qoq

pytestmark = needs_wna16

# Equal weights in different kernels, which a GPU has for them; none on the CPU.
KERNEL_ROUNDING = 0.1


@pytest.fixture(scope="module")
def single_dirs(w4a16_dir, tmp_path_factory):
    """The weights of the W4A16 fixture in two other formats."""
    folder = tmp_path_factory.mktemp("other-methods")
    return {
        "gptq": to_gptq(w4a16_dir, folder / "gptq"),
        "awq": to_awq(w4a16_dir, folder / "awq"),
        "autoround": to_auto_round(w4a16_dir, folder / "autoround"),
    }


@pytest.fixture(scope="module")
def four_sets_dir(single_dirs, w8a8_dir, tmp_path_factory):
    """The norms of GPTQ, which all but W8A8 have, are the shared ones: so these are exact."""
    out = tmp_path_factory.mktemp("four-sets") / "checkpoint"
    sources = (*(f"{name}={path}" for name, path in single_dirs.items()), f"w8a8={w8a8_dir}")
    return merge(out, *sources, "--prefill", "gptq", "--decode", "2:awq,w8a8")


@pytest.mark.parametrize("method", ["gptq", "awq", "autoround"])
def test_forced_set_equals_its_single_set_checkpoint(method, single_dirs, four_sets_dir):
    forced = engine(four_sets_dir, {"force_set": method})
    assert generate(forced) == generate(engine(single_dirs[method]))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_converted_weights_are_those_of_the_fixture(method, w4a16_dir, single_dirs):
    """Otherwise the tests above would compare nonsense with nonsense."""
    converted = generate(engine(single_dirs[method]), max_tokens=1)
    for (tokens, logprobs), (expected, others) in zip(
        converted, generate(engine(w4a16_dir), max_tokens=1), strict=True
    ):
        assert tokens == expected
        token = tokens[0]
        assert logprobs[0][token] == pytest.approx(others[0][token], abs=KERNEL_ROUNDING)


def test_steps_are_routed_among_methods(single_dirs, four_sets_dir):
    llm = engine(four_sets_dir)
    before = vllm_qoq.step_counts(llm)
    generate(llm, PROMPTS[:2], max_tokens=6)
    many = generate(llm, PROMPTS, max_tokens=4)
    counts = {key: n - before[key] for key, n in vllm_qoq.step_counts(llm).items() if n}
    assert counts == {("prefill", "gptq"): 2, ("decode", "awq"): 5, ("decode", "w8a8"): 3}
    # The first token comes out of the prompt's step.
    first = generate(engine(single_dirs["gptq"]), max_tokens=1)
    assert [(tokens[:1], logprobs[:1]) for tokens, logprobs in many] == first

"""Mixtures of experts in W4A8 in vLLM on the CPU, against the same weights in floating point."""

import pytest
import torch
from engine_process import run_engines
from engines import PROMPTS, engine, generate, largest_gap
from moe_models import write_model
from qoq_checkpoints import PER_CHANNEL, write_checkpoint, write_dequantized, write_nested
from vllm import SamplingParams

import vllm_qoq
from vllm_qoq.serving.methods.qoq_experts import QoQExpertsMethod
from vllm_qoq.serving.methods.routed_experts import FlexMoEMethod


def of_prompts(llm):
    """The log-probabilities of all tokens of the prompts, which do not depend on what is chosen."""
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = []
    for output in llm.generate(list(PROMPTS), sampling, use_tqdm=False):
        tokens = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        found += [logprobs[token].logprob for token, logprobs in tokens if logprobs is not None]
    return torch.tensor(found)


@pytest.mark.parametrize("group_size", [128, PER_CHANNEL])
def test_experts_in_w4a8_compute_what_their_weights_stand_for(tiny_model, tmp_path, group_size):
    model = write_model(tiny_model, tmp_path / "model", moe_intermediate_size=128)
    ours = engine(write_checkpoint(model, tmp_path / "w4a8", group_size))
    found = of_prompts(ours)
    expected = of_prompts(engine(write_dequantized(model, tmp_path / "float", group_size)))
    assert (found - expected).abs().max() < 0.3

    def methods(model):
        experts = [m.quant_method for m in model.modules() if hasattr(m, "quant_method")]
        return [type(e.experts("w4a8").method) for e in experts if isinstance(e, FlexMoEMethod)]

    assert ours.apply_model(methods) == [[QoQExpertsMethod] * 2]


def test_experts_of_a_nested_set_have_both_planes(tiny_model, tmp_path):
    model = write_model(tiny_model, tmp_path / "model", moe_intermediate_size=128)
    nested = write_nested(model, tmp_path / "nested")
    whole = of_prompts(engine(model))
    error = {
        name: (of_prompts(engine(nested, {"force_set": name})) - whole).abs().mean()
        for name in ("w8a8", "w4a8")
    }
    assert error["w8a8"] < 0.2 and error["w4a8"] > 3 * error["w8a8"]
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    options["kv_cache_memory_bytes"] = 32 << 20
    spec = {"checkpoint": str(nested), "options": options, "max_tokens": 1}
    (ranks,) = run_engines(tmp_path, [spec], VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert ranks["counts"]["prefill w8a8"] == 1
    # Of the first token, since the choice of experts and so the rest turns on roundings.
    assert largest_gap(ranks["generation"], generate(engine(nested), max_tokens=1)) < 0.5
    llm = engine(nested)
    before = vllm_qoq.step_counts(llm)
    generate(llm, PROMPTS[:1], max_tokens=3)
    counts = {key: n - before[key] for key, n in vllm_qoq.step_counts(llm).items()}
    assert (counts["prefill", "w8a8"], counts["decode", "w4a8"]) == (1, 2)

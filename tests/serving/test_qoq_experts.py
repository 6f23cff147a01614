"""Mixtures of experts in W4A8 in vLLM on the CPU, against the same weights in floating point."""

import json

import pytest
import torch
from engines import PROMPTS, engine
from moe_models import write_model
from qoq_checkpoints import PER_CHANNEL, write_checkpoint, write_dequantized
from vllm import SamplingParams

from vllm_qoq.serving.methods.qoq_experts import QoQExpertsMethod
from vllm_qoq.serving.methods.routed_experts import FlexMoEMethod


def keep_router(checkpoint):
    """Leaves the router as it is, which no set quantizes."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["sets"]["w4a8"]["ignore"] = ["lm_head", "*.mlp.gate"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


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
    ours = engine(keep_router(write_checkpoint(model, tmp_path / "w4a8", group_size)))
    found = of_prompts(ours)
    expected = of_prompts(engine(write_dequantized(model, tmp_path / "float", group_size)))
    assert (found - expected).abs().max() < 0.3

    def methods(model):
        experts = [m.quant_method for m in model.modules() if hasattr(m, "quant_method")]
        return [type(e.experts("w4a8").method) for e in experts if isinstance(e, FlexMoEMethod)]

    assert ours.apply_model(methods) == [[QoQExpertsMethod] * 2]

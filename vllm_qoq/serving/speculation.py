"""What is speculated: where that is refused, and how many tokens a request verifies in a step."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_qoq.errors import UserError

# vLLM builds a draft model below this name, in both model runners.
DRAFT_PREFIX = "draft_model."


def check_speculation(vllm_config: VllmConfig) -> None:
    """Raise UserError where vLLM answers wrongly once tokens are speculated, or drafts wrongly.

    On a CPU vLLM 0.32 does for models with linear attention, whatever serves their weights: the
    state has what was speculated and rejected.
    """
    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    if speculative is not None and speculative.method == "mtp":
        heads = speculative.draft_model_config
        if heads.quantization not in (None, model.quantization):
            raise UserError(
                f"--speculative-config: {heads.model} is quantized ({heads.quantization}), and "
                "heads of MTP are served in float beside a checkpoint of vllm-qoq; name the "
                "original model in bf16"
            )
    if speculative is not None and model.is_hybrid and current_platform.is_cpu():
        raise UserError(
            f"--speculative-config: on a CPU vLLM gives wrong answers to {model.model}, which has "
            "layers with a state, when it speculates; leave it out"
        )


def has_float_heads(vllm_config: VllmConfig) -> bool:
    """Whether heads of MTP come from a model in float, not from the checkpoint that is served.

    vLLM builds them with the quantization config of the model that they draft for.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "mtp":
        return False
    return speculative.draft_model_config.quantization is None


def most_decode_tokens(vllm_config: VllmConfig, is_draft: bool = False) -> int:
    """Count the most tokens of a request that generates: one, and those that are speculated.

    is_draft  of a draft model, whose first step of each round also has the token that the last
              round ended with, or, where it drafts in parallel, a place for every token
    """
    speculative = vllm_config.speculative_config
    speculated = (speculative.num_speculative_tokens or 0) if speculative is not None else 0
    if not is_draft:
        return 1 + speculated
    is_parallel = speculative is not None and speculative.parallel_drafting
    return 1 + speculated + (speculated if is_parallel else 1)


def is_draft(vllm_config: VllmConfig) -> bool:
    """Whether the model that is being built with `vllm_config` is a draft model."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "draft_model":
        return False  # with n-grams, the draft's config is the model's own
    return speculative.draft_model_config is vllm_config.model_config

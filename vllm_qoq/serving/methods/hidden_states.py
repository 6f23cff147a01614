"""Where hidden states leave or enter a model whose residual stream is rotated, and what is done.

The section's `stream` says that it is.

Generation uses them for lm_head alone, into which the rotation is folded, so nothing happens there.
A pooler, and a head that drafts from hidden states, were made for the original model's. For them
`way_back` turns what they take, and more of a head's (`draft_heads`). What vLLM makes of rows of
lm_head (`classifier_from_token`) is in the basis of the stream and needs the hidden states as they
are.

Everything else that hands hidden states to others or takes them is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.checkpoint.format import STREAM, Section, Stream
from vllm_qoq.errors import FormatError, UserError
from vllm_qoq.models.names import LM_HEAD
from vllm_qoq.numerics import rotation as basis

REMEDY = "quantize the model with --no-rotate"

_REPORT = "quantization_report.json"
# The methods of speculative decoding whose drafts are made of tokens alone, and those whose heads
# take hidden states that can be turned.
_DRAFTS_OF_TOKENS = ("ngram", "ngram_gpu", "suffix", "draft_model")
_HEADS = ("eagle", "eagle3", "mtp", "medusa")
_OTHER_METHODS = "use 'ngram' or 'draft_model', which need no hidden states"
# Rounding grows by this much at most where a head shares an lm_head with the norm's weight in it:
# that of bf16 to an eighth of a logit's deviation.
_MOST_SPREAD = 64


def stream_of(section: Section, vllm_config: VllmConfig) -> Stream | None:
    """Say what is known of the stream, also of checkpoints older than the section's key."""
    model = vllm_config.model_config
    if section.stream is not None or model is None:
        return section.stream
    try:
        report = get_hf_file_to_dict(_REPORT, model.model, model.revision)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{_REPORT}: {error}; download the checkpoint again") from None
    options = report.get("options") if isinstance(report, dict) else None
    is_rotated = isinstance(options, dict) and options.get("rotate") is True
    return Stream(rotation="unknown") if is_rotated else None


def check_engine(section: Section, vllm_config: VllmConfig) -> None:
    """Raise UserError where the engine needs original hidden states and cannot have them."""
    reads_head, exits = reads_lm_head(vllm_config), list(_exits(section, vllm_config))
    if reads_head and section.lm_head is not None:
        raise UserError(
            "classifier_from_token reads rows of lm_head, which this checkpoint has in int8; "
            "quantize the model with --lm-head-bits 16"
        )
    needs_original = is_pooling(vllm_config) and not reads_head
    stream = stream_of(section, vllm_config) if exits or needs_original else None
    for what, remedy in exits if stream is not None else ():
        raise UserError(
            f"the hidden states of this checkpoint are rotated, and {what} needs the original "
            f"model's; {remedy}, or {REMEDY}"
        )
    if needs_original and stream is not None and not stream.is_stored:
        raise UserError(
            "the hidden states of this checkpoint are rotated, and it does not say how, so "
            "embeddings and scores would mean nothing; quantize the original model again with "
            "vllm-qoq quantize"
        )
    if drafts_with_head(section, vllm_config):
        _check_head(vllm_config)


def is_pooling(vllm_config: VllmConfig) -> bool:
    """Whether hidden states are what the engine is asked for."""
    model = vllm_config.model_config
    return model is not None and model.runner_type == "pooling"


def drafts_with_head(section: Section, vllm_config: VllmConfig) -> bool:
    """Whether a head drafts from hidden states that have to be turned, and can be."""
    speculative = vllm_config.speculative_config
    is_stored = section.stream is not None and section.stream.is_stored
    return is_stored and speculative is not None and speculative.method in _HEADS


def reads_lm_head(vllm_config: VllmConfig) -> bool:
    """Whether vLLM makes a classifier of rows of lm_head, which are in the stream's basis."""
    model = vllm_config.model_config
    if model is None or model.convert_type != "classify":
        return False
    keys = ("classifier_from_token", "method")
    configs = (model.hf_config, model.hf_text_config)
    return any(getattr(config, key, None) is not None for config in configs for key in keys)


def check_shared_head(norm: torch.Tensor, place: str) -> None:
    """Raise UserError where a head cannot use the lm_head of a model with this final norm [H].

    place  where the norm is, for the message
    """
    if basis.spread(norm) > _MOST_SPREAD:
        least, most = (float(end) for end in norm.float().abs().aminmax())
        raise UserError(
            f"--speculative-config: the head has no lm_head of its own, and from that of the "
            f"checkpoint the weight of its final norm cannot be divided out, which goes from "
            f"{least:.3g} to {most:.3g} ({place}); use a head with an lm_head, {_OTHER_METHODS}, "
            f"or {REMEDY}"
        )


def _check_head(vllm_config: VllmConfig) -> None:
    """Raise UserError for a head that cannot be served, as far as files on this machine tell."""
    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    is_mtp, config = speculative.method == "mtp", speculative.draft_model_config
    head, size = config.model, model.get_hidden_size()
    if config.quantization == model.quantization:
        raise UserError(
            f"--speculative-config: {head} has no heads of MTP, which quantize leaves out; name "
            'the original model, {"method": "mtp", "model": ORIGINAL, ...}, whose heads fit'
            if is_mtp
            else f"--speculative-config: {head} is a checkpoint of vllm-qoq, not a head of "
            f"{speculative.method}; name the head, or use it as a 'draft_model'"
        )
    # A head of EAGLE-3 may be of another size than its model.
    reads = getattr(config.hf_config, "target_hidden_size", None) or config.get_hidden_size()
    if reads != size:
        raise UserError(
            f"--speculative-config: {head} is for a model with a hidden size of {reads}, and "
            f"{model.model} has {size}; name a head of the original model of this checkpoint"
        )
    has_own = not is_mtp and _has_lm_head(Path(head))
    if speculative.method == "medusa" or has_own or not Path(model.model).is_dir():
        return
    try:
        norm = Checkpoint.open(Path(model.model)).get(f"{STREAM}.norm")
    except FormatError:  # said where it is loaded
        return
    check_shared_head(norm, f"{STREAM}.norm in {model.model}")


def _has_lm_head(head: Path) -> bool:
    """Whether a folder has tensors of an lm_head; those of the Hub are not asked for."""
    try:
        return any(LM_HEAD in name for name in Checkpoint.open(head).tensors)
    except FormatError:
        return True  # of another form, of which loading tells more


def _exits(section: Section, vllm_config: VllmConfig) -> Iterator[tuple[str, str]]:
    """List what takes hidden states from the model or puts some in, and what to do instead."""
    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    if speculative is not None and speculative.method not in _DRAFTS_OF_TOKENS:
        what = f"speculative decoding with the method {speculative.method!r}"
        stages = vllm_config.parallel_config.pipeline_parallel_size
        if not drafts_with_head(section, vllm_config):
            yield what, _OTHER_METHODS
        elif stages > 1:
            yield f"{what} in {stages} pipeline stages", "use --tensor-parallel-size"
    if model is not None and model.enable_prompt_embeds:
        yield "--enable-prompt-embeds", "leave it out"
    # `quantize`, which stores the rotation, rotates what an encoder puts into the stream, too.
    is_stored = section.stream is not None and section.stream.is_stored
    if model is not None and model.is_multimodal_model and not is_stored:
        yield f"the encoder of {model.model}", "serve a model of text alone"

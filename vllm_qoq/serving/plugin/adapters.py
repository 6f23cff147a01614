"""LoRA adapters: which engines may add them to the layers of sets.

vLLM adds an adapter's product to what a layer computes, whatever set that takes. `quantize` brings
a model into another basis, in which an adapter trained on the original gives nonsense without any
error. So such a checkpoint is served with adapters only where the user says that they are in its
basis.
"""

from __future__ import annotations

from pathlib import Path

from vllm.config import LoRAConfig, ModelConfig, VllmConfig
from vllm.logger import init_logger

from vllm_qoq.checkpoint import hub, transforms
from vllm_qoq.checkpoint.format import Section
from vllm_qoq.errors import UserError
from vllm_qoq.models.names import LM_HEAD
from vllm_qoq.models.table import with_experts
from vllm_qoq.serving.options import Options
from vllm_qoq.serving.plugin.local import local_checkpoint

logger = init_logger("vllm." + __name__)  # below vLLM's, so that its settings apply

CONVERTED, TRAINED = (
    f"""--additional-config '{{"qoq": {{"lora": "{value}"}}}}'"""
    for value in ("converted", "trained")
)


def check_adapters(section: Section, vllm_config: VllmConfig) -> None:
    """Raise UserError for an engine whose LoRA adapters could not be served, or served rightly."""
    if vllm_config.lora_config is None:
        if Options.of(vllm_config).lora is not None:
            raise UserError(
                "--additional-config: qoq.lora says what adapters are, and none are served; add "
                "--enable-lora, or leave it out"
            )
        return
    model = vllm_config.model_config
    if with_mixture := sorted(set(model.architectures) & set(with_experts())):
        refuse_experts(with_mixture[0])
    if section.lm_head is not None and _reaches_head(vllm_config.lora_config):
        raise UserError(
            "--enable-lora: the lm_head of this checkpoint is int8, and vLLM would put adapters on "
            "it; name the layers without it (--lora-target-modules q_proj k_proj ...), or quantize "
            "with --lm-head-bits 16"
        )
    if Options.of(vllm_config).lora is not None:
        _check_transforms(vllm_config)
        return
    reason = _other_basis(section, model)
    if reason is not None:
        raise UserError(
            f"--enable-lora: {reason}, so adapters of the original model do not fit; convert each "
            f"with `vllm-qoq convert-lora ADAPTER {model.model} -o CONVERTED` and serve them with "
            f"{CONVERTED}"
        )
    logger.info(
        "LoRA adapters are added as they are: they have to be of the model that the sets of this "
        "checkpoint are made of, with the norms that it stores"
    )


def refuse_experts(place: str) -> None:
    """Raise UserError for adapters on a model with a mixture of experts."""
    raise UserError(
        f"{place}: LoRA adapters on a model with mixtures of experts in sets are not served; merge "
        "the adapter into the model before quantizing, or start without --enable-lora"
    )


def _check_transforms(vllm_config: VllmConfig) -> None:
    """Raise FormatError for transforms, in a folder, that are not those of the weights there."""
    checkpoint = local_checkpoint(vllm_config)
    if checkpoint is not None:
        transforms.read(checkpoint)


def _reaches_head(lora: LoRAConfig) -> bool:
    """Whether vLLM prepares the lm_head for adapters, as it does unless the user names layers."""
    targets = getattr(lora, "target_modules", None)  # older versions prepare all layers
    return not targets or LM_HEAD in targets


def _other_basis(section: Section, model: ModelConfig) -> str | None:
    """Say why the weights of a checkpoint may be in another basis than the original model's."""
    if section.stream is not None:
        return "the residual stream of this checkpoint is rotated"
    if section.input_ratio:
        return "the norms of the sets differ, so one of them is smoothed (input_ratio)"
    folder = Path(model.model)
    if folder.is_dir():
        return transforms.in_folder(folder)
    if hub.has_file(model.model, model.revision, transforms.FILE):
        return "the weights of this checkpoint were transformed"
    return None

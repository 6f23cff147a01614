"""The float model that a checkpoint is compared with, in transformers.

It runs in float32 on a CPU, where bf16 is slow and rounded differently, and in its own dtype on a
GPU. Each engine of a run computes it anew beside its own: stored distributions would take a
gigabyte for ten windows and a vocabulary of 128 thousand, or be rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_qoq.errors import UserError, reason
from vllm_qoq.models.table import architecture_of


class FloatModel:
    """A model in transformers, from a local folder; no code of it is run."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        has_gpu = torch.cuda.is_available()
        try:
            config = AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            known = architecture_of(config.to_dict())
            if known is not None and known.names is not None and known.names.has_wrong_hidden_act:
                config.hidden_act = known.names.activation
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype="auto" if has_gpu else torch.float32,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
            )
        except Exception as error:  # whatever transformers raises at a stranger's folder
            raise UserError(
                f"--against {folder}: transformers cannot load it: {reason(error)}; give the "
                "model that was quantized, in bf16 or fp16"
            ) from error
        if getattr(model.config, "attn_logit_softcapping", None) is not None:
            model.set_attn_implementation("eager")  # the fused one leaves out the bound of scores
        self._device = torch.device("cuda" if has_gpu else "cpu")
        self._model = model.eval().to(self._device)

    @torch.inference_mode()
    def logits(self, window: Sequence[int], first: int) -> torch.Tensor:
        """Compute the logits [tokens, vocabulary] of a window from position `first` to its last but
        one, each of which is followed by a token of the window."""
        ids = torch.tensor([list(window)], device=self._device)
        keep = len(window) - first
        logits: torch.Tensor = self._model(ids, use_cache=False, logits_to_keep=keep).logits
        return logits[0, :-1]

    @torch.inference_mode()
    def continuation(self, context: Sequence[int], count: int) -> list[int]:
        """Go on after tokens with the likeliest one, `count` times, whatever ends a text."""
        ids, cache, made = torch.tensor([list(context)], device=self._device), None, list[int]()
        while len(made) < count:
            found = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = found.past_key_values
            ids = found.logits[:, -1].argmax(dim=-1, keepdim=True)
            made.append(int(ids))
        return made


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder; no code of it is run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever transformers raises at a stranger's folder
        raise UserError(
            f"{folder}: the tokenizer cannot be loaded: {reason(error)}; copy the model's "
            "tokenizer.json and tokenizer_config.json there"
        ) from error

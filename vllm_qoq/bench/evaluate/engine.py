"""A checkpoint in vLLM, whose logits of whole windows are read: they stay in this process.

The engine runs eagerly and one window at a time. Log-probabilities that vLLM returns would be an
object for each token of the vocabulary; so the hidden states are kept that leave the model, and the
lm_head is asked once more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm import LLM, SamplingParams
from vllm.config import set_current_vllm_config

from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.checkpoint.format import QUANT_METHOD
from vllm_qoq.checkpoint.kv_config import UNQUANTIZED, Bits
from vllm_qoq.errors import UserError, reason
from vllm_qoq.routing.table import DecodeRow, Routing
from vllm_qoq.serving.methods.steering import Steering, reaching
from vllm_qoq.serving.options import NAMESPACE

# The KV cache of one window. vLLM refuses to start if less than the share is free.
_KV_BYTES, _MEMORY_SHARE = 1 << 30, 0.05


class Engine:
    """The engine of one checkpoint with one precision of the KV cache.

    sets     the sets of the checkpoint, empty for one that is not ours
    length   tokens of a window
    kv_bits  bits of the KV cache
    chunk    tokens a step; below 16 bits all others are read from the cache, rounded

    Raises UserError where vLLM does not start.
    """

    def __init__(
        self, folder: Path, sets: Sequence[str], *, length: int, kv_bits: Bits, chunk: int
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        options: dict[str, Any] = {"routing": reaching(sets)} if sets else {}
        engine: dict[str, Any] = {}
        # What the section of a checkpoint of ours says of its cache is not to be measured here.
        if kv_bits != UNQUANTIZED or Checkpoint.open(folder).section is not None:
            options["kv_bits"] = kv_bits
            engine["quantization"] = QUANT_METHOD  # also where the model has no section of ours
        try:
            self._llm = LLM(
                str(folder),
                max_model_len=length + 1,
                # Sets that no batch reaches are not loaded; there is never more than one request.
                max_num_seqs=max(1, len(sets)),
                max_num_batched_tokens=length if kv_bits == UNQUANTIZED else chunk,
                enforce_eager=True,
                enable_prefix_caching=False,
                trust_remote_code=False,
                gpu_memory_utilization=_MEMORY_SHARE,
                kv_cache_memory_bytes=_KV_BYTES,
                additional_config={NAMESPACE: options},
                disable_log_stats=True,
                **engine,
            )
        except UserError:
            raise
        except Exception as error:  # vLLM raises its own and pydantic's
            raise UserError(
                f"{folder}: vLLM did not start: {reason(error)}; its log above says more, --debug "
                "shows where"
            ) from error
        self._vllm_config = self._llm.llm_engine.vllm_config
        (self._model,) = self._llm.apply_model(_itself)
        self._steering = Steering(self._model) if sets else None

    def logits(self, window: Sequence[int], first: int, set_name: str | None) -> torch.Tensor:
        """Compute the logits [tokens, vocabulary] of a window from position `first` to its last but
        one, in one set."""
        self._steer(set_name)
        steps: list[torch.Tensor] = []
        hook = self._model.register_forward_hook(lambda _, __, hidden: steps.append(hidden.clone()))
        try:
            self._llm.generate(
                [{"prompt_token_ids": list(window)}],
                SamplingParams(max_tokens=1, detokenize=False),
                use_tqdm=False,
            )
        finally:
            hook.remove()
        hidden = torch.cat(steps)
        if len(hidden) != len(window):
            raise RuntimeError(f"{len(hidden)} hidden states of a window of {len(window)} tokens")
        with torch.inference_mode(), set_current_vllm_config(self._vllm_config):
            logits: torch.Tensor = self._model.compute_logits(hidden[first:-1])
        return logits

    def continuation(self, context: Sequence[int], count: int, set_name: str | None) -> list[int]:
        """Go on after tokens with the likeliest one, `count` times, whatever ends a text."""
        self._steer(set_name)
        (found,) = self._llm.generate(
            [{"prompt_token_ids": list(context)}],
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        return list(found.outputs[0].token_ids)

    def _steer(self, set_name: str | None) -> None:
        if self._steering is not None and set_name is not None:
            row = DecodeRow(set_name=set_name)
            self._steering.follow(Routing(prefill=set_name, decode=(row,)))


def _itself(model: nn.Module) -> Any:
    return model

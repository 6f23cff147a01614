"""An engine in vLLM that times each set of a checkpoint, see `vllm_qoq.tuner.engine`.

All sets are loaded, whatever the checkpoint's routing says. With tensor parallelism each rank is a
process with its part of every layer; without it, all is in this process.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams

from vllm_qoq.errors import FormatError, UserError, reason
from vllm_qoq.routing.table import Routing
from vllm_qoq.serving.methods.steering import reaching
from vllm_qoq.serving.options import NAMESPACE
from vllm_qoq.tuner import TuneError
from vllm_qoq.tuner.engine import LayerGroup
from vllm_qoq.tuner.vllm_worker import TuneWorker

# A prompt of one token would be a decode step. Prompt and answer fit into one block of the cache.
_PROMPT, _STEPS = [0, 1], 12
_MODEL_LEN = 128
_KV_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
# vLLM refuses to start if less is free. The size of the KV cache is given apart.
_MEMORY_SHARE = 0.05


def open_engine(
    folder: Path, sets: tuple[str, ...], max_batch: int, tensor_parallel_size: int
) -> TuneEngine:
    """Load all `sets` of the checkpoint `folder` for decode steps of up to `max_batch`."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    requests = max(max_batch, len(sets))
    try:
        llm = LLM(
            str(folder),
            max_model_len=_MODEL_LEN,
            max_num_seqs=requests,
            max_num_batched_tokens=max(len(_PROMPT) * requests, _MODEL_LEN),
            enforce_eager=True,
            enable_prefix_caching=False,
            trust_remote_code=False,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=_MEMORY_SHARE,
            kv_cache_memory_bytes=_KV_BYTES["cuda" if torch.cuda.is_available() else "cpu"],
            additional_config={NAMESPACE: {"routing": reaching(sets)}},
            worker_extension_cls=f"{TuneWorker.__module__}.{TuneWorker.__name__}",
            disable_log_stats=True,
        )
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # vLLM raises its own and pydantic's
        raise TuneError(
            f"{folder}: vLLM did not start: {reason(error)}; its log above says more, --debug "
            "shows where"
        ) from error
    return TuneEngine(llm)


class TuneEngine:
    """The engine of `llm`, whose workers are each a `TuneWorker`, too."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        found, *_ = self._ranks(TuneWorker.tune_groups)
        if isinstance(found, str):
            raise FormatError(found)
        self._groups: list[LayerGroup] = found

    def layers(self) -> Sequence[LayerGroup]:
        """Group the routed linear layers of the model by shape; sizes are those of one rank."""
        return self._groups

    def linear_seconds(self, layers: LayerGroup, set_name: str, tokens: int) -> float:
        """Measure one of `layers` on all ranks at a time; a step waits for the slowest."""
        return max(self._ranks(TuneWorker.tune_linear_seconds, layers, set_name, tokens))

    def head_seconds(self, tokens: int) -> float | None:
        """Measure the lm_head; None if the model has none of that name."""
        times = self._ranks(TuneWorker.tune_head_seconds, tokens)
        return None if None in times else max(times)

    def step_seconds(self, routing: Routing, batch: int) -> float | None:
        """Measure decode steps of `batch` requests with `routing`; the result is their median."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        if batch >= cache.num_gpu_blocks:  # one block is vLLM's own
            return None
        self._ranks(TuneWorker.tune_begin_steps, routing, batch)
        try:
            sampling = SamplingParams(
                temperature=0, max_tokens=_STEPS + 1, ignore_eos=True, detokenize=False
            )
            prompts = [{"prompt_token_ids": list(_PROMPT)} for _ in range(batch)]
            self._llm.generate(prompts, sampling, use_tqdm=False)
        finally:
            ranks = self._ranks(TuneWorker.tune_end_steps)
        # The rank that begins last waits for no other, so its time is that of the step.
        steps = [min(times) for times in zip(*ranks, strict=True)]
        return statistics.median(steps) if steps else None

    def _ranks(self, method: Any, *arguments: object) -> list[Any]:
        """Call a method of `TuneWorker` on every rank; the results are in their order."""
        try:
            return self._llm.collective_rpc(method.__name__, args=arguments)
        except RuntimeError as error:
            if self._llm.llm_engine.vllm_config.parallel_config.world_size == 1:
                raise  # from this process, which says more
            raise TuneError(
                f"a rank failed or was ended: {reason(error)}; the log above says more, and after "
                "a kill for want of memory the system's; nothing was written"
            ) from error

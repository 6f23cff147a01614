"""Real vLLM engines for the tests: in this process, kept alive, shared by what they are made of."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import once
from vllm import LLM, SamplingParams
from vllm.distributed import parallel_state
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import registry
from vllm.platforms import current_platform

PROMPTS = ("def main():\n    ", "import os\nclass Foo:\n", "for i in range", "# The")
Generation = list[tuple[tuple[int, ...], list[dict[int, float]]]]

if current_platform.is_cpu():
    # vLLM asks each class of models what it is in a process of its own, which imports vLLM anew, so
    # as not to touch CUDA.
    registry._run_in_subprocess = lambda ask: ask()
    # Its sampler compiles a comparison for ten seconds, also where the engine is eager.
    current_platform.simple_compile_backend = "eager"
    once.kernel_overrides()
    # Its search for n-grams compiles for ten seconds, where numba is not kept from it.
    os.environ.setdefault("NUMBA_DISABLE_JIT", "1")

# Options of an engine that is traced, as one that compiles is, without Inductor's C++ of half a
# minute. On a CPU vLLM takes another backend in no other mode than this, of one trace.
TRACED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}

# vLLM cannot build an engine after another was collected in the same process.
_engines: dict[str, LLM] = {}


def engine(checkpoint: Path, qoq: dict[str, Any] | None = None, **options: Any) -> LLM:
    """An engine for `checkpoint`; `qoq` is the object of `--additional-config`."""
    options = {
        "max_model_len": 512,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "gpu_memory_utilization": 0.3,  # what has to be free at the start: others test, too
        "additional_config": {"qoq": qoq} if qoq else {},
    } | options
    key = f"{checkpoint} {sorted(options.items(), key=str)}"
    if key not in _engines:
        have_expert_group()
        _engines[key] = LLM(str(checkpoint), **options)
    return _engines[key]


def have_expert_group() -> None:
    """Let a mixture of experts be served in this process, whatever engine it had first.

    vLLM makes the group of ranks among which experts are divided for the first engine alone, and
    only if that has experts. Here all groups are of this one process.
    """
    if parallel_state._TP is not None and parallel_state._EP is None:
        parallel_state._EP = parallel_state._TP


def generate(
    llm: LLM,
    prompts: tuple[str, ...] = PROMPTS,
    max_tokens: int = 12,
    adapters: Sequence[str | None] | None = None,
) -> Generation:
    """Greedy tokens and the log-probabilities of the two likeliest at each position.

    adapters  folder of the LoRA adapter of each prompt, None for the model without one
    """
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=2, ignore_eos=True)
    requests = [adapter(folder) for folder in adapters] if adapters is not None else None
    outputs = llm.generate(list(prompts), sampling, lora_request=requests, use_tqdm=False)
    return [
        (
            tuple(output.outputs[0].token_ids),
            [
                {token: entry.logprob for token, entry in position.items()}
                for position in output.outputs[0].logprobs
            ],
        )
        for output in outputs
    ]


def adapter(folder: str | Path | None) -> LoRARequest | None:
    """What vLLM takes for a prompt: the LoRA adapter in a folder, which has one number."""
    if not folder:
        return None
    number = 1 + zlib.crc32(str(folder).encode()) // 2  # vLLM's runners keep it in an int32
    return LoRARequest(str(folder), number, str(folder))


def largest_gap(a: Generation, b: Generation) -> float:
    """Largest difference of log-probabilities while both runs agree on the tokens so far.

    Infinite where the token that one run chose is not among the likeliest of the other.
    """
    gaps = [0.0]
    for (tokens_a, logprobs_a), (tokens_b, logprobs_b) in zip(a, b, strict=True):
        for token_a, token_b, left, right in zip(
            tokens_a, tokens_b, logprobs_a, logprobs_b, strict=True
        ):
            if token_a not in right or token_b not in left:
                gaps.append(float("inf"))
            gaps += [abs(left[token] - right[token]) for token in left.keys() & right.keys()]
            if token_a != token_b:
                break
    return max(gaps)

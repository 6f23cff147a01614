"""Measuring all attention kernels over all cases, one right after the other."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from vllm_qoq import environment
from vllm_qoq.bench import BenchError, attention_kernels
from vllm_qoq.bench.attempts import EVERYWHERE, Attempts
from vllm_qoq.bench.attention_cases import (
    KERNELS,
    OURS,
    PREFILL_TOKENS,
    WRITTEN_TOKENS,
    Decode,
    Heads,
    pool_blocks,
    pool_bytes,
)
from vllm_qoq.bench.attention_result import AttentionResult
from vllm_qoq.measuring import gpu as timing
from vllm_qoq.measuring.gpu import Call
from vllm_qoq.progress import counted

_SPARE_BYTES = 4e9  # for what else the calls take, and for the code of the peers


def measure(
    heads: Heads, cases: Sequence[Decode], kernels: Sequence[str], quiet: bool
) -> AttentionResult:
    """Measure all `kernels` in all `cases`, in an order that is shuffled for each case."""
    _check_memory(heads, cases, kernels)
    torch.manual_seed(0)
    attempts, order = Attempts(OURS, KERNELS), random.Random(0)
    copy_rate = timing.copy_rate()
    torch.cuda.empty_cache()
    prepared = {}
    for name in kernels:
        blocks = pool_blocks(name, heads, cases)
        work = partial(attention_kernels.PREPARE[name], heads, blocks)
        kernel = attempts.run(name, EVERYWHERE, work)
        if kernel is not None:
            prepared[name] = kernel

    def all_of(where: str, calls: Mapping[str, Callable[[], list[Call]]]) -> dict[str, float]:
        """Measure the seconds of a call of each kernel."""
        measured = {}
        for name in order.sample(list(kernels), len(kernels)):
            if name in calls:
                seconds = attempts.run(name, where, partial(_seconds, calls[name]))
                if seconds is not None:
                    measured[name] = seconds
            advance()
        return measured

    seconds: dict[Decode, dict[str, float]] = {}
    with counted("measure", (len(cases) + 2) * len(kernels), quiet) as advance:
        for case in cases:
            decodes = {name: partial(kernel.decode, case) for name, kernel in prepared.items()}
            seconds[case] = all_of(str(case), decodes)
        writes = {name: kernel.write for name, kernel in prepared.items()}
        write_seconds = all_of(f"write of {WRITTEN_TOKENS} tokens", writes)
        prompts = {name: kernel.prefill for name, kernel in prepared.items() if kernel.prefill}
        prefill_seconds = all_of(f"prompt of {PREFILL_TOKENS} tokens", prompts)
    return AttentionResult(
        heads=heads,
        device=torch.cuda.get_device_name(),
        environment={**environment.describe(), "cuda": torch.version.cuda},
        copy_rate=copy_rate,
        cases=tuple(cases),
        kernels=tuple(kernels),
        seconds=seconds,
        write_seconds=write_seconds,
        prefill_seconds=prefill_seconds,
        left_out=tuple(attempts.left_out),
    )


def _seconds(prepare: Callable[[], list[Call]]) -> float:
    """Measure the seconds of a call; ArithmeticError for an output that is not finite.

    The output is NaN before the first call, so that what the call leaves out is found.
    """
    calls = prepare()
    if not calls[0]().isfinite().all():
        raise ArithmeticError("the output has numbers that are not finite")
    return timing.seconds(calls)


def _check_memory(heads: Heads, cases: Sequence[Decode], kernels: Sequence[str]) -> None:
    """Raise BenchError where the GPU's memory does not hold the caches of all kernels at once."""
    needed = sum(pool_bytes(name, heads, cases) for name in kernels) + _SPARE_BYTES
    free, _ = torch.cuda.mem_get_info()
    if needed > free:
        raise BenchError(
            f"the caches need {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB of the GPU's memory "
            "are free; measure fewer or smaller --cases, or fewer --kernels"
        )

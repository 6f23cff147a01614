"""Measuring all kernels of `bench gemm` over all cases, one right after the other."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from vllm_qoq import environment
from vllm_qoq.bench import peers
from vllm_qoq.bench.attempts import Attempts
from vllm_qoq.bench.cases import LAYERS, SHAPES, Case
from vllm_qoq.bench.int8_rate import int8_rate
from vllm_qoq.bench.result import Result
from vllm_qoq.measuring import gpu as timing
from vllm_qoq.progress import counted


def measure(model: str, tokens: Sequence[int], kernels: Sequence[str], quiet: bool) -> Result:
    """Measure all `kernels` in every layer of `model` for every number of `tokens`.

    The kernels of a case are measured one after the other, in an order that is shuffled for each
    case, so that none always runs on a GPU which the same other kernel has warmed up.
    """
    torch.manual_seed(0)
    attempts, order = Attempts(), random.Random(0)
    shapes = SHAPES[model]
    copy_rate = timing.copy_rate()
    tensor_core_rate = int8_rate()
    _compile(shapes, tokens, kernels, attempts, quiet=quiet)

    seconds: dict[Case, dict[str, float]] = {}
    with counted("measure", len(shapes) * len(tokens) * len(kernels), quiet) as advance:
        for layer, (n, k) in zip(LAYERS, shapes, strict=True):
            prepared = _prepare(n, k, kernels, attempts)
            for m in tokens:
                shuffled = order.sample(list(kernels), len(kernels))
                case = Case(layer, n, k, m)
                seconds[case] = _case(case, shuffled, prepared, attempts=attempts, advance=advance)
            # The weights of all kernels are some GB, and layers of torch are in cycles.
            prepared.clear()
            gc.collect()
            torch.cuda.empty_cache()
    return Result(
        model=model,
        device=torch.cuda.get_device_name(),
        environment=_environment(),
        copy_rate=copy_rate,
        int8_rate=tensor_core_rate,
        tokens=tuple(tokens),
        kernels=tuple(kernels),
        seconds=seconds,
        left_out=tuple(attempts.left_out),
    )


def _compile(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    kernels: Sequence[str],
    attempts: Attempts,
    quiet: bool,
) -> None:
    """Compile kernels in threads; what fails here fails again, and is reported, when measured."""
    jobs: list[Callable[[], object]] = []
    for name in kernels:
        if name in peers.COMPILE:
            listed = partial(peers.COMPILE[name], shapes, tokens)
            jobs += attempts.run(name, "while compiling", listed) or ()
    if not jobs:
        return
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        futures = [pool.submit(job) for job in jobs]
        with counted("compile", len(futures), quiet) as advance:
            for future in futures:
                future.exception()
                advance()
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare(n: int, k: int, kernels: Sequence[str], attempts: Attempts) -> dict[str, peers.Calls]:
    prepared = {}
    for name in kernels:
        if name not in attempts.absent:
            calls = attempts.run(name, f"N={n} K={k}", partial(peers.PREPARE[name], n, k))
            if calls is not None:
                prepared[name] = calls
    return prepared


def _case(
    case: Case,
    kernels: Sequence[str],
    prepared: Mapping[str, peers.Calls],
    attempts: Attempts,
    advance: Callable[[], object],
) -> dict[str, float]:
    """Measure the seconds of a call of each kernel."""
    measured = {}
    for name in kernels:
        if name in prepared:
            work = partial(_seconds, prepared[name], case.m)
            seconds = attempts.run(name, f"N={case.n} K={case.k} M={case.m}", work)
            if seconds is not None:
                measured[name] = seconds
        advance()
    return measured


def _seconds(calls: peers.Calls, m: int) -> float:
    return timing.seconds(calls(m))


def _environment() -> dict[str, Any]:
    """Describe the environment, with the CUDA of torch and the peers' package."""
    found = environment.describe()
    try:
        found["packages"]["humming-kernels"] = version("humming-kernels")
    except PackageNotFoundError:
        found["packages"]["humming-kernels"] = None
    return {**found, "cuda": torch.version.cuda}

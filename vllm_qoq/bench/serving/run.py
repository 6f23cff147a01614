"""Runs the engines of a job one after the other, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_qoq.bench import BenchError
from vllm_qoq.bench.serving import process, work
from vllm_qoq.bench.serving.cases import FULL, Lengths, fitting
from vllm_qoq.bench.serving.floor import Limits
from vllm_qoq.bench.serving.job import CheckedJob, Job, Subject
from vllm_qoq.bench.serving.records import Facts, Measured, read
from vllm_qoq.bench.serving.result import Engine, Result
from vllm_qoq.environment import describe
from vllm_qoq.progress import say

_POLL_SECONDS = 0.5
_LIMITS_SECONDS = 180
_LIMITS = "limits.json"


def measure(checked: CheckedJob, quiet: bool) -> Result:
    """Measure all engines, or what there is time for; what was measured earlier is taken over.

    Raises BenchError where nothing could be measured.
    """
    job = checked.job
    ends = None if job.minutes is None else time.monotonic() + 60 * job.minutes
    environment = describe()
    with work.opened(job.work_dir):
        _prepare(checked, environment)
        device, limits = _limits(job, environment, quiet)
        engines = [_engine(subject, job.work_dir, ends, quiet) for subject in checked.subjects]
    work.require_results(job.work_dir, {engine.name: _why_none(engine) for engine in engines})
    return Result(
        model=job.model,
        config=checked.model,
        device=device,
        limits=limits,
        environment=environment,
        lengths=job.lengths,
        batches=job.batches,
        most=job.most,
        repeats=job.repeats,
        engine_args=dict(job.engine_args),
        engines=tuple(engines),
    )


def _why_none(engine: Engine) -> str | None:
    if engine.measured:
        return None
    return engine.left_out or engine.too_large or "its KV cache holds no request"


def clean(checked: CheckedJob, result: Result) -> None:
    """Delete the files of a run that is done, and the work folder if nothing else is in it.

    All stays where an engine was stopped, so that a run that goes on has what the others measured.
    """
    work_dir = checked.job.work_dir
    engines = {engine.name: engine for engine in result.engines}
    for subject in checked.subjects:
        measured = list(engines[subject.name].measured)
        if not _is_complete(subject, engines[subject.name].facts, measured):
            return
    for name in engines:
        work.delete(work_dir, name)
    (work_dir / _LIMITS).unlink(missing_ok=True)
    work.close(work_dir)


def _prepare(checked: CheckedJob, environment: Mapping[str, Any]) -> None:
    """Write the requests; raise BenchError where the folder has results of another kind of run."""
    work_dir = checked.job.work_dir
    requests = {
        subject.name: subject.request.model_copy(
            update={"fingerprint": _fingerprint(subject, environment)}
        )
        for subject in checked.subjects
    }
    work.prepare(work_dir, requests, checked.job.resume)
    for subject in checked.subjects:
        work.write_config(work_dir, subject)


def _fingerprint(subject: Subject, environment: Mapping[str, Any]) -> str:
    """Digest all that a result depends on, but for its lengths and batch.

    An engine has room for the largest batch and the longest request, which takes from its pool.
    """
    request = subject.request
    return work.fingerprint(
        {
            "model": work.identity(subject),
            "engine_args": request.engine_args,
            "repeats": request.repeats,
            "largest": request.sizes[-1],
            "longest": max(map(sum, request.lengths)),
        },
        environment,
    )


def _limits(job: Job, environment: Mapping[str, Any], quiet: bool) -> tuple[str, Limits | None]:
    """Measure the card in a process of its own, or read what an earlier run has measured of it."""
    file, expected = job.work_dir / _LIMITS, work.fingerprint({}, environment)
    found = None if job.resume == "never" else _read_limits(file, expected)
    if found is None:
        if not quiet:
            say("measuring the limits of the card")
        found = {**_measure_limits(), "fingerprint": expected}
        file.write_text(json.dumps(found), encoding="utf-8")
    if found["copy_rate"] is None:
        return found["device"], None
    return found["device"], Limits(found["copy_rate"], found["operations"])


def _measure_limits() -> dict[str, Any]:
    command = [sys.executable, "-m", "vllm_qoq.bench.serving.limits"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_LIMITS_SECONDS)
    except subprocess.TimeoutExpired:
        raise BenchError(
            f"the limits of the card were not measured in {_LIMITS_SECONDS} s; is it in use?"
        ) from None
    if done.returncode:
        raise BenchError("the limits of the card could not be measured, see above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # vLLM logs to stdout, too
    return found


def _read_limits(file: Path, expected: str) -> dict[str, Any] | None:
    """Read the limits of this card; None where the file has none, or those of another card."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(found, dict) and found.get("fingerprint") == expected
    return found if is_ours else None


def _engine(subject: Subject, work_dir: Path, ends: float | None, quiet: bool) -> Engine:
    """Run the process of an engine to its end, or to the end of the time."""
    _, records, log = work.files(work_dir, subject.name)
    left_out = None
    if _is_complete(subject, *read(records)):
        if not quiet:
            say(f"{subject.name}: measured earlier")
    elif ends is not None and time.monotonic() >= ends:
        left_out = "no time was left (--minutes)"
    else:
        if not quiet:
            say(f"{subject.name}: starting an engine{subject.weights_in_words} ({log})")
        code = _run(subject, work_dir, ends, quiet)
        if code is None:
            left_out = "the time was over (--minutes)"
        elif code:
            left_out = process.reason(log, code)
        if left_out is not None:
            say(f"{subject.name}: stopped: {left_out}")
    facts, measured = read(records)
    wanted = _cases(subject, facts)
    return Engine(
        name=subject.name,
        is_ours=subject.is_ours,
        format=subject.format,
        facts=facts,
        weights_gib=process.weights_gib(log),
        measured=tuple(one for one in measured if one.case in wanted),
        left_out=left_out,
        too_large=_too_large(subject, facts, wanted),
    )


def _cases(subject: Subject, facts: Facts | None) -> set[tuple[Lengths, int]]:
    """List what is to be measured with an engine; nothing before it is known what it holds."""
    request = subject.request
    return {
        (Lengths(*pair), batch)
        for pair in request.lengths
        if facts is not None
        for batch in fitting(
            request.batches, request.sizes, Lengths(*pair), facts.pool_blocks, facts.block_tokens
        )
    }


def _too_large(
    subject: Subject, facts: Facts | None, wanted: set[tuple[Lengths, int]]
) -> str | None:
    """Say which batches an engine does not hold; None where it holds all that are asked."""
    request = subject.request
    asked = {
        (Lengths(*pair), int(batch))
        for pair in request.lengths
        for batch in request.batches
        if batch != FULL
    }
    if facts is None or not (missing := sorted(asked - wanted)):
        return None
    named = ", ".join(f"{batch} at {one}" for one, batch in missing)
    return f"batches that its pool of {facts.pool_tokens:,} tokens does not hold: {named}"


def _is_complete(subject: Subject, facts: Facts | None, measured: list[Measured]) -> bool:
    """Whether an earlier run has measured all that is asked, so that no engine need start."""
    return facts is not None and _cases(subject, facts) <= {one.case for one in measured}


def _run(subject: Subject, work_dir: Path, ends: float | None, quiet: bool) -> int | None:
    """Run an engine's process; returns its exit code, None where the time ended first."""
    request, records, log = work.files(work_dir, subject.name)
    command = [sys.executable, "-m", "vllm_qoq.bench.serving.engine", str(request), str(records)]
    _, told = read(records)
    with log.open("w") as file, process.session(command, file) as running:
        while True:
            with suppress(subprocess.TimeoutExpired):
                running.wait(_POLL_SECONDS)
            _, measured = read(records)
            if not quiet:
                for one in measured[len(told) :]:
                    say(f"{subject.name}: {_progress(one)}")
            told = measured
            if running.returncode is not None:
                return running.returncode
            if ends is not None and time.monotonic() >= ends:
                return None


def _progress(one: Measured) -> str:
    step = "" if one.step_seconds is None else f", {1e3 * one.step_seconds:.2f} ms a step"
    return f"{one.prompt}/{one.new}, batch {one.batch}: {one.tokens_per_second:.0f} tokens/s{step}"

"""Runs the engines of a job one after the other, each in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from vllm_qoq.bench import BenchError
from vllm_qoq.bench.serving.cases import Lengths, fitting
from vllm_qoq.bench.serving.floor import Limits
from vllm_qoq.bench.serving.job import CheckedJob, Subject
from vllm_qoq.bench.serving.records import Facts, Measured, Request, read
from vllm_qoq.bench.serving.result import Engine, Result
from vllm_qoq.environment import describe
from vllm_qoq.errors import printable
from vllm_qoq.models.config import CONFIG
from vllm_qoq.progress import say

_POLL_SECONDS = 0.5
_LIMITS_SECONDS = 180
_LIMITS = "limits.json"
_LONGEST_REASON = 300
# Lines of a log that say only that something above them failed.
_FOLLOWING = re.compile(r"Engine core initialization failed|EngineDeadError|See root cause above")
_ERROR = re.compile(r"(?:^|\s)([\w.]*(?:Error|Exception|Refusal)): (.+)")
_LOADED = re.compile(r"[Mm]odel loading took ([\d.]+) GiB")


def measure(checked: CheckedJob, quiet: bool) -> Result:
    """Measure all engines, or what there is time for; what was measured earlier is taken over.

    Raises BenchError where nothing could be measured.
    """
    job = checked.job
    ends = None if job.minutes is None else time.monotonic() + 60 * job.minutes
    _prepare(checked)
    try:
        device, limits = _limits(job.work_dir, quiet)
        engines = [_engine(subject, job.work_dir, ends, quiet) for subject in checked.subjects]
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"results so far are in {job.work_dir}; the same command goes on from there"
        ) from None
    if not any(engine.measured for engine in engines):
        reasons = "; ".join(f"{engine.name}: {engine.left_out}" for engine in engines)
        raise BenchError(f"nothing could be measured: {reasons}; logs are in {job.work_dir}")
    return Result(
        model=job.model,
        config=checked.model,
        device=device,
        limits=limits,
        environment=describe(),
        lengths=job.lengths,
        batches=job.batches,
        engine_args=dict(job.engine_args),
        engines=tuple(engines),
    )


def clean(checked: CheckedJob, result: Result) -> None:
    """Delete the files of finished engines, and the work folder if nothing else is in it.

    Of an engine that was stopped its log stays, and what it had measured for a run that goes on.
    """
    work = checked.job.work_dir
    finished = {engine.name for engine in result.engines if engine.left_out is None}
    for subject in checked.subjects:
        if subject.name not in finished:
            continue
        for file in (*_files(work, subject), work / subject.name / CONFIG):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            (work / subject.name).rmdir()
    if len(finished) == len(checked.subjects):
        (work / _LIMITS).unlink(missing_ok=True)
        with suppress(OSError):
            work.rmdir()


def _files(work: Path, subject: Subject) -> tuple[Path, Path, Path]:
    """Name the request, the records and the log of an engine."""
    request, records, log = (work / f"{subject.name}.{kind}" for kind in ("json", "jsonl", "log"))
    return request, records, log


def _prepare(checked: CheckedJob) -> None:
    """Write the requests; raise BenchError where the folder has results of another kind of run."""
    work, resume = checked.job.work_dir, checked.job.resume
    environment = describe()
    for subject in checked.subjects:
        request, records, _ = _files(work, subject)
        if resume == "required" and not records.exists():
            raise BenchError(f"{records}: does not exist, so there is nothing to go on with")
        if resume != "never" and records.exists():
            _check_same(request, _fingerprint(subject, environment))
    work.mkdir(parents=True, exist_ok=True)
    for subject in checked.subjects:
        request, records, _ = _files(work, subject)
        if resume == "never":
            records.unlink(missing_ok=True)
        asked = {**subject.request.model_dump(), "fingerprint": _fingerprint(subject, environment)}
        request.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
        if subject.config is not None:
            folder = work / subject.name
            folder.mkdir(exist_ok=True)
            (folder / CONFIG).write_text(json.dumps(subject.config, indent=1) + "\n")


def _fingerprint(subject: Subject, environment: Mapping[str, Any]) -> str:
    """Digest all that a result depends on, but for its lengths and batch."""
    request = subject.request
    depends = {
        "config": subject.config or request.model,
        "engine_args": request.engine_args,
        "repeats": request.repeats,
        "packages": environment["packages"],
        "gpus": [gpu["name"] for gpu in environment["gpus"] or ()],
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def _check_same(request: Path, fingerprint: str) -> None:
    try:
        found = Request.model_validate_json(request.read_text(encoding="utf-8")).fingerprint
    except (ValidationError, OSError):
        found = ""
    if found != fingerprint:
        raise BenchError(
            f"{request}: is of a run with another engine, GPU or version; choose another "
            "--work-dir, or begin anew: --resume never"
        )


def _limits(work: Path, quiet: bool) -> tuple[str, Limits | None]:
    """Measure the card in a process of its own, or read what an earlier run has measured."""
    file = work / _LIMITS
    if not file.exists():
        if not quiet:
            say("measuring the limits of the card")
        command = [sys.executable, "-m", "vllm_qoq.bench.serving.limits"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_LIMITS_SECONDS)
        if done.returncode:
            raise BenchError("the limits of the card could not be measured, see above")
        # The last line, because vLLM logs to stdout, too.
        file.write_text(done.stdout.splitlines()[-1], encoding="utf-8")
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["copy_rate"] is None:
        return found["device"], None
    return found["device"], Limits(found["copy_rate"], found["operations"])


def _engine(subject: Subject, work: Path, ends: float | None, quiet: bool) -> Engine:
    """Run the process of an engine to its end, or to the end of the time."""
    _, records, log = _files(work, subject)
    left_out = None
    if _is_complete(subject, *read(records)):
        if not quiet:
            say(f"{subject.name}: measured earlier")
    elif ends is not None and time.monotonic() >= ends:
        left_out = "no time was left (--minutes)"
    else:
        if not quiet:
            say(f"{subject.name}: starting an engine ({log})")
        code = _run(subject, work, ends, quiet)
        if code is None:
            left_out = "the time was over (--minutes)"
        elif code:
            left_out = _reason(log, code)
        if left_out is not None:
            say(f"{subject.name}: stopped: {left_out}")
    facts, measured = read(records)
    return Engine(
        name=subject.name,
        is_ours=subject.is_ours,
        format=subject.format,
        facts=facts,
        weights_gib=_weights_gib(log),
        measured=tuple(measured),
        left_out=left_out,
    )


def _is_complete(subject: Subject, facts: Facts | None, measured: list[Measured]) -> bool:
    """Whether an earlier run has measured all that is asked, so that no engine need start."""
    request, done = subject.request, {one.case for one in measured}
    return facts is not None and all(
        (Lengths(*pair), batch) in done
        for pair in request.lengths
        for batch in fitting(
            request.batches, request.sizes, Lengths(*pair), facts.pool_blocks, facts.block_tokens
        )
    )


def _run(subject: Subject, work: Path, ends: float | None, quiet: bool) -> int | None:
    """Run an engine's process; returns its exit code, None where the time ended first."""
    request, records, log = _files(work, subject)
    command = [sys.executable, "-m", "vllm_qoq.bench.serving.engine", str(request), str(records)]
    _, told = read(records)
    with log.open("w") as file, _process(command, file) as process:
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
            _, measured = read(records)
            if not quiet:
                for one in measured[len(told) :]:
                    say(f"{subject.name}: {_progress(one)}")
            told = measured
            if process.returncode is not None:
                return process.returncode
            if ends is not None and time.monotonic() >= ends:
                return None


@contextmanager
def _process(command: list[str], log: IO[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in a session of its own, and end all of the session with the block.

    vLLM's engine is a child of that process, which may outlive it.
    """
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _progress(one: Measured) -> str:
    step = "" if one.step_seconds is None else f", {1e3 * one.step_seconds:.2f} ms a step"
    return f"{one.prompt}/{one.new}, batch {one.batch}: {one.tokens_per_second:.0f} tokens/s{step}"


def _reason(log: Path, code: int) -> str:
    """Find in an engine's log why its process ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [match for line in lines if (match := _ERROR.search(line))]
    causes = [match for match in found if not _FOLLOWING.search(match[0])] or found
    if not causes:
        return f"the engine's process ended with {code}; its log is {log}"
    return printable(f"{causes[-1][1]}: {causes[-1][2]}"[:_LONGEST_REASON])


def _weights_gib(log: Path) -> float | None:
    """Read from vLLM's log how many GiB the weights took; None where it does not say."""
    if not log.exists():
        return None
    said = _LOADED.search(log.read_text(encoding="utf-8", errors="replace"))
    return float(said[1]) if said else None

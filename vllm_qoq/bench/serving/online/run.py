"""Serves the subjects of a job one after the other, and asks each at every rate."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from typing import Any

from vllm_qoq.bench.serving import process, work
from vllm_qoq.bench.serving.job import Subject
from vllm_qoq.bench.serving.online import client
from vllm_qoq.bench.serving.online.job import OnlineJob
from vllm_qoq.bench.serving.online.records import Asked, Measured, case_of
from vllm_qoq.bench.serving.online.result import Online, Served
from vllm_qoq.bench.serving.online.server import Stopped, serving
from vllm_qoq.bench.serving.online.tokenizer import FILES, write_tokenizer
from vllm_qoq.bench.serving.records import read_lines
from vllm_qoq.environment import describe
from vllm_qoq.models.config import CONFIG
from vllm_qoq.progress import say


def measure(job: OnlineJob, quiet: bool) -> Online:
    """Measure all servers, or what there is time for; what was measured earlier is taken over.

    Raises BenchError where nothing could be measured.
    """
    asked = job.checked.job
    ends = None if asked.minutes is None else time.monotonic() + 60 * asked.minutes
    environment = describe()
    with work.opened(asked.work_dir):
        _prepare(job, environment)
        servers = [_serve(job, subject, ends, quiet) for subject in job.checked.subjects]
    reasons = {server.name: None if server.measured else server.left_out for server in servers}
    work.require_results(asked.work_dir, reasons)
    return Online(
        model=asked.model,
        device=_device(environment),
        environment=environment,
        load=job.load,
        engine_args=dict(asked.engine_args),
        servers=tuple(servers),
    )


def clean(job: OnlineJob, result: Online) -> None:
    """Delete the files of a run that is done, and the work folder if nothing else is in it.

    All stays where a server was stopped, so that a run that goes on has what the others measured.
    """
    if any(server.left_out for server in result.servers):
        return
    for server in result.servers:
        work.delete(job.checked.job.work_dir, server.name, (CONFIG, *FILES))
    work.close(job.checked.job.work_dir)


def _prepare(job: OnlineJob, environment: Mapping[str, Any]) -> None:
    """Write what is asked, and the models with dummy weights.

    Raises BenchError where the folder has results of another kind of run.
    """
    work_dir = job.checked.job.work_dir
    requests = {
        subject.name: _asked(subject, job.engine_args[subject.name], environment)
        for subject in job.checked.subjects
    }
    work.prepare(work_dir, requests, job.checked.job.resume)
    for subject in job.checked.subjects:
        work.write_config(work_dir, subject)
        if subject.config is not None:
            write_tokenizer(work_dir / subject.name, subject.request.vocabulary)


def _asked(
    subject: Subject, engine_args: Mapping[str, Any], environment: Mapping[str, Any]
) -> Asked:
    model = subject.request.model
    depends = {
        "benchmark": "online",
        "model": work.identity(subject),
        "engine_args": dict(engine_args),
    }
    return Asked(
        model=model,
        engine_args=dict(engine_args),
        fingerprint=work.fingerprint(depends, environment),
    )


def _serve(job: OnlineJob, subject: Subject, ends: float | None, quiet: bool) -> Served:
    """Measure the rates of a subject that are not yet, or those for which there is time."""
    _, records, log = work.files(job.checked.job.work_dir, subject.name)
    done = {one.case for one in read_lines(records, Measured)}
    rates = [rate for rate in job.load.rates if case_of(job.load, rate) not in done]
    left_out = None
    if not rates:
        if not quiet:
            say(f"{subject.name}: measured earlier")
    elif ends is not None and time.monotonic() >= ends:
        left_out = "no time was left (--minutes)"
    else:
        if not quiet:
            say(f"{subject.name}: starting a server{subject.weights_in_words} ({log})")
        try:
            _ask(job, subject, rates, ends, quiet)
        except Stopped as stop:
            left_out = str(stop)
    if left_out is not None:
        say(f"{subject.name}: stopped: {left_out}")
    wanted = {case_of(job.load, rate) for rate in job.load.rates}
    return Served(
        name=subject.name,
        is_ours=subject.is_ours,
        format=subject.format,
        weights_gib=process.weights_gib(log),
        measured=tuple(one for one in read_lines(records, Measured) if one.case in wanted),
        left_out=left_out,
    )


def _ask(
    job: OnlineJob, subject: Subject, rates: list[float], ends: float | None, quiet: bool
) -> None:
    """Serve a subject and write down what is measured at each rate."""
    _, records, log = work.files(job.checked.job.work_dir, subject.name)
    place = job.checked.job.work_dir / subject.name
    model = subject.request.model
    with (
        serving(model, job.engine_args[subject.name], log, ends) as server,
        records.open("a", encoding="utf-8") as file,
    ):
        for rate in rates:
            one = client.ask(server, model, job.load, rate, place, ends)
            file.write(one.model_dump_json() + "\n")
            file.flush()
            if not quiet:
                say(f"{subject.name}: {_progress(one)}")


def _progress(one: Measured) -> str:
    return (
        f"{one.rate:g} requests/s: TTFT {one.ttft_ms:.0f} ms, TPOT {one.tpot_ms:.2f} ms, "
        f"{one.good} of {one.requests} good"
    )


def _device(environment: Mapping[str, Any]) -> str:
    gpus = environment["gpus"]
    return gpus[0]["name"] if gpus else platform.processor() or platform.machine()

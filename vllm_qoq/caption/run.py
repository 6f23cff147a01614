"""Runs a job: starts its engines, gives them shards, and ends with all of them.

Each engine is a process of its own. Where one fails the others stop, too: nothing that is written
is lost, and the same command goes on from there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

from vllm_qoq.caption import devices, folder, journal, status
from vllm_qoq.caption.errors import CaptionError
from vllm_qoq.caption.job import CheckedJob
from vllm_qoq.caption.messages import (
    Ended,
    Failed,
    GiveShard,
    Progress,
    Ready,
    Request,
    Stop,
    WantsShard,
)
from vllm_qoq.caption.pipeline import Counts
from vllm_qoq.caption.records import Outcome
from vllm_qoq.caption.shards import Shard
from vllm_qoq.caption.worker import MakeCaptioner, main, vllm_captioner

_POLL_SECONDS = 1.0
# A step of an engine, and what is in the writer's hands. The next run does anew what is lost.
_STOP_SECONDS = 60.0
_END_SECONDS = 30.0


@dataclass(frozen=True)
class EngineResult:
    """What one engine did: the GPUs it had, how long it took to start, and its counts."""

    devices: str | None
    start_seconds: float
    counts: Counts


@dataclass(frozen=True)
class Result:
    """A job that has ended.

    outcomes  name -> what became of all its shards
    engines   those of this run; none where everything was finished before
    """

    checked: CheckedJob
    outcomes: dict[str, Outcome]
    engines: tuple[EngineResult, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every sample of every shard has a caption."""
        return all(one.is_complete for one in self.outcomes.values())


def caption(checked: CheckedJob, make: MakeCaptioner = vllm_captioner) -> Result:
    """Caption the shards of the job that are not finished.

    make  starts the engine in each process

    Raises CaptionError where an engine fails, and KeyboardInterrupt on SIGINT, which says what is
    done.
    """
    job = checked.job
    with folder.opened(job.out, checked.run, job.label, checked.division):
        for shard in checked.shards:
            if shard.name in checked.finished:
                journal.clean(job.out, shard)
        if not checked.pending:
            return Result(checked, dict(checked.finished), ())
        return _Run(checked, make).to_the_end()


@dataclass
class _Engine:
    """An engine's process, its end of the pipe to us, and what is known of it."""

    process: BaseProcess
    pipe: connection.Connection
    request: Request
    log: Path
    ready: Ready | None = None
    counts: Counts = field(default_factory=Counts)
    has_ended: bool = False

    @property
    def name(self) -> str:
        where = self.request.devices
        return "the engine" if where is None else f"the engine of GPU {where}"

    def send(self, message: object) -> None:
        with suppress(OSError):  # where it has died, the loop finds out
            self.pipe.send(message)

    def kill(self) -> None:
        """End its session, which a process makes when it begins."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()


class _Run:
    def __init__(self, checked: CheckedJob, make: MakeCaptioner) -> None:
        self._checked, self._make = checked, make
        self._shards: deque[Shard] = deque(checked.pending)
        self._outcomes = dict(checked.finished)
        self._engines: list[_Engine] = []
        self._is_stopping = False

    def to_the_end(self) -> Result:
        job, pending = self._checked.job, self._checked.pending
        size = sum(shard.bytes for shard in pending)
        with status.shown(size, len(pending), job.quiet) as shown:
            self._work(shown)
        return Result(
            self._checked,
            {shard.name: self._outcome_of(shard) for shard in self._checked.shards},
            tuple(
                EngineResult(
                    one.request.devices, one.ready.seconds if one.ready else 0.0, one.counts
                )
                for one in self._engines
            ),
        )

    def _work(self, shown: status.Status) -> None:
        try:
            for index, where in enumerate(self._checked.devices):
                self._engines.append(self._start(index, where))
            while self._alive():
                self._wait(_POLL_SECONDS)
                shown.show(*self._progress())
            self._join()
            for engine in self._engines:
                engine.log.unlink(missing_ok=True)
        except BaseException as error:
            self._stop()
            shown.show_last(*self._progress())
            self._join()
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(self._state(may_repeat=True)) from None
            raise
        finally:
            for engine in self._engines:
                if engine.process.is_alive():
                    engine.kill()
                engine.pipe.close()

    def _progress(self) -> tuple[list[Counts], int]:
        """What each engine has done, and how many shards they have finished."""
        finished = len(self._outcomes) - len(self._checked.finished)
        return [one.counts for one in self._engines], finished

    def _outcome_of(self, shard: Shard) -> Outcome:
        found = self._outcomes.get(shard.name) or journal.finished(self._checked.job.out, shard)
        if found is None:
            raise RuntimeError(f"{shard.name}: is not finished, and no engine has failed")
        return found

    def _start(self, index: int, where: str | None) -> _Engine:
        job, count = self._checked.job, len(self._checked.devices)
        log = (job.out / f"{folder.PREFIX}.{job.label}.engine-{index}.log").absolute()
        log.unlink(missing_ok=True)
        request = Request(
            out=job.out.absolute(),
            model=str(job.model.absolute()),
            name=job.model_name,
            prompt=job.prompt,
            system_prompt=job.system_prompt,
            max_tokens=job.max_tokens,
            temperature=job.temperature,
            engine_args=job.engine_args,
            retry_failed=job.retry_failed,
            devices=where,
            processors=devices.processors(count)[index] if where is None and count > 1 else None,
            decoders=self._checked.decoders,
            log=log,
        )
        # A fork of a process in which torch was imported may not use CUDA.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=main, args=(theirs, request, self._make))
        process.start()
        theirs.close()
        return _Engine(process, ours, request, log)

    def _alive(self) -> list[_Engine]:
        return [engine for engine in self._engines if not engine.has_ended]

    def _wait(self, seconds: float) -> None:
        """Answer what engines say within the time; raises CaptionError where one has failed."""
        alive = self._alive()
        said = connection.wait([engine.pipe for engine in alive], seconds)
        for engine in alive:
            if engine.pipe in said:
                try:
                    message = engine.pipe.recv()
                except (EOFError, OSError):
                    self._died(engine)
                self._answer(engine, message)
            elif engine.process.exitcode is not None and not engine.pipe.poll():
                self._died(engine)

    def _answer(self, engine: _Engine, message: object) -> None:
        if isinstance(message, Ready):
            engine.ready = message
        elif isinstance(message, WantsShard):
            has_more = self._shards and not self._is_stopping
            engine.send(GiveShard(self._shards.popleft() if has_more else None))
        elif isinstance(message, Progress):
            engine.counts = message.counts
            if message.finished is not None:
                self._outcomes[message.finished.shard] = message.finished
        elif isinstance(message, Ended):
            engine.counts, engine.has_ended = message.counts, True
        elif isinstance(message, Failed):
            engine.has_ended = True
            raise CaptionError(
                f"{engine.name}: {message.message}; {self._after(engine, not message.is_refusal)}"
            )

    def _died(self, engine: _Engine) -> NoReturn:
        engine.has_ended = True
        engine.kill()
        engine.process.join(_END_SECONDS)
        code = engine.process.exitcode
        raise CaptionError(
            f"{engine.name}: its process ended with {code}, as it does for want of memory; "
            f"{self._after(engine, may_repeat=True)}"
        )

    def _after(self, engine: _Engine, may_repeat: bool) -> str:
        state = self._state(may_repeat)
        return f"its log is {engine.log}{'; ' if state else ''}{state}"

    def _stop(self) -> None:
        """Let all engines write what they have done, for a while; a second Ctrl-C does not wait."""
        self._is_stopping = True
        for engine in self._alive():
            if engine.ready is None:
                engine.has_ended = True
                engine.kill()
            else:
                engine.send(Stop())
        ends = time.monotonic() + _STOP_SECONDS
        while self._alive() and time.monotonic() < ends:
            with suppress(CaptionError):  # the first error is the one that is told
                self._wait(_POLL_SECONDS)

    def _join(self) -> None:
        """Give the processes that have said their last the time to end what they started."""
        ends = time.monotonic() + _END_SECONDS
        for engine in self._engines:
            if engine.has_ended:
                engine.process.join(max(0, ends - time.monotonic()))

    def _state(self, may_repeat: bool) -> str:
        """Say where captions are, if there are any, and what the same command does."""
        out = self._checked.job.out
        if not folder.has_captions(out):
            return "there are no captions yet; the same command begins anew" if may_repeat else ""
        more = "; the same command goes on there" if may_repeat else ""
        return f"captions so far are in {out}{more}"

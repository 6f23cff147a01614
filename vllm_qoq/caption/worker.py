"""The process of one engine: it asks for shards, captions them, and says what it has done.

It leads a session of its own, which its engine is in, too. Where the process that started it ends
without a word, all of the session does.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

from vllm_qoq.caption.messages import Ended, Failed, GiveShard, Progress, Ready, Request, WantsShard
from vllm_qoq.caption.pipeline import Captioner, Pipeline
from vllm_qoq.caption.records import Outcome
from vllm_qoq.caption.shards import Shard
from vllm_qoq.errors import EngineError, UserError, reason

MakeCaptioner = Callable[[Request], Captioner]
"""Makes the engine of a process, in that process."""


def vllm_captioner(request: Request) -> Captioner:
    """Start vLLM, whose processes are no forks of this one, which has threads."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm_qoq.caption.engine import Engine

    return Engine(request)


def main(pipe: Connection, request: Request, make: MakeCaptioner) -> None:
    """Serve the process at the other end of the pipe until there are no more shards."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if request.log is not None:
        _print_into(str(request.log))
    if request.devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = request.devices
    if request.processors is not None:
        os.sched_setaffinity(0, request.processors)
    # The log would have a line for each odd image.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        _serve(_Pipe(pipe), request, make)
    except (UserError, EngineError, OSError) as error:
        pipe.send(Failed(_message(error), is_refusal=not isinstance(error, OSError)))
        _log()
    except Exception as error:
        pipe.send(Failed(f"{type(error).__name__}: {reason(error)}", is_refusal=False))
        _log()


def _log() -> None:
    with suppress(OSError):  # the disk may be full
        traceback.print_exc()


class _Pipe:
    """The pipe, written to by several threads, and read by one of its own."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._guard = threading.Lock()
        self._shards: queue.SimpleQueue[Shard | None] = queue.SimpleQueue()
        self._stop: Callable[[], None] | None = None
        self._is_stopped = False
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, message: object) -> None:
        with self._guard:
            self._pipe.send(message)

    def next_shard(self) -> Shard | None:
        self.send(WantsShard())
        return self._shards.get()

    def on_stop(self, stop: Callable[[], None]) -> None:
        with self._guard:
            self._stop = stop
            is_late = self._is_stopped
        if is_late:
            stop()

    def _listen(self) -> None:
        while True:
            try:
                message = self._pipe.recv()
            except (EOFError, OSError):
                os.killpg(0, signal.SIGKILL)
            if isinstance(message, GiveShard):
                self._shards.put(message.shard)
            else:
                with self._guard:
                    self._is_stopped, stop = True, self._stop
                if stop is not None:
                    stop()


def _serve(pipe: _Pipe, request: Request, make: MakeCaptioner) -> None:
    started = time.perf_counter()
    captioner = make(request)
    pipe.send(Ready(time.perf_counter() - started))

    def report(finished: Outcome | None) -> None:
        pipe.send(Progress(pipeline.counts, finished))

    pipeline = Pipeline(
        captioner,
        request.out,
        request.name,
        pipe.next_shard,
        report,
        request.decoders,
        request.retry_failed,
    )
    pipe.on_stop(pipeline.stop)
    try:
        pipeline.run()
        pipe.send(Ended(pipeline.counts))
    finally:
        captioner.close()


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; look whether its disk is full or fails"
    return str(error)


def _print_into(name: str) -> None:
    """Send all that this process and its children print into a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)

"""How far a job is: a bar on a terminal, elsewhere a line now and then, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vllm_qoq.caption.pipeline import Counts
from vllm_qoq.progress import duration

_LINE_SECONDS = 10.0


class Status:
    """Shows the sum of what the engines have done; `bytes` is the size of all shards."""

    def __init__(self, size: int, shards: int) -> None:
        self._bytes, self._shards = size, shards
        self._started = self._shown = time.monotonic()

    def show(self, engines: Sequence[Counts], finished: int) -> None:
        """Show it, if it is time."""
        now = time.monotonic()
        if now - self._shown < _LINE_SECONDS or not any(one.seconds for one in engines):
            return
        self._shown = now
        print(self._text(engines, finished), file=sys.stderr, flush=True)

    def show_last(self, engines: Sequence[Counts], finished: int) -> None:
        """Show what has been done by a job that ends early, if that is anything."""
        if any(one.images or one.failures for one in engines):
            print(self._text(engines, finished), file=sys.stderr, flush=True)

    def _text(self, engines: Sequence[Counts], finished: int) -> str:
        images = sum(one.images for one in engines)
        failed = sum(sum(one.failures.values()) for one in engines)
        rate = sum(one.images / one.seconds for one in engines if one.seconds)
        done = sum(one.done_bytes for one in engines)
        left = self._bytes - done - sum(one.skipped_bytes for one in engines)
        shards = f"{finished} of {self._shards} shards"
        text = f"captions: {shards}, {images} images, {rate:.1f} images/s"
        if failed:
            text += f", {failed} failed"
        if done:
            seconds = max(one.seconds for one in engines)
            text += f", about {duration(seconds * max(0, left) / done)} left"
        return text


class _Bar(Status):
    def __init__(self, size: int, shards: int) -> None:
        from tqdm import tqdm

        super().__init__(size, shards)
        self.bar = tqdm(total=size, desc="captions", unit="B", unit_scale=True, mininterval=0.5)

    def show(self, engines: Sequence[Counts], finished: int) -> None:
        done = sum(one.done_bytes + one.skipped_bytes for one in engines)
        images = sum(one.images for one in engines)
        failed = sum(sum(one.failures.values()) for one in engines)
        text = f"{finished}/{self._shards} shards, {images} images"
        self.bar.set_postfix_str(f"{text}, {failed} failed" if failed else text, refresh=False)
        self.bar.update(done - self.bar.n)

    def show_last(self, engines: Sequence[Counts], finished: int) -> None:
        self.show(engines, finished)
        self.bar.refresh()


class _Quiet(Status):
    def show(self, engines: Sequence[Counts], finished: int) -> None:
        return

    def show_last(self, engines: Sequence[Counts], finished: int) -> None:
        return


@contextmanager
def shown(size: int, shards: int, quiet: bool) -> Iterator[Status]:
    """Make the status of a job."""
    if quiet:
        yield _Quiet(size, shards)
    elif not sys.stderr.isatty():
        yield Status(size, shards)
    else:
        bar = _Bar(size, shards)
        try:
            yield bar
        finally:
            bar.bar.close()

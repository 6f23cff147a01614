"""Shards in, captions on the disk: reading, decoding, captioning and writing run side by side.

One thread reads samples, shard after shard; several decode images; the caller's thread feeds the
engine, which gets the next image as soon as it has room; one thread writes what the engine has
done. Queues between them are bounded by number and by bytes, so memory is, too, whatever a shard
holds. The reader goes on to the next shard while images of the one before are captioned.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vllm_qoq.caption.bounded import Bounded, Closed
from vllm_qoq.caption.errors import Uncaptioned
from vllm_qoq.caption.image import decode
from vllm_qoq.caption.journal import Journal
from vllm_qoq.caption.records import Caption, FailedSample, Failure, Line, Outcome
from vllm_qoq.caption.shards import Shard
from vllm_qoq.caption.tar import Reader, Sample, Stray

if TYPE_CHECKING:
    from PIL.Image import Image

_FILES, _FILE_BYTES = 64, 256 << 20
_IMAGE_BYTES = 1 << 30
_WHY_STRAY = {
    "no_key": "its name gives no key, which would be what is before the first dot",
    "repeated": "its sample has a file of this name already",
}
# The writer waits so long for more before it makes the disk write.
_GATHER_SECONDS, _GATHER_MOST = 0.5, 512


class Captioner(Protocol):
    """An engine: takes images, and gives captions in any order.

    capacity  images that it takes before one is done
    """

    capacity: int

    def add(self, ticket: int, image: Image, seed: int) -> None:
        """Take an image; raises Uncaptioned where it cannot."""

    def step(self) -> list[tuple[int, Caption | Uncaptioned]]:
        """Work until something may be done; tickets and what became of them."""

    def close(self) -> None:
        """End the processes of the engine."""


@dataclass
class Counts:
    """What a pipeline has done so far.

    images         captions on the disk
    failures       kind -> samples without one
    done_bytes     bytes of the shards whose samples are done
    skipped_bytes  bytes of samples that an earlier run has done
    seconds        since the engine was ready
    idle_seconds   of these, in which the engine had no image
    short_seconds  in which it had some, and room for more that were not decoded yet
    """

    images: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    done_bytes: int = 0
    skipped_bytes: int = 0
    seconds: float = 0.0
    idle_seconds: float = 0.0
    short_seconds: float = 0.0


class _Place(NamedTuple):
    """Where a caption belongs: the sample, its image's file, and its bytes of the shard."""

    journal: Journal
    sample: Sample
    bytes: int

    def line(self, found: Caption | Uncaptioned) -> Line:
        place, key = self.sample.position, self.sample.key
        if isinstance(found, Caption):
            return Line(position=place, key=key, caption=found)
        file = self.sample.member.name if self.sample.member else None
        failure = Failure(kind=found.kind, why=_utf8(found.why), file=file and _utf8(file))
        return Line(position=place, key=_utf8(key), failure=failure)


class _Done(NamedTuple):
    place: _Place
    found: Caption | Uncaptioned


class _End(NamedTuple):
    """The end of a shard that has been read."""

    journal: Journal
    samples: int
    damage: str | None
    ignored: Counter[str]
    strays: dict[str, list[FailedSample]]


class Pipeline:
    """Captions shards with one engine.

    next_shard  gives the next shard, None where there are no more; it may wait
    report      is called, from the thread that writes, after each write, with the outcome of a
                shard that it has finished, or None
    decoders    threads that decode images
    retry       whether samples that failed in an earlier run are tried again
    """

    def __init__(
        self,
        captioner: Captioner,
        out: Path,
        model: str,
        next_shard: Callable[[], Shard | None],
        report: Callable[[Outcome | None], None],
        decoders: int,
        retry: bool = False,
    ) -> None:
        self.counts = Counts()
        self._captioner, self._out, self._model = captioner, out, model
        self._next_shard, self._report, self._retry = next_shard, report, retry
        self._files: Bounded[tuple[_Place, bytes]] = Bounded(_FILES, _FILE_BYTES)
        self._images: Bounded[tuple[_Place, Image]] = Bounded(captioner.capacity, _IMAGE_BYTES)
        self._results: Bounded[_Done | _End] = Bounded(1 << 14, 1)
        self._stopped = threading.Event()
        self._failed: BaseException | None = None
        self._decoding = decoders
        self._guard = threading.Lock()
        self._journals: set[Journal] = set()
        self._decoders = decoders

    def run(self) -> None:
        """Caption until there are no more shards, or until `stop`.

        What the engine has done is on the disk when this returns, also where it raises what went
        wrong in a part.
        """
        threads = [self._begin(self._read), self._begin(self._write)]
        threads += [self._begin(self._decode) for _ in range(self._decoders)]
        try:
            self._caption()
        except Closed:  # the writer has failed
            pass
        except BaseException as error:
            self._fail(error)
        finally:
            if self._stopped.is_set():
                self._drop()
            self._results.close()
            for thread in threads:
                thread.join()
            for journal in self._journals:
                journal.close()
        if self._failed is not None:
            raise self._failed

    def stop(self) -> None:
        """End soon: images that the engine has not done are left to the next run."""
        self._stopped.set()
        self._drop()

    def _begin(self, work: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except Closed:  # another part has ended early
                pass
            except BaseException as error:
                self._fail(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread

    def _fail(self, error: BaseException) -> None:
        with self._guard:
            self._failed = self._failed or error
        self.stop()

    def _drop(self) -> None:
        self._files.close(drop=True)
        self._images.close(drop=True)

    def _read(self) -> None:
        while not self._stopped.is_set() and (shard := self._next_shard()) is not None:
            journal = Journal.open(self._out, shard, self._model, self._retry)
            if journal is not None:
                self._journals.add(journal)
                try:
                    self._read_shard(journal)
                except OSError as error:  # which does not always name the file
                    raise OSError(error.errno, error.strerror, str(shard.path)) from error
        self._files.close()

    def _read_shard(self, journal: Journal) -> None:
        done, keys, count, end = frozenset(journal.done), set(), 0, 0
        with journal.shard.path.open("rb") as file:
            reader = Reader(file)
            for sample in reader:
                place = _Place(journal, sample, sample.end - end)
                count, end = count + 1, sample.end
                is_new = sample.key not in keys
                keys.add(sample.key)
                if sample.position in done:
                    journal.check_key(sample.position, _utf8(sample.key))
                    self.counts.skipped_bytes += place.bytes
                    continue
                try:
                    content = _content(reader, sample, is_new)
                except Uncaptioned as failure:
                    self._results.put(_Done(place, failure))
                else:
                    self._files.put((place, content), len(content))
        strays = _named(reader.strays)
        self._results.put(_End(journal, count, reader.damage, reader.ignored, strays))

    def _decode(self) -> None:
        try:
            while (taken := self._files.get()) is not None:
                place, content = taken
                try:
                    image = decode(content)
                except Uncaptioned as failure:
                    self._results.put(_Done(place, failure))
                else:
                    self._images.put((place, image), 3 * image.width * image.height)
        finally:
            with self._guard:
                self._decoding -= 1
                is_last = self._decoding == 0
            if is_last:
                self._images.close()

    def _caption(self) -> None:
        counts, captioner = self.counts, self._captioner
        given: dict[int, _Place] = {}
        ticket, has_all = 0, False
        started = now = time.perf_counter()
        while not self._stopped.is_set():
            while not has_all and len(given) < captioner.capacity:
                try:
                    taken = self._images.get(0 if given else None)
                except Closed:
                    has_all, taken = True, None
                if not given:
                    now, before = time.perf_counter(), now
                    counts.idle_seconds += now - before
                if taken is None:
                    break
                place, image = taken
                try:
                    captioner.add(ticket, image, _seed(place))
                    given[ticket] = place
                    ticket += 1
                except Uncaptioned as failure:
                    self._results.put(_Done(place, failure))
            if not given:
                if has_all:
                    break
                continue
            is_full = has_all or len(given) >= captioner.capacity
            for number, found in captioner.step():
                self._results.put(_Done(given.pop(number), found))
            now, before = time.perf_counter(), now
            counts.short_seconds += 0 if is_full else now - before
            counts.seconds = now - started
        counts.seconds = time.perf_counter() - started

    def _write(self) -> None:
        ends: dict[Journal, _End] = {}
        try:
            while True:
                lines: dict[Journal, list[Line]] = {}
                for result in self._gathered():
                    if isinstance(result, _End):
                        ends[result.journal] = result
                    else:
                        lines.setdefault(result.place.journal, []).append(self._count(result))
                for journal, some in lines.items():
                    journal.append(some)
                self._report(None)
                for journal in [one for one in ends if len(one.done) == ends[one].samples]:
                    end = ends.pop(journal)
                    facts = (end.samples, end.damage, end.ignored, end.strays)
                    self._report(journal.finish(*facts))
                    self._journals.discard(journal)
        except Closed:
            raise
        except BaseException:
            self._results.close(drop=True)
            raise

    def _gathered(self) -> list[_Done | _End]:
        """Wait for a result, and a little for more; Closed where there are no more."""
        found: list[_Done | _End] = []
        ends = None
        while len(found) < _GATHER_MOST:
            try:
                one = self._results.get(None if ends is None else max(0, ends - time.monotonic()))
            except Closed:
                if not found:
                    raise
                break
            if one is None:
                break
            found.append(one)
            ends = ends or time.monotonic() + _GATHER_SECONDS
        return found

    def _count(self, result: _Done) -> Line:
        counts, found = self.counts, result.found
        counts.done_bytes += result.place.bytes
        if isinstance(found, Caption):
            counts.images += 1
            counts.prompt_tokens += found.prompt_tokens
            counts.tokens += found.tokens
        else:
            counts.failures[found.kind] += 1
        return result.place.line(found)


def _content(reader: Reader, sample: Sample, is_new: bool) -> bytes:
    """Read the image of a sample, or raise Uncaptioned."""
    try:
        sample.key.encode()
    except UnicodeEncodeError:
        raise Uncaptioned("bad_name", "its name is not UTF-8") from None
    if not is_new:
        raise Uncaptioned("duplicate_key", "an earlier sample of the shard has its key")
    if sample.member is None:
        raise Uncaptioned("no_image", "no file of it has the ending of an image")
    return reader.read(sample.member)


def _named(strays: list[Stray]) -> dict[str, list[FailedSample]]:
    """The images that are of no sample, by kind."""
    named: dict[str, list[FailedSample]] = {}
    for one in strays:
        key, file = one.key and _utf8(one.key), _utf8(one.name)
        failed = FailedSample(key=key, file=file, why=_WHY_STRAY[one.kind])
        named.setdefault(one.kind, []).append(failed)
    return named


def _seed(place: _Place) -> int:
    """A seed for sampling that depends on the sample alone, not on what runs beside it."""
    return zlib.crc32(f"{place.journal.shard.name}:{place.sample.position}".encode())


def _utf8(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()

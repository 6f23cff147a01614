"""The write-ahead file of a shard, and the files that it becomes when the shard is finished.

A shard NAME has in the output folder

    NAME.partial.jsonl  while it is worked on: a line for each sample, in any order
    NAME.jsonl          once it is finished: a line for each caption, in the order of the shard
    NAME.failures.json  once it is finished: its facts, and the samples without a caption
    NAME.json           once it is finished: {key: {model: caption}}

A line counts once all of it is there: of one that a killed process left unfinished, the next drops
the part. NAME.json comes last, so a shard that has it is finished; what a process leaves that is
killed before that is written anew from the lines. A failed sample that is tried again gets another
line, and the later one counts.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from vllm_qoq.caption.errors import CaptionError
from vllm_qoq.caption.lock import locked
from vllm_qoq.caption.records import Caption, Facts, FailedSample, Head, Line, Outcome, Written
from vllm_qoq.caption.shards import Shard
from vllm_qoq.checkpoint.writer import durable, sync_folder
from vllm_qoq.errors import one_line

# Of a killed job, an engine ends a moment later, and lets go of its shard then.
_DYING_SECONDS = 5.0


def finished(out: Path, shard: Shard) -> Outcome | None:
    """Read what became of a finished shard; None where it is not finished.

    Raises CaptionError where it is another shard of its name, or the files are damaged.
    """
    if not _file(out, shard, "json").is_file():
        return None
    file = _file(out, shard, "failures.json")
    try:
        facts = Facts.model_validate_json(file.read_bytes())
    except (ValidationError, FileNotFoundError):
        raise _damaged(file, out, shard) from None
    _check_same(file, facts, shard)
    return facts.outcome


def count_finished(out: Path, shards: Iterable[Shard]) -> int:
    """Count the shards that are finished, by the names of files alone."""
    names: dict[Path, frozenset[str]] = {}
    count = 0
    for shard in shards:
        file = _file(out, shard, "json")
        if file.parent not in names:
            is_there = file.parent.is_dir()
            names[file.parent] = frozenset(os.listdir(file.parent) if is_there else ())
        count += file.name in names[file.parent]
    return count


def clean(out: Path, shard: Shard) -> None:
    """Delete what a process left that was killed after it had finished the shard."""
    _file(out, shard, "partial.jsonl").unlink(missing_ok=True)


def begun(out: Path, shard: Shard) -> int:
    """Count the samples that an unfinished shard has been through."""
    try:
        lines = _file(out, shard, "partial.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
    return max(0, lines - 1)


class Journal:
    """The write-ahead file of one shard, for this process alone.

    done  position of a sample -> where its line is
    """

    def __init__(self, out: Path, shard: Shard, model: str, handle: int) -> None:
        self.shard = shard
        self.done: dict[int, int] = {}
        self._failed: set[int] = set()  # of these, the samples that an earlier run did not caption
        self._keys: dict[int, int] = {}  # of lines of an earlier run: position -> digest of the key
        self._out, self._model, self._handle = out, model, handle
        self._path = _file(out, shard, "partial.jsonl")
        self._end = 0
        self._head: Head

    @classmethod
    def open(cls, out: Path, shard: Shard, model: str, retry: bool) -> Journal | None:
        """Go on with the file of a shard or begin it; None where the shard is finished.

        retry  whether samples that have failed are not done, and a shard with some not finished

        Raises CaptionError while another process has it, and where it is damaged or of another
        shard.
        """
        path = _file(out, shard, "partial.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + _DYING_SECONDS
        while (handle := locked(path)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if handle is None:
            raise CaptionError(
                f"{path}: another process captions this shard; give all jobs of an output folder "
                "the same shards and the same --num-jobs"
            )
        journal = cls(out, shard, model, handle)
        try:
            if (found := finished(out, shard)) is not None:
                if not (retry and found.has_failed):  # by another process, since this one looked
                    clean(out, shard)
                    journal.close()
                    return None
                journal._reopen()
            else:
                journal._load(retry)
        except BaseException:
            journal.close()
            raise
        return journal

    def check_key(self, position: int, key: str) -> None:
        """Raise CaptionError where an earlier run had a sample of another key in the place."""
        if self._keys[position] != _digest(key):
            raise CaptionError(
                f"{self.shard.path}: sample {position} is {key!r} now, and another when it was "
                f"captioned; delete {self.shard.name}.* in the output to caption the shard as it is"
            )

    def append(self, lines: Iterable[Line]) -> None:
        """Add lines, which are on the disk when this returns.

        Raises OSError, after which the file has what was there before and maybe a part.
        """
        end, places, pieces = self._end, {}, []
        for line in lines:
            if line.position in self.done or line.position in places:
                raise RuntimeError(f"{self.shard.name}: {line.position} is captioned twice")
            places[line.position] = end
            pieces.append(_encoded(line.model_dump(mode="json", exclude_none=True)))
            end += len(pieces[-1])
        self._write(b"".join(pieces))
        self._end = end
        self.done |= places

    def finish(
        self,
        samples: int,
        damage: str | None,
        ignored: Counter[str],
        strays: Mapping[str, list[FailedSample]],
    ) -> Outcome:
        """Write the files of the finished shard, and delete this one.

        strays  images that are of no sample
        """
        if sorted(self.done) != list(range(samples)):
            raise RuntimeError(f"{self.shard.name}: {len(self.done)} lines of {samples} samples")
        counts: Counter[str] = Counter()
        failures: dict[str, list[FailedSample]] = {**strays}
        with _replacing(_file(self._out, self.shard, "jsonl")) as file:
            for line in self._lines():
                if line.failure is not None:
                    failed = FailedSample(
                        key=line.key, file=line.failure.file, why=line.failure.why
                    )
                    failures.setdefault(line.failure.kind, []).append(failed)
                elif (found := line.caption) is not None:
                    place = {"key": line.key, "model": self._model, "position": line.position}
                    file.write(_encoded({**place, **found.model_dump()}))
                    counts["captions"] += 1
                    counts["prompt_tokens"] += found.prompt_tokens
                    counts["tokens"] += found.tokens
        facts = Facts.model_validate(
            {
                **self._head.model_dump(),
                "samples": samples,
                **{name: counts[name] for name in ("captions", "prompt_tokens", "tokens")},
                "missing": max(0, (self.shard.samples or 0) - samples),
                **{"damage": damage, "ignored": dict(ignored)},
                "failures": {kind: failures[kind] for kind in sorted(failures)},
            }
        )
        with _replacing(_file(self._out, self.shard, "failures.json")) as file:
            file.write(facts.model_dump_json(indent=1).encode(errors="backslashreplace") + b"\n")
        with _replacing(_file(self._out, self.shard, "json")) as file:
            before = "{"
            for line in self._lines():
                if line.caption is not None:
                    caption = {self._model: line.caption.caption}
                    text = f"{before}\n{_json(line.key)}: {_json(caption)}"
                    file.write(text.encode(errors="backslashreplace"))
                    before = ","
            file.write(b"\n}\n" if before == "," else b"{}\n")
        clean(self._out, self.shard)
        self.close()
        return facts.outcome

    def close(self) -> None:
        """Let other processes have the shard; its lines stay."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _lines(self) -> Iterator[Line]:
        """Read the lines in the order of the shard."""
        with self._path.open("rb") as file:
            for position in sorted(self.done):
                file.seek(self.done[position])
                yield Line.model_validate_json(file.readline())

    def _load(self, retry: bool) -> None:
        """Find the lines that are there; drops a part of a line, and begins a new file."""
        with self._path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith(b"\n"):
                    break
                try:
                    if number == 1:
                        self._head = Head.model_validate_json(text)
                        _check_same(self._path, self._head, self.shard)
                    else:
                        self._note(Line.model_validate_json(text))
                except ValidationError as error:
                    raise CaptionError(
                        f"{one_line(error, f'{self._path}: line {number}')}; delete the file, and "
                        "what it has is captioned again"
                    ) from None
                self._end += len(text)
        os.ftruncate(self._handle, self._end)
        if self._end == 0:
            self._begin()
        if retry:
            for position in self._failed:
                del self.done[position]

    def _begin(self) -> None:
        shard = self.shard
        self._head = Head(
            shard=shard.name,
            bytes=shard.bytes,
            modified_ns=shard.modified_ns,
            fingerprint=shard.fingerprint(),
        )
        head = _encoded(self._head.model_dump())
        self._write(head)
        self._end = len(head)
        sync_folder(self._path.parent)

    def _reopen(self) -> None:
        """Make lines of the captions of the finished shard, which is unfinished from then on."""
        os.ftruncate(self._handle, 0)
        self._begin()
        file = _file(self._out, self.shard, "jsonl")
        lines = []
        try:
            for text in file.read_bytes().splitlines():
                one = Written.model_validate_json(text)
                caption = Caption(**one.model_dump(include=set(Caption.model_fields)))
                lines.append(Line(position=one.position, key=one.key, caption=caption))
                self._keys[one.position] = _digest(one.key)
        except (ValidationError, FileNotFoundError):
            raise _damaged(file, self._out, self.shard) from None
        self.append(lines)
        _file(self._out, self.shard, "json").unlink()
        sync_folder(self._path.parent)

    def _note(self, line: Line) -> None:
        if line.position in self.done and line.position not in self._failed:
            raise CaptionError(
                f"{self._path}: has sample {line.position} twice; delete the file, and what it has "
                "is captioned again"
            )
        self.done[line.position] = self._end
        self._keys[line.position] = _digest(line.key)
        if line.failure is None:
            self._failed.discard(line.position)
        else:
            self._failed.add(line.position)

    def _write(self, content: bytes) -> None:
        """Write at the end; what an error leaves there is a part of a line, which `_load` drops."""
        place, rest = self._end, memoryview(content)
        try:
            while rest:
                written = os.pwrite(self._handle, rest, place)
                place, rest = place + written, rest[written:]
            os.fsync(self._handle)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self._path)) from error


def _file(out: Path, shard: Shard, kind: str) -> Path:
    return out / f"{shard.name}.{kind}"


def _digest(key: str) -> int:
    return zlib.crc32(key.encode(errors="backslashreplace"))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _encoded(value: object) -> bytes:
    """A line of JSON; half of a surrogate pair, which UTF-8 has not, is escaped as JSON does."""
    return f"{_json(value)}\n".encode(errors="backslashreplace")


def _damaged(file: Path, out: Path, shard: Shard) -> CaptionError:
    return CaptionError(
        f"{file}: is not what a finished shard has; delete {_file(out, shard, 'json')} to caption "
        "it again"
    )


def _check_same(file: Path, head: Head, shard: Shard) -> None:
    """Raise CaptionError for another shard; one that was copied or touched is the same."""
    if (head.shard, head.bytes) != (shard.name, shard.bytes):
        what = f"a shard of {head.bytes} bytes, and {shard.path} has {shard.bytes}"
    elif head.modified_ns == shard.modified_ns or head.fingerprint == shard.fingerprint():
        return
    else:
        what = f"another shard of the size of {shard.path}, which has changed since"
    raise CaptionError(
        f"{file}: is of {what}; delete {shard.name}.* there to caption the new one, or choose "
        "another output folder"
    )


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that has its name once all of it is on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # a process that was killed may have left it
    try:
        with durable(partial) as file:
            yield file
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)  # the next run needs the room on a full disk
        raise
    sync_folder(path.parent)

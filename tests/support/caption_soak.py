"""Kills a captioning job again and again, and compares what it has in the end.

Run by a test with a few kills; for many: `python tests/support/caption_soak.py --kills 50`.
The engine is one without a model, all else is what `vllm-qoq caption` runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import caption_shards as shards
from warm_process import fork_where_vllm_spawns

from vllm_qoq.caption.errors import CaptionError
from vllm_qoq.caption.job import Job, check
from vllm_qoq.caption.run import caption
from vllm_qoq.caption.sigterm import terminable

ENDINGS = ("kill", "kill the engine", "interrupt", "terminate", "full disk")
_SHARDS = 6
_LIMIT_BYTES = 4000
_WRONG = 99


def main(folder: Path, kills: int, seed: int) -> str:
    """Kill a job `kills` times in `folder` and let it end; says what was done."""
    chosen = random.Random(seed)
    print(f"seed {seed}", flush=True)
    parts = [range(start, start + 12 * kills) for start in range(0, 72 * kills, 12 * kills)]
    for number, part in enumerate(parts):
        shards.write(folder / f"shards/{number}.tar", map(_sample, part))
    job = Job(str(folder / "shards"), folder / "out", folder / "model", quiet=True, engines=2)
    _write_model(job.model)
    ends, lines = [], 0
    for number in range(kills):
        ending = ENDINGS[number % len(ENDINGS)]
        # A full disk ends the job by itself.
        seconds = 60 if ending == "full disk" else chosen.uniform(0.05, 0.6)
        ends.append((ending, _run(job, ending, seconds)))
        seen = _lines(job.out)
        assert seen >= lines, "a caption is lost"
        lines = seen
    whole = Job(**{**vars(job), "out": folder / "whole"})
    for one in (job, whole):
        status = _run(one, "", 600)
        assert status == 1, status  # some samples have no image
    _compare(job.out, whole.out, parts)
    return f"{kills} kills, {lines} captions before the last run: {ends}"


def _run(job: Job, ending: str, seconds: float) -> int:
    """Run the job in a fork, and end it after a while as `ending` says; the exit status."""
    pid = os.fork()
    if pid == 0:
        status = _WRONG
        try:
            status = _child(job, is_full=ending == "full disk")
        except KeyboardInterrupt:  # before the job has begun
            status = 130
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            assert code != _WRONG
            return code
        time.sleep(0.005)
    engines = _engines(pid)
    if ending == "kill the engine" and engines:
        with suppress(ProcessLookupError):
            os.kill(engines[0], signal.SIGKILL)
    else:
        signals = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}
        os.kill(pid, signals.get(ending, signal.SIGTERM))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status != _WRONG
    for engine in engines:  # without their parent they end by themselves
        ends = time.monotonic() + 10
        while _is_alive(engine):
            assert time.monotonic() < ends, "an engine outlives its job"
            time.sleep(0.005)
    return status


def _child(job: Job, is_full: bool) -> int:
    # A shell begins what runs in the background with SIGINT ignored, which children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if is_full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT_BYTES, _LIMIT_BYTES))
    fork_where_vllm_spawns()
    try:
        with terminable():
            return 0 if caption(check(job), shards.slow_colours).is_complete else 1
    except KeyboardInterrupt:
        return 130
    except (CaptionError, OSError) as error:
        # What a job says that cannot go on; anything else is a failure of the test.
        expected = ("its process ended with", "File too large")
        if any(part in str(error) for part in expected):
            return 2
        traceback.print_exc()
    return _WRONG


def _is_alive(pid: int) -> bool:
    """Whether a process runs; nobody may have asked for the status of one that has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    return False


def _engines(pid: int) -> list[int]:
    """The processes of engines: children of the fork server that a job has."""
    return [engine for server in _children(pid) for engine in _children(server)]


def _children(pid: int) -> list[int]:
    with suppress(FileNotFoundError):
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    return []


def _sample(seed: int) -> dict[str, object]:
    content: dict[str, object] = {"jpg": shards.jpeg(seed)}
    if seed % 20 == 7:
        content = {"jpg": b"no image"}
    elif seed % 20 == 17:
        content = {"txt": b"words"}
    return {"__key__": f"sample-{seed:04}", **content}


def _write_model(model: Path) -> None:
    model.mkdir()
    (model / "config.json").write_text("{}")


def _lines(out: Path) -> int:
    """How many samples are on the disk, whole."""
    if not out.exists():
        return 0
    finished = [file for file in out.glob("?.failures.json") if _final(file).exists()]
    begun = [file for file in out.glob("?.partial.jsonl") if not _final(file).exists()]
    count = sum(json.loads(file.read_text())["samples"] for file in finished)
    return count + sum(max(0, file.read_bytes().count(b"\n") - 1) for file in begun)


def _final(file: Path) -> Path:
    return file.with_name(f"{file.name.partition('.')[0]}.json")


def _compare(out: Path, whole: Path, parts: list[range]) -> None:
    """The files are those of a run that nothing ended, and have what is in the shards."""
    files = sorted(file.name for file in whole.iterdir())
    kinds = ("json", "jsonl", "failures.json")
    names = [f"{number}.{kind}" for number in range(_SHARDS) for kind in kinds]
    assert files == sorted([*names, "vllm-qoq-caption.json"]), files
    left = {file.name for file in out.iterdir() if not file.name.endswith(".log")}
    assert left == set(files), left
    for name in files:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    for number, part in enumerate(parts):
        good = [seed for seed in part if "jpg" in _sample(seed) and seed % 20 != 7]
        captions = json.loads((out / f"{number}.json").read_text())
        assert list(captions) == [f"sample-{seed:04}" for seed in good]
        for seed, found in zip(good, captions.values(), strict=True):
            colour = " ".join(str((c + 8) // 16) for c in shards.colour(seed))
            assert found == {"model": f"24 x 16, {colour}"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(main(Path(name), args.kills, args.seed))

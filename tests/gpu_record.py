"""Every GPU test, and the record of when they passed: `make test-gpu`.

    python tests/gpu_record.py [PYTEST ARGUMENT ...]

runs all tests with the marker `gpu` and, when none fails, adds a line to gpu_record.tsv beside
this file, to be committed. CI has no GPU: what it prints at its end is `not_run_since`.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(map(str, (ROOT / "tests" / "gpu").glob("test_gpu*.py")))
RECORD = ROOT / "tests" / "gpu_record.tsv"
# What runs on a GPU: kernels, how they are built, serving and what it shares with the tools.
ON_THE_GPU = (
    *("csrc", "setup.py", ":(glob)vllm_qoq/*.py"),
    *(f"vllm_qoq/{room}" for room in ("serving", "ops", "numerics", "routing", "models")),
    *(f"vllm_qoq/checkpoint/{name}.py" for name in ("format", "kv_config")),
)

_SHOWN = 3  # changes that are named

PREPARE = """\
  make test-gpu needs a GPU from Ampere on (two for all tests), its driver, nvcc of CUDA 13 and g++:
    make setup       an environment in .venv with vLLM's CUDA build, llmcompressor and our kernels
    make test-gpu    6 minutes on one H200 with 16 cores and GPU_WORKERS=8
  In an environment of your own, which has vLLM, llmcompressor, pytest-xdist and the project
  (pip install --no-build-isolation -e .):
    make test-gpu GPU_PYTHON=python3"""


@dataclass(frozen=True)
class Run:
    """A line of the record: one run of all GPU tests in which nothing failed.

    commit   abbreviated hash of what was tested
    cards    their number and name, `1 x NVIDIA H200`
    seconds  of the whole run
    """

    commit: str
    cards: str
    torch: str
    vllm: str
    passed: int
    skipped: int
    seconds: int

    @classmethod
    def parse(cls, line: str) -> Run:
        """Read one line; ValueError where it is not one."""
        values = line.split("\t")
        if len(values) != len(fields(cls)):
            raise ValueError(f"{RECORD.name}: {line!r} has not {len(fields(cls))} columns")
        return cls(*values[:4], *map(int, values[4:]))

    @property
    def card_count(self) -> int:
        """How many GPUs the machine had."""
        return int(self.cards.split(" x ")[0])


def read(text: str) -> list[Run]:
    """The runs of a record, oldest first; its first line names the columns."""
    return [Run.parse(line) for line in text.splitlines()[1:]]


def not_run_since(root: Path = ROOT, record: Path = RECORD) -> list[str]:
    """For one GPU and for two: the last run, and the commits since that concern a GPU."""
    lines = []
    for count in (1, 2):
        runs = [run for run in read(record.read_text()) if run.card_count >= count]
        where = "one GPU" if count == 1 else "two GPUs"
        if not runs:
            lines.append(f"{where}: never run in full")
            continue
        last = runs[-1]
        lines.append(f"{where}: {last.passed} passed on {last.cards} at {last.commit}")
        lines += _changes_since(root, last.commit)
    return lines


def _changes_since(root: Path, commit: str) -> list[str]:
    command = ["git", "log", "--format=%h %s", f"{commit}..HEAD", "--", *ON_THE_GPU]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        return [f"  {commit} is not in this history, so what changed since is not known"]
    changes = [f"  not run since: {line}" for line in done.stdout.splitlines()]
    if (more := len(changes) - _SHOWN) > 0:
        changes[_SHOWN:] = [f"  and {more} more"]
    return changes


def main(arguments: list[str]) -> int:
    """Run the tests; the result is the exit status."""
    cards = _cards()
    commit = _commit()
    started = time.monotonic()
    total = skipped = 0
    for marked, options in (("gpu and not alone", arguments), ("gpu and alone", [])):
        suite = _run(marked, options)
        if suite is None:
            print("not recorded: the tests did not all pass", file=sys.stderr)
            return 1
        total += int(suite.attrib["tests"])
        skipped += int(suite.attrib["skipped"])
    run = Run(
        commit,
        cards,
        importlib.metadata.version("torch"),
        importlib.metadata.version("vllm"),
        total - skipped,
        skipped,
        round(time.monotonic() - started),
    )
    with open(RECORD, "a") as file:
        file.write("\t".join(map(str, astuple(run))) + "\n")
    print(f"recorded in {RECORD.relative_to(ROOT)}, commit it: {run}")
    return 0


def _run(marked: str, arguments: list[str]) -> ElementTree.Element | None:
    """The results of the tests with these markers; None where one failed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-m", marked, f"--junitxml={results}"]
        done = subprocess.run([*command, *arguments, *FILES], cwd=ROOT)
        if done.returncode:
            return None
        return ElementTree.parse(results).getroot().find("testsuite")


def _cards() -> str:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"error: no NVIDIA GPU that torch {torch.__version__} can use\n{PREPARE}")
    from vllm_qoq import ops

    if not ops.has_kernels("cuda"):
        raise SystemExit(f"error: this build has no kernels for this GPU\n{PREPARE}")
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def _commit() -> str:
    """The commit that is tested; GPU_TESTS_COMMIT says it where the copy has no history."""
    if given := os.environ.get("GPU_TESTS_COMMIT"):
        return given
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *ON_THE_GPU, "tests")
    if changed:
        raise SystemExit(f"error: a record is of a commit, but there are changes:\n{changed}")
    return _git("rev-parse", "--short", "HEAD")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {done.stderr.strip()}\n  Fix: set GPU_TESTS_COMMIT to the commit")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

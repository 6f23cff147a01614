"""Files in shared memory: they go with their process, also when it is killed."""

import os
import signal
import subprocess
import sys

import pytest

from vllm_qoq.serving.plugin import shared_files
from vllm_qoq.serving.plugin.shared_files import new_stem, remove_abandoned

PROCESS = """
import sys, time
from pathlib import Path
from vllm_qoq.serving.plugin import shared_files

shared_files._SHARED_MEMORY = Path(sys.argv[1])
stem = shared_files.new_stem()
Path(f"{stem}-0").write_bytes(bytes(8))
Path(f"{stem}-0-load").write_bytes(bytes(8))
print(stem, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that makes a stem, and returns both; `stop` ends it in an orderly way."""
    started = []

    def make():
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process, process.stdout.readline().strip()

    yield make
    for process in started:
        process.kill()
        process.wait()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_next_start_removes_what_a_killed_process_left(start, tmp_path, monkeypatch):
    alive, its_stem = start()
    killed, _ = start()
    foreign = ["vllm-qoq-notes", "vllm-qoq-0-lock", f"vllm-qoq-{'0' * 32}-0", "x-lock"]
    for name in foreign:
        (tmp_path / name).write_text("not ours")
    (tmp_path / f"vllm-qoq-{'1' * 32}-lock").symlink_to(tmp_path / "x-lock")
    (tmp_path / f"vllm-qoq-{'2' * 32}-lock").mkdir()
    before = files(tmp_path)
    remove_abandoned(tmp_path)
    assert files(tmp_path) == before, "both live"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    monkeypatch.setattr(shared_files, "_SHARED_MEMORY", tmp_path)
    mine = new_stem()
    left = set(files(tmp_path))
    own = {name for name in left if name.startswith(os.path.basename(mine))}
    its = {f"{os.path.basename(its_stem)}-{end}" for end in ("0", "0-load", "lock")}
    assert left - own == its | set(foreign) | {f"vllm-qoq-{n * 32}-lock" for n in "12"}
    alive.stdin.close()
    assert alive.wait(30) == 0
    assert not its & set(files(tmp_path)), "an orderly end leaves nothing"

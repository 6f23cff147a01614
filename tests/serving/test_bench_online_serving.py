"""`vllm-qoq bench serving --online` with vLLM's own server and client, on a CPU."""

import contextlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import warm_process

from vllm_qoq import plots
from vllm_qoq.bench.serving import guard, process
from vllm_qoq.cli import main as cli
from vllm_qoq.cli import measurement

ENGINE = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 16}


class WarmProcess(warm_process.Command):
    """`subprocess.Popen` as `process.session` calls it, in a fork that has imported vLLM.

    The fork is made without the guard, which would start the command anew.
    """

    sessions: ClassVar[list[int]] = []
    stdin = None

    def __init__(self, command, stdin, stdout, stderr, start_new_session, env):
        assert Path(command[2]).samefile(guard.__file__)
        command = command[3:]
        super().__init__(command, Path(stdout.name), env=env or os.environ)
        self.sessions.append(self.pid)

    def wait(self, timeout=60):
        return super().wait(timeout)


def alive(sessions):
    """The processes of these sessions, without those that have ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state != "Z":
                found.append(stat.parent.name)
    return found


def test_a_format_with_dummy_weights_is_served_and_asked(tiny_model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(process, "subprocess", SimpleNamespace(Popen=WarmProcess, PIPE=None))
    monkeypatch.setattr(measurement, "stdout_for", lambda file: contextlib.nullcontext(sys.stdout))
    monkeypatch.setattr(plots, "DPI", 20)
    out = tmp_path / "OUT"
    load = ["--lengths", "32/8", "--rates", "50", "--fewest", "6", "--seconds", "0.1"]
    objective = ["--goodput", "ttft:60000,e2el:60000"]
    command = ["bench", "serving", tiny_model, "--online", "--formats", "w4a8-kv4", *load]
    command += [*objective, "--engine-args", json.dumps(ENGINE), "-o", out]
    monkeypatch.setattr(sys, "argv", ["vllm-qoq", *map(str, command)])
    assert cli.main() == 0, capfd.readouterr().err
    (server,) = json.loads((out / "online.json").read_text())["servers"]
    (found,) = server["rates"]
    assert (found["requests"], found["good"], server["held_rate"]) == (6, 6, 50)
    # Every request had its 8 tokens.
    assert round(found["tokens_per_second"] * found["seconds"]) == 48
    assert 0 < found["ttft_ms"] <= found["ttft_p99_ms"] and found["tpot_ms"] > 0
    assert not out.with_name("OUT.work").exists()
    assert len(WarmProcess.sessions) == 2 and not alive(WarmProcess.sessions)

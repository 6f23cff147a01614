"""`vllm-qoq bench serving --online` with a made-up vLLM: servers, clients, and what is kept."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from vllm_qoq.bench.serving import process
from vllm_qoq.bench.serving.online import client, plot, server
from vllm_qoq.cli import main as cli
from vllm_qoq.cli import measurement

FAKE = ROOT / "tests" / "support" / "online_units.py"
RATES = ("--lengths", "32/8", "--rates", "1,2", "--fewest", "4", "--seconds", "1")


@pytest.fixture
def folders(tiny_model, tmp_path):
    """Folders(NAME=BEHAVIOUR): options for checkpoints that the made-up vLLM serves."""

    def folders(**behaviours):
        for name, behaviour in behaviours.items():
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            for file in ("config.json", "tokenizer.json"):
                (folder / file).write_bytes((tiny_model / file).read_bytes())
            (folder / "behaviour").write_text(behaviour)
        return [f"--checkpoint={name}={tmp_path / name}" for name in behaviours]

    return folders


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """run(ARGUMENTS): exit code, stdout and stderr; results go to OUT."""
    for module in (client, server):
        monkeypatch.setattr(module, "VLLM", (sys.executable, "-S", str(FAKE)))
    for module, seconds in ((client, 0.02), (server, 0.05)):
        monkeypatch.setattr(module, "_POLL_SECONDS", seconds)
    monkeypatch.setattr(server, "_END_SECONDS", 0.2)
    monkeypatch.setattr(plot, "save", lambda result, path: path.touch())
    monkeypatch.setattr(measurement, "stdout_for", lambda file: contextlib.nullcontext(sys.stdout))

    def run(*arguments, out=tmp_path / "OUT"):
        command = ["bench", "serving", "--online", *RATES, *arguments, "-o", out]
        monkeypatch.setattr(sys, "argv", ["vllm-qoq", *map(str, command)])
        try:
            code = cli.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


def rates(document):
    """Name of a server -> the rates that were measured."""
    return {one["name"]: [found["rate"] for found in one["rates"]] for one in document["servers"]}


def asked(folder):
    """The rates that a client has asked, one after the other."""
    file = folder / "asked"
    return file.read_text().split() if file.exists() else []


def test_every_server_is_asked_at_every_rate_and_nothing_else_stays(run, folders, tmp_path):
    code, out, err = run(*folders(a="", b=""))
    assert code == 0 and "a: 1 requests/s: TTFT 40 ms, TPOT 5.00 ms, 2 of 4 good" in err
    assert {path.name for path in (tmp_path / "OUT").iterdir()} == {
        f"online.{kind}" for kind in ("json", "md", "png")
    }
    assert (tmp_path / "OUT" / "online.md").read_text() in out
    document = json.loads((tmp_path / "OUT" / "online.json").read_text())
    assert rates(document) == {"a": [1, 2], "b": [1, 2]}
    assert [one["weights_gib"] for one in document["servers"]] == [1.25, 1.25]
    assert not (tmp_path / "OUT.work").exists() and asked(tmp_path / "a") == ["1.0", "2.0"]


def test_a_format_with_dummy_weights_gets_a_config_and_a_tokenizer(run, tiny_model, tmp_path):
    code, out, _ = run(tiny_model, "--formats", "w4a8-kv4", "--json", "--work-dir", tmp_path / "W")
    document = json.loads(out)
    assert (
        code == 0 and rates(document) == {"w4a8-kv4": [1, 2]} and document["servers"][0]["is_ours"]
    )
    # What the made-up client wrote is not ours to delete.
    assert [str(path.relative_to(tmp_path / "W")) for path in (tmp_path / "W").rglob("*")] == [
        "w4a8-kv4",
        "w4a8-kv4/asked",
    ]


def test_what_was_measured_is_not_measured_again(run, folders, tmp_path):
    checkpoints = folders(a="", b="does not start")
    code, _, err = run(*checkpoints)
    assert code == 0 and "b: stopped: ValueError: no room for the cache" in err
    folders(a="does not start", b="")
    code, _, err = run(*checkpoints, "--overwrite")
    document = json.loads((tmp_path / "OUT" / "online.json").read_text())
    assert code == 0 and rates(document) == {"a": [1, 2], "b": [1, 2]}
    assert "a: measured earlier" in err and asked(tmp_path / "a") == ["1.0", "2.0"]
    assert not (tmp_path / "OUT.work").exists()


def test_a_run_that_was_stopped_goes_on_with_the_rates_that_are_missing(run, folders, tmp_path):
    checkpoints = [*folders(a=""), "--work-dir", tmp_path / "W"]
    assert run(*checkpoints)[0] == 0
    (tmp_path / "W").mkdir()
    code, _, err = run(*checkpoints, "--resume", "required", "--overwrite")
    assert code == 2 and "a.jsonl: does not exist, so there is nothing to go on with" in err
    folders(a="refuses")
    assert run(*checkpoints, "--overwrite")[0] == 2
    folders(a="")
    records = tmp_path / "W" / "a.jsonl"
    (tmp_path / "a" / "asked").unlink()
    first = json.loads((tmp_path / "OUT" / "online.json").read_text())["servers"][0]["rates"][0]
    kept = {key: value for key, value in first.items() if key not in ("goodput", "share")}
    records.write_text(json.dumps(kept) + "\n" + '{"prompt": 32, "ne')
    folders(a="refuses")
    assert run(*checkpoints, "--overwrite")[0] == 0 and asked(tmp_path / "a") == ["2.0"]
    folders(a="")
    (tmp_path / "a" / "asked").unlink()
    assert run(*checkpoints, "--overwrite")[0] == 0 and asked(tmp_path / "a") == ["2.0"]
    document = json.loads((tmp_path / "OUT" / "online.json").read_text())
    assert rates(document) == {"a": [1, 2]}


def test_another_objective_or_more_requests_are_measured_anew(run, folders, tmp_path):
    checkpoints = folders(a="", b="does not start")
    run(*checkpoints, "--rates", "1")
    folders(b="")
    for more in (["--goodput", "ttft:9"], ["--fewest", "9"]):
        code, _, _ = run(*checkpoints, "--overwrite", "--rates", "1", *more)
        assert code == 0
    assert asked(tmp_path / "b") == ["1.0", "1.0"]


def test_results_of_another_engine_are_not_taken_over(run, folders, tmp_path):
    checkpoints = folders(a="refuses")
    run(*checkpoints)
    (tmp_path / "OUT.work" / "a.jsonl").touch()
    code, _, err = run(*checkpoints, "--engine-args", '{"seed": 1}')
    assert code == 2 and "a.json: is of a run with another model, engine, GPU or version" in err
    (tmp_path / "OUT.work" / "a.json").unlink()
    code, _, err = run(*checkpoints)
    assert code == 2 and "begin anew: --resume never" in err


@pytest.mark.parametrize(
    "behaviour, said",
    [
        ("does not start", "ValueError: no room for the cache"),
        ("dies", "torch.OutOfMemoryError: 2 GiB are missing"),
        ("client fails", "OSError: no such dataset"),
        ("refuses", "at 1 requests a second 1 of 4 failed: Bad Request"),
        ("breaks off", "at 1 requests a second 1 of 4 failed: OSError: b"),
    ],
)
def test_where_nothing_can_be_measured_the_reason_is_said(run, folders, behaviour, said, tmp_path):
    code, _, err = run(*folders(a=behaviour))
    assert code == 2 and f"error: nothing could be measured: a: {said}; logs are in" in err
    assert not (tmp_path / "OUT").exists()


def test_a_server_that_does_not_start_in_time_is_left_out(run, folders, monkeypatch):
    monkeypatch.setattr(server, "_START_SECONDS", 0.3)
    monkeypatch.setattr(server, "_is_ready", lambda url: False)
    code, _, err = run(*folders(a=""))
    assert code == 2 and "a: the server did not start in 0.3 s; its log is" in err


def test_the_time_bounds_the_whole_run(run, folders):
    code, _, err = run(*folders(a="hangs", b=""), "--minutes", "0.02")
    assert code == 2 and "a: the time was over (--minutes)" in err
    assert "b: no time was left (--minutes)" in err


def test_a_folder_with_other_files_is_not_replaced(run, folders, tmp_path):
    (tmp_path / "OUT").mkdir()
    (tmp_path / "OUT" / "serving.json").touch()
    code, _, err = run(*folders(a=""), "--overwrite")
    assert code == 2 and "holds serving.json, which is no result of this benchmark" in err
    assert asked(tmp_path / "a") == []


def test_an_interrupt_leaves_no_process_behind(folders, tmp_path):
    """Ctrl-C goes to the command alone, since server and client have sessions of their own."""
    command = ["bench", "serving", "--online", *RATES, *folders(a="hangs"), "--work-dir"]
    # A shell lets what it runs in the background ignore Ctrl-C, and so would this command.
    code = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from vllm_qoq.bench.serving.online import client, server
client.VLLM = server.VLLM = (sys.executable, {str(FAKE)!r})
from vllm_qoq.cli.main import main
sys.exit(main())
"""
    running = subprocess.Popen(
        [sys.executable, "-c", code, *command, str(tmp_path / "W")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "a" / "waits").exists():
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.05)
    assert len(with_argument(tmp_path / "a")) == 4  # server and client, and the guard of each
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "results so far are in" in err and "the same command goes on from there" in err
    assert not with_argument(tmp_path / "a")


def with_argument(folder: Path) -> list[str]:
    """The processes of the made-up vLLM that were given this folder."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            arguments = Path("/proc", entry, "cmdline").read_bytes().split(b"\0")
            if entry.isdecimal() and str(folder).encode() in arguments:
                found.append(entry)
    return found


def test_options_that_vllm_does_not_have_are_a_reason(tmp_path):
    log = tmp_path / "a.log"
    log.write_text("usage: main.py [-h]\nmain.py: error: unrecognized arguments: --x\n")
    assert process.reason(log, 2) == "error: unrecognized arguments: --x"

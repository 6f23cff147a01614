"""The file of routing decisions: what cannot be written, and several engines in one file."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_qoq.routing.table import RoutingError
from vllm_qoq.serving.signals.trace import Trace


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "nul"])
def test_a_file_that_cannot_be_written_is_refused_when_it_is_opened(tmp_path, kind):
    path = tmp_path / "trace"
    if kind == "missing":
        path = tmp_path / "no" / "trace"
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "nul":
        path = "a\0b"
    with pytest.raises(RoutingError, match=r"qoq\.trace is '.*' *, which cannot be written: .+;"):
        Trace(str(path), 0)


def test_lines_of_several_engines_are_whole_and_say_whose_they_are_and_when(tmp_path):
    traces = [Trace(str(tmp_path / "trace"), engine) for engine in range(4)]
    filler = "x" * 5000  # more than a buffered file writes at once

    def write(trace):
        for number in range(100):
            trace.write({"number": number, "filler": filler})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, traces))
    lines = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
    for engine in range(4):
        own = [line["number"] for line in lines if line["engine"] == engine]
        assert own == list(range(100))
    assert {line["pid"] for line in lines} == {os.getpid()}
    assert all(abs(line["time"] - time.time()) < 60 for line in lines)


def test_what_cannot_be_written_later_is_said_once_and_stops_nothing(vllm_log):
    trace = Trace("/dev/full", 0)
    for _ in range(3):
        trace.write({"phase": "prefill"})
    (line,) = vllm_log
    assert "The trace ends here, /dev/full cannot be written: No space left" in line

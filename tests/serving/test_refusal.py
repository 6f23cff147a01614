"""What an engine refuses is the last thing that the process which started it says."""

import subprocess
import sys

import pytest

# Plays a front end and its engine; logs as vLLM does.
SCRIPT = """
import logging, multiprocessing, os, sys
from vllm_qoq.errors import UserError
from vllm_qoq.serving.plugin import refusal

def engine(stem, front_end, errors):
    logging.getLogger("vllm").handlers.clear()  # as vLLM does when it sets up its log
    refusal.leave("an engine before", front_end)
    refusal.leave(stem, front_end)
    for error in errors:
        try:
            raise error
        except Exception:
            logging.getLogger("vllm.v1.engine.core").exception("EngineCore failed to start.")

if __name__ == "__main__":
    stem, start, kind, end = sys.argv[1:]
    refusal.repeat_at_exit("an engine before")
    refusal.leave("an engine before", os.getpid())
    refusal.repeat_at_exit(stem)
    user_errors = [UserError("the reason\\n\\x1b[2J"), UserError("what another rank says")]
    errors = user_errors if kind == "refuses" else [ValueError("a fault")]
    arguments = (stem, os.getpid(), errors)
    process = multiprocessing.get_context(start).Process(target=engine, args=arguments)
    process.start()
    process.join()
    if end == "fails":
        raise RuntimeError("Engine core initialization failed.")
"""
FAILED = "RuntimeError: Engine core initialization failed."


@pytest.mark.parametrize(
    ("start", "kind", "end", "last"),
    [
        ("fork", "refuses", "fails", r"error: the reason\n\x1b[2J"),
        ("spawn", "refuses", "fails", r"error: the reason\n\x1b[2J"),
        ("fork", "breaks", "fails", FAILED),
        ("fork", "refuses", "goes on", None),
    ],
)
def test_the_reason_of_an_engine_is_the_last_line(tmp_path, start, kind, end, last):
    script = tmp_path / "front_end.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "stem"), start, kind, end],
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stderr.splitlines()
    assert (lines[-1] if lines else None) == last, done.stderr
    assert done.stderr.count("the reason") == (last is not None and kind == "refuses")

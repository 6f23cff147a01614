"""A server that is measured: `vllm serve` in a process of its own."""

from __future__ import annotations

import json
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any, NamedTuple

from vllm_qoq.bench.serving import process

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
NAME = "model"
"""What the server calls its model."""
_START_SECONDS = 1800
_END_SECONDS = 5
_POLL_SECONDS = 0.5
# Proxies of the environment are for other machines.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Stopped(Exception):
    """The end of a server or client that was not done; the message is the reason."""


class Server(NamedTuple):
    """A server that answers at `url`."""

    url: str
    process: Popen[bytes]
    log: Path

    def check(self, ends: float | None) -> None:
        """Raise Stopped where the server has ended, or the time has: `ends`, by the clock."""
        if (code := self.process.poll()) is not None:
            raise Stopped(process.reason(self.log, code))
        if ends is not None and time.monotonic() >= ends:
            raise Stopped("the time was over (--minutes)")

    def check_whether_it_ends(self) -> None:
        """Raise Stopped where the server ends soon, because its engine has ended."""
        with suppress(TimeoutExpired):
            self.process.wait(_END_SECONDS)
        self.check(None)


@contextmanager
def serving(
    folder: str, engine_args: Mapping[str, Any], log: Path, ends: float | None
) -> Iterator[Server]:
    """Serve a model, and end the server and its engine with the block.

    Raises Stopped where the server does not start, or not before `ends`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*VLLM, "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", NAME, *flags(engine_args)]
    with log.open("w") as file, process.session(command, file) as running:
        server = Server(f"http://127.0.0.1:{port}", running, log)
        deadline = time.monotonic() + _START_SECONDS
        while not _is_ready(server.url):
            server.check(ends)
            if time.monotonic() >= deadline:
                raise Stopped(f"the server did not start in {_START_SECONDS} s; its log is {log}")
            time.sleep(_POLL_SECONDS)
        yield server


def flags(engine_args: Mapping[str, Any]) -> list[str]:
    """Write arguments of `LLM()` as options of `vllm serve`; None is vLLM's default."""
    found: list[str] = []
    for name, value in engine_args.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            found += [f"--{option}", *map(_text, value)]
        elif value is not None:
            found += [f"--{option}", _text(value)]
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _is_ready(url: str) -> bool:
    try:
        _OPENER.open(f"{url}/health", timeout=5).close()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True

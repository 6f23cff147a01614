"""`vllm serve` as a process that tests ask over HTTP."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import warm_process

VLLM = Path(sys.executable).with_name("vllm")


START_SECONDS = 240


def serve_command(checkpoint, *options):
    return [
        *(str(VLLM), "serve", str(checkpoint), "--quantization", "qoq", "--host", "127.0.0.1"),
        *("--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(64 << 20), *options),
    ]


class Server:
    """A running server; `url` answers."""

    def __init__(self, checkpoint, log: Path, *options: str, is_warm: bool = False) -> None:
        """Begin it; a warm one is a fork of a process that has imported vLLM."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = serve_command(checkpoint, "--port", str(port), *options)
        if is_warm:
            self.process = warm_process.Command(command, log)
            return
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/health")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        self.__exit__()
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def __exit__(self, *error):
        for stop in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, stop)
                self.process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return answer.read().decode()

    def complete(self, prompt, **options):
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True} | options
        return self.post("/v1/completions", body)

    def post(self, path, body):
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read().decode()

    def text(self, prompt, **options):
        return json.loads(self.complete(prompt, **options))["choices"][0]["text"]

    def steps(self):
        line = r'vllm:qoq_steps_total\{.*phase="(\w+)".*set="(\w+)".*\} ([\d.]+)'
        return {(p, s): float(n) for p, s, n in re.findall(line, self.get("/metrics"))}

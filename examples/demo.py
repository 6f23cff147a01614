"""The whole way on a tiny trained model: quantize, merge, measure, serve, ask.

`make demo` runs this script, which writes everything below `demo-output/`.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA, OUT = ROOT / "tests" / "data", ROOT / "demo-output"
MODEL, CALIBRATION, HELDOUT = DATA / "tiny-llama", DATA / "calibration.txt", DATA / "heldout.txt"
BIN = Path(sys.executable).parent
START_SECONDS = 300
# The model is small and scored once. By default vLLM imports itself in three processes and, on a
# CPU, fills all free memory with the KV cache, which takes longer than the scoring.
SMALL_ENGINE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

STARTED = time.monotonic()


def step(title: str) -> None:
    """Say what comes, and how long the demo has taken so far."""
    print(f"\n== [{time.monotonic() - STARTED:4.0f} s] {title}", flush=True)


def run(*command: object, log: str | None = None, **environment: str) -> str:
    """Run a command with its stderr in a file, and return what it printed."""
    path = OUT / (log or "last.log")
    with path.open("w") as file:
        done = subprocess.run(
            [str(c) for c in command],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=os.environ | environment,
        )
    if done.returncode:
        sys.exit(f"error: {command[0]} failed, the end of {path}:\n{path.read_text()[-2000:]}")
    return done.stdout


def quantize(scheme: str) -> Path:
    """Quantize the model to one set with llmcompressor."""
    out = OUT / scheme
    options = ("--scheme", scheme, "--text", CALIBRATION, "--samples", "64", "--seqlen", "256")
    script = ROOT / "examples" / "quantize_llmcompressor.py"
    run(sys.executable, script, MODEL, out, *options, log=f"quantize-{scheme}.log")
    return out


def quantize_all() -> Path:
    """Quantize the model to W8A8 and QoQ's W4A8 at once, in one checkpoint."""
    out = OUT / "qoq"
    options = ("--sets", "w8a8,w4a8", "--text", CALIBRATION, "--samples", "64", "--seqlen", "256")
    print(run(BIN / "vllm-qoq", "quantize", MODEL, "-o", out, *options, log="quantize.log"), end="")
    return out


def perplexity(checkpoint: Path, force_set: str | None = None) -> float:
    """Measure the perplexity on the held-out text, through vLLM."""
    force = ("--force-set", force_set) if force_set else ()
    output = run(
        *(BIN / "vllm-qoq", "perplexity", checkpoint, "--text", HELDOUT, "--seqlen", "512"),
        *("--enforce-eager", "--json", *force),
        log="perplexity.log",
        **SMALL_ENGINE,
    )
    return json.loads(output.splitlines()[-1])["perplexity"]


@contextmanager
def server(checkpoint: Path) -> Iterator[str]:
    """Run `vllm serve` on a free port and stop it, whatever happens; yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [BIN / "vllm", "serve", checkpoint, "--quantization", "qoq", "--port", port]
    command += ["--host", "127.0.0.1", "--max-model-len", 1024, "--max-num-seqs", 32]
    command += ["--kv-cache-memory-bytes", 256 << 20]
    log = OUT / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*map(str, command), "--enforce-eager"],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log)
        yield url
    finally:
        for stop in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, stop)
                process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            get(url + "/health")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    sys.exit(f"error: the server did not start, the end of {log}:\n{log.read_text()[-2000:]}")


def get(url: str) -> str:
    """Read the body of a page."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def complete(url: str, prompt: str) -> str:
    """Let the model continue `prompt`."""
    body = {"prompt": prompt, "max_tokens": 32, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["text"]


def steps(url: str) -> list[tuple[str, str, int]]:
    """Read (phase, set, number of steps) from the metrics endpoint."""
    pattern = r'vllm:qoq_steps_total\{.*phase="(\w+)".*set="(\w+)".*\} ([\d.]+)'
    return [(p, s, int(float(n))) for p, s, n in re.findall(pattern, get(url + "/metrics"))]


def has_wna16() -> bool:
    """Whether vLLM computes with 4-bit weights and 16-bit inputs on this machine."""
    import torch

    is_x86 = platform.machine() == "x86_64"
    return torch.cuda.is_available() or not is_x86 or torch.cpu._is_avx512_supported()


def size(folder: Path) -> str:
    """Count the megabytes of a checkpoint's weights, as text."""
    return f"{sum(file.stat().st_size for file in folder.glob('*.safetensors')) / 1e6:.2f} MB"


def main() -> None:
    """Run the demo."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    step("Quantizing to W8A8 with llmcompressor")
    w8a8 = quantize("w8a8")
    step("Quantizing to W4A16 with llmcompressor")
    w4a16 = quantize("w4a16")
    step("Merging")
    merged = OUT / "merged"
    sets = (f"w8a8={w8a8}", f"w4a16={w4a16}")
    routing = ("--prefill", "w8a8", "--decode", "16:w4a16,w8a8")
    print(run(BIN / "vllm-qoq", "merge", *sets, "-o", merged, *routing), end="")
    step("Quantizing to W8A8 and W4A8 at once with vllm-qoq quantize")
    qoq = quantize_all()
    step("Measuring perplexity, with an engine for each")
    measured = [
        ("bf16", MODEL, None),
        ("W8A8", w8a8, None),
        ("W4A16", w4a16, None),
        ("merged: prompts in W8A8", merged, None),
        ("merged: W4A16 forced", merged, "w4a16"),
        ("QoQ: prompts in W8A8", qoq, None),
        ("QoQ: W4A8 forced", qoq, "w4a8"),
    ]
    rows = []
    if not has_wna16():
        print("left out: W4A16, for which vLLM has no kernel on this processor (no AVX-512)")
        measured = [row for row in measured if row[1] != w4a16 and row[2] != "w4a16"]
    for name, checkpoint, force_set in measured:
        rows.append(f"{name:24} {size(checkpoint):>9}   {perplexity(checkpoint, force_set):.3f}")
        print(rows[-1], flush=True)
    step("vllm serve demo-output/qoq --quantization qoq")
    with server(qoq) as url:
        for prompt in ("import os\n\ndef main(", "class Stack:\n    def push(self, item):\n"):
            print(prompt + complete(url, prompt) + "\n---")
        for phase, name, count in steps(url):
            print(f"{phase:8} steps in {name:6} {count}")
    step("Result: size of the weights, perplexity")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

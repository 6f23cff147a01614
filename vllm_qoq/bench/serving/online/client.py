"""The client: `vllm bench serve`, which sends the requests of a rate and times the answers."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from vllm_qoq.bench.serving import process
from vllm_qoq.bench.serving.online.load import Load
from vllm_qoq.bench.serving.online.records import Measured
from vllm_qoq.bench.serving.online.server import NAME, VLLM, Server, Stopped
from vllm_qoq.errors import printable

# Requests that come at once before those that count, so that nothing is compiled meanwhile.
_WARM_UP = 16
_POLL_SECONDS = 0.2
# A request's error, or the last line of its traceback.
_FAILED = re.compile(r"^Error \d+: (?:Traceback.*\n(?:[ \t].*\n)*)?(.+)", re.MULTILINE)
_LONGEST_REASON = 200


def ask(
    server: Server, tokenizer: str, load: Load, rate: float, place: Path, ends: float | None
) -> Measured:
    """Send the requests of a rate; raises Stopped where not all were answered before `ends`.

    tokenizer  folder with the tokenizer that the server has
    place      start of the names of the client's files
    """
    log, file = place.with_name(f"{place.name}.client.log"), place.with_name(f"{place.name}.result")
    file.unlink(missing_ok=True)
    # aiohttp heeds proxies, which are for other machines.
    env = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = arguments(server.url, tokenizer, load, rate, file)
    with log.open("w") as output, process.session(command, output, env) as client:
        while client.poll() is None:
            server.check(ends)
            time.sleep(_POLL_SECONDS)
    if client.returncode:
        server.check_whether_it_ends()
        raise Stopped(process.reason(log, client.returncode))
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["completed"] != load.requests(rate):
        server.check_whether_it_ends()
        raise Stopped(_failure(found["completed"], load, rate, log))
    log.unlink()
    file.unlink()
    return measured(found, load, rate)


def arguments(url: str, tokenizer: str, load: Load, rate: float, file: Path) -> list[str]:
    """Write the command that sends the requests of a rate, and its result to `file`."""
    options = {
        "--base-url": url,
        "--model": NAME,
        "--tokenizer": tokenizer,
        "--seed": 0,
        "--dataset-name": "random",
        "--random-input-len": load.lengths.prompt,
        "--random-output-len": load.lengths.new,
        "--num-prompts": load.requests(rate),
        "--num-warmups": _WARM_UP,
        "--request-rate": rate,
        "--temperature": 0,
        "--percentile-metrics": "ttft,tpot",
        "--metric-percentiles": 99,
        "--result-dir": file.parent,
        "--result-filename": file.name,
    }
    goodput = [f"{name}:{most:g}" for name, most in load.objective.items()]
    return [
        *(*VLLM, "bench", "serve", "--ignore-eos", "--disable-tqdm", "--save-result"),
        *(str(part) for option in options.items() for part in option),
        *("--goodput", *goodput),
    ]


def measured(found: dict[str, Any], load: Load, rate: float) -> Measured:
    """Make a record of what the client has written of a rate."""
    return Measured(
        prompt=load.lengths.prompt,
        new=load.lengths.new,
        rate=rate,
        requests=load.requests(rate),
        objective=dict(load.objective),
        seconds=found["duration"],
        good=round(found["request_goodput"] * found["duration"]),
        ttft_ms=found["median_ttft_ms"],
        ttft_p99_ms=found["p99_ttft_ms"],
        tpot_ms=found["median_tpot_ms"],
        tpot_p99_ms=found["p99_tpot_ms"],
        tokens_per_second=found["output_throughput"],
    )


def _failure(completed: int, load: Load, rate: float, log: Path) -> str:
    """Say how many requests failed, and why the first did."""
    requests = load.requests(rate)
    said = _FAILED.search(log.read_text(encoding="utf-8", errors="replace"))
    why = printable(said[1][:_LONGEST_REASON]) if said else f"its log is {log}"
    return f"at {rate:g} requests a second {requests - completed} of {requests} failed: {why}"

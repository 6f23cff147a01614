"""What the tests of `bench serving --online` share: made-up results, and a made-up vLLM.

The file itself is that vLLM: `python tests/support/online_units.py serve FOLDER ...` answers
/health, `... bench serve ...` writes a result. FOLDER/behaviour says what goes wrong.
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

PACKAGES = {"vllm-qoq": "0.1.0", "vllm": "0.26.0", "llmcompressor": None}


def made_up(rates=(1.0, 2.0, 4.0), shares=None, left_out=None, **more):
    """A result of servers `shares`: name -> share of the requests that were good, at each rate."""
    # Imported here, because the made-up vLLM needs none of it.
    from vllm_qoq.bench.serving import formats
    from vllm_qoq.bench.serving.cases import Lengths
    from vllm_qoq.bench.serving.online.load import Load
    from vllm_qoq.bench.serving.online.records import Measured
    from vllm_qoq.bench.serving.online.result import Online, Served

    load = Load(Lengths(1024, 512), rates=rates, **more)

    def measured(rate, share):
        requests = load.requests(rate)
        return Measured(
            prompt=1024, new=512, rate=rate, requests=requests, objective=dict(load.objective),
            seconds=load.seconds, good=round(share * requests), ttft_ms=50 * rate,
            ttft_p99_ms=400 * rate, tpot_ms=4 + rate, tpot_p99_ms=5 + rate,
            tokens_per_second=512 * rate,
        )  # fmt: skip

    servers = []
    for name, found in (shares or {"fp8-kvfp8": (1, 0.5, 0), "w4a8-kv4": (1, 1, 0.5)}).items():
        how = None if name == "mine" else formats.parse(name)
        servers.append(
            Served(
                name=name,
                is_ours=how is not None and how.is_ours,
                format=how,
                weights_gib=8.5,
                measured=tuple(map(measured, rates, found)),
                left_out=(left_out or {}).get(name),
            )
        )
    return Online("llama-3-8b", "Some GPU", {"packages": PACKAGES}, load, {}, tuple(servers))


class _Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


def _option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def _serve() -> None:
    print("(EngineCore pid=1) Model loading took 1.25 GiB memory", flush=True)
    behaviour = _behaviour(Path(sys.argv[2]))
    if behaviour == "does not start":
        print("(EngineCore pid=1) ERROR ValueError: no room for the cache")
        print("(APIServer pid=2) RuntimeError: Engine core initialization failed. See root cause")
        sys.exit(1)
    server = HTTPServer(("127.0.0.1", int(_option("--port"))), _Healthy)
    if behaviour == "dies":
        server.handle_request()
        time.sleep(0.5)
        print("(EngineCore pid=1) torch.OutOfMemoryError: 2 GiB are missing")
        sys.exit(1)
    server.serve_forever()


def _behaviour(folder: Path) -> str:
    file = folder / "behaviour"
    return file.read_text() if file.exists() else ""


def _bench() -> None:
    folder, requests = Path(_option("--tokenizer")), int(_option("--num-prompts"))
    (folder / "asked").open("a").write(f"{_option('--request-rate')}\n")
    behaviour = _behaviour(folder)
    if behaviour in ("dies", "hangs"):
        (folder / "waits").touch()
        time.sleep(60)
    if behaviour == "client fails":
        print("OSError: no such dataset")
        sys.exit(1)
    errors = {
        "refuses": "Error 0: Bad Request\nError 1: Not Found",
        "breaks off": 'Error 0: Traceback (most recent):\n  File "x"\n    a()\nOSError: b',
    }
    failed = behaviour in errors
    if failed:
        print(f"Failed requests during benchmark run detected:\n{errors[behaviour]}\n====")
    result = {
        "completed": requests - failed, "duration": 2.0, "request_goodput": requests / 4,
        "median_ttft_ms": 40.0, "p99_ttft_ms": 80.0, "median_tpot_ms": 5.0, "p99_tpot_ms": 6.0,
        "output_throughput": 100.0,
    }  # fmt: skip
    Path(_option("--result-dir"), _option("--result-filename")).write_text(json.dumps(result))


if __name__ == "__main__":
    {"serve": _serve, "bench": _bench}[sys.argv[1]]()

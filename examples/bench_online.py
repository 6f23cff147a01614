"""Time to first token and time per output token of several checkpoints under load, in one run.

    python examples/make_random_checkpoints.py W --only-configs
    python examples/bench_online.py w8a8=W/w8a8 w4a16=W/w4a16 two-sets=W/two-sets nested=W/nested \\
        -o OUT

Every checkpoint is served by `vllm serve` with vLLM's default compilation and CUDA graphs, weights
are vLLM's dummies, and asked by vLLM's own client, `vllm bench serve`, at several request rates:
random prompts of 2048 tokens, 128 new tokens each, Poisson arrivals. OUT gets online.json,
online.md and online.png; all times are medians in milliseconds. The memory is what vLLM's log says
that loading the weights took.
"""

import argparse
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
START_SECONDS = 600
METRICS = {"median_ttft_ms": "TTFT", "median_tpot_ms": "TPOT", "p99_ttft_ms": "TTFT, 99 %"}


@contextmanager
def server(folder, log, options):
    """The URL of a server of `folder`, whose output goes to the file `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*VLLM, "serve", folder, "--load-format", "dummy", "--no-enable-prefix-caching"]
    command += ["--host", "127.0.0.1", "--port", port, "--served-model-name", "model", *options]
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=subprocess.STDOUT
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(
                        f"error: the server of {folder} did not start:\n{log.read_text()[-4000:]}"
                    )
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def ask(url, folder, rate, args, scratch):
    """The medians of one request rate."""
    result = scratch / "result.json"
    command = [*VLLM, "bench", "serve", "--base-url", url, "--model", "model", "--tokenizer", folder]
    command += ["--dataset-name", "random", "--random-input-len", args.prompt, "--ignore-eos"]
    command += ["--random-output-len", args.new_tokens, "--request-rate", rate, "--seed", "0"]
    command += ["--num-prompts", max(args.fewest, round(rate * args.seconds))]
    command += ["--percentile-metrics", "ttft,tpot", "--disable-tqdm"]
    command += ["--save-result", "--save-detailed", "--result-dir", scratch, "--result-filename", result.name]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0 or not result.exists():
        sys.exit(f"error: vllm bench serve failed:\n{(done.stdout + done.stderr)[-4000:]}")
    found = json.loads(result.read_text())
    result.unlink()
    if found["failed"]:
        said = next(filter(None, found["errors"]), "no reason given")
        sys.exit(f"error: {found['failed']} requests failed at rate {rate}, the first: {said}")
    return {name: found[name] for name in METRICS}


def loaded_gib(log):
    """GiB that the weights took, by vLLM's log; None where it does not say."""
    said = re.search(r"[Mm]odel loading took ([\d.]+) GiB", log.read_text())
    return float(said[1]) if said else None


def table(results, rates):
    """Markdown: a row per metric and rate, a column per checkpoint."""
    names = list(results)
    lines = ["| requests a second | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for metric, label in METRICS.items():
        for rate in rates:
            cells = (f"{results[name]['rates'][str(rate)][metric]:.1f}" for name in names)
            lines.append(f"| {label}, {rate:g} | " + " | ".join(cells) + " |")
    memory = (results[name]["weights_gib"] for name in names)
    cells = ("-" if gib is None else f"{gib:.2f}" for gib in memory)
    lines.append("| weights, GiB | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results, rates, path):
    """TTFT and TPOT over the request rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    metrics = ("median_ttft_ms", "median_tpot_ms")
    for axes, metric in zip(figure.subplots(1, 2), metrics, strict=True):
        for name, found in results.items():
            line = [found["rates"][str(rate)][metric] for rate in rates]
            axes.plot(rates, line, "o-", label=name)
        axes.set(xlabel="requests a second", ylabel=f"{METRICS[metric]}, ms, median", yscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


def main():
    """Serve each checkpoint, ask it at every rate, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--rates", default="1,4,8", metavar="R,...", help="requests a second")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=20, help="of arrivals at each rate")
    parser.add_argument("--fewest", type=int, default=16, metavar="N", help="requests at each rate")
    parser.add_argument("--serve", default="", metavar="OPTIONS", help="more for `vllm serve`")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    args = parser.parse_args()
    rates = [float(rate) for rate in args.rates.split(",")]
    args.output.mkdir(parents=True, exist_ok=True)

    results = {}
    for item in args.checkpoints:
        name, _, folder = item.partition("=")
        log = args.output / f"{name}.log"
        print(f"{name}: starting the server ({log})", file=sys.stderr, flush=True)
        # A prompt that was made of random tokens may have a few more when it is read again.
        length = args.prompt + args.new_tokens + 256
        options = ["--max-model-len", length, *args.serve.split()]
        results[name] = {"rates": {}}
        with server(folder, log, options) as url, tempfile.TemporaryDirectory() as scratch:
            ask(url, folder, rates[0], args, Path(scratch))  # warm-up
            for rate in rates:
                print(f"{name}: {rate:g} requests a second", file=sys.stderr, flush=True)
                results[name]["rates"][str(rate)] = ask(url, folder, rate, args, Path(scratch))
        results[name]["weights_gib"] = loaded_gib(log)
    (args.output / "online.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "online.md").write_text(table(results, rates))
    plot(results, rates, args.output / "online.png")
    print(table(results, rates))


if __name__ == "__main__":
    main()

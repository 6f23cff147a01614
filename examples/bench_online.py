"""Time to first token and time per output token of several checkpoints under load, in one run.

    python examples/make_random_checkpoints.py W --only-configs
    python examples/bench_online.py w8a8=W/w8a8 w4a16=W/w4a16 two-sets=W/two-sets nested=W/nested \\
        -o OUT

Every checkpoint is served by `vllm serve` with vLLM's default compilation and CUDA graphs. The
weights are vLLM's dummies. vLLM's own client, `vllm bench serve`, asks at several request rates,
with random prompts of 2048 tokens, 128 new tokens each and Poisson arrivals. OUT gets online.json,
online.md and online.png; all times are medians in milliseconds. The memory is what vLLM's log says
that loading the weights took.
"""

import argparse
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
START_SECONDS = 600
WARM_UP = 16  # requests
METRICS = {"median_ttft_ms": "TTFT", "median_tpot_ms": "TPOT", "p99_ttft_ms": "TTFT, 99 %"}


@contextmanager
def server(folder, log, options):
    """Start a server of `folder`, whose output goes to the file `log`; yields its URL."""
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
            process.wait()


def ask(url, folder, rate, requests, args, log):
    """Measure one request rate with `vllm bench serve`, which prints to the end of `log`."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    options = ["--base-url", url, "--model", "model", "--tokenizer", folder, "--seed", "0"]
    options += ["--dataset-name", "random", "--random-input-len", args.prompt, "--ignore-eos"]
    options += ["--random-output-len", args.new_tokens, "--num-prompts", requests]
    options += ["--request-rate", rate, "--percentile-metrics", "ttft,tpot", "--disable-tqdm"]
    options += ["--save-detailed"]
    with log.open("a") as file, redirect_stdout(file):
        found = serve.main(parser.parse_args([str(option) for option in options]))
    if found["completed"] < requests:
        said = next(filter(None, found["errors"]), "no reason given")
        sys.exit(f"error: at rate {rate} a request failed ({log}): {said}")
    return {name: found[name] for name in METRICS}


def loaded_gib(log):
    """Read from vLLM's log how many GiB the weights took; None where it does not say."""
    said = re.search(r"[Mm]odel loading took ([\d.]+) GiB", log.read_text())
    return float(said[1]) if said else None


def table(results, rates):
    """Write a Markdown table with a row per metric and rate, a column per checkpoint."""
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
    """Draw TPOT and TTFT at every request rate."""
    from vllm_qoq import plots

    columns = []
    for metric in ("median_tpot_ms", "median_ttft_ms"):
        for rate in rates:
            values = {name: found["rates"][str(rate)][metric] for name, found in results.items()}
            columns.append(plots.Column(f"{METRICS[metric]}, {rate:g} requests/s", "ms", values))
    tokens = columns[len(rates) - 1].values  # at the last rate
    best, *others = sorted(tokens, key=tokens.__getitem__)
    title = f"A token takes {tokens[best]:.2f} ms with {best}, at {rates[-1]:g} requests a second"
    if others:
        faster = plots.speed(tokens[others[0]] / tokens[best], others[0])
        title = f"At {rates[-1]:g} requests a second {best} generates {faster}"
    subtitle = "Medians of the time per token (TPOT) and to the first token (TTFT)."
    figure = plots.figure(title, subtitle, height=0.8 + 0.7 * len(results))
    plots.bars(figure, columns, per_row=len(rates))
    plots.save(figure, path)


def checkpoint(text):
    """Parse NAME=DIR as (name, folder)."""
    name, _, folder = text.partition("=")
    if not name or not Path(folder, "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR of a folder with a config.json")
    return name, folder


def request_rates(text):
    """Parse R,... as numbers above 0."""
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        rates = []
    if not rates or min(rates) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not R,... with numbers above 0")
    return rates


def main():
    """Serve each checkpoint, ask it at every rate, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=checkpoint, metavar="NAME=DIR")
    parser.add_argument(
        "--rates", type=request_rates, default="1,4,8", metavar="R,...", help="requests a second"
    )
    parser.add_argument("--prompt", type=int, default=2048, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=20, help="of arrivals at each rate")
    parser.add_argument("--fewest", type=int, default=16, metavar="N", help="requests at each rate")
    parser.add_argument("--serve", default="", metavar="OPTIONS", help="more for `vllm serve`")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    args = parser.parse_args()
    rates = args.rates
    args.output.mkdir(parents=True, exist_ok=True)

    results = {}
    for name, folder in args.checkpoints:
        log = args.output / f"{name}.log"
        print(f"{name}: starting the server ({log})", file=sys.stderr, flush=True)
        # vLLM bounds a prompt's characters by those of so many tokens, without spaces between them.
        length = 2 * args.prompt + args.new_tokens
        options = ["--max-model-len", length, *args.serve.split()]
        results[name] = {"rates": {}}
        client_log = args.output / f"{name}-client.log"
        with server(folder, log, options) as url:
            ask(url, folder, "inf", WARM_UP, args, client_log)
            for rate in rates:
                print(f"{name}: {rate:g} requests a second", file=sys.stderr, flush=True)
                requests = max(args.fewest, round(rate * args.seconds))
                found = ask(url, folder, rate, requests, args, client_log)
                results[name]["rates"][str(rate)] = found
        results[name]["weights_gib"] = loaded_gib(log)
        # Results are written after each checkpoint, so that a run that stops keeps them.
        (args.output / "online.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "online.md").write_text(table(results, rates))
    plot(results, rates, args.output / "online.png")
    print(table(results, rates))


if __name__ == "__main__":
    main()

"""Time of a step and of a prefill in several formats, in one run.

    python examples/make_random_checkpoints.py W --only-configs
    python examples/bench_steps.py w8a8=W/w8a8 fp8=W/fp8 w4a16=W/w4a16 w4a8=W/w4a8 \\
        w4a8-head8=W/w4a8-head8 --ours w4a8,w4a8-head8

The weights are vLLM's dummies, so only config.json is read. Each format runs in a process of its
own with vLLM's default compilation and CUDA graphs. Prefill is 256 prompts of 1024 random tokens;
a step is what each token after the first takes, at batches of 1, 16 and 64 after prompts of 128
tokens and of 256 after prompts of 1024. All numbers are medians over repeated runs. The last
columns are the best of the others over each of --ours.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

# Pairs of batch size and length of the prompts.
STEPS = ((1, 128), (16, 128), (64, 128), (256, 1024))
NEW_TOKENS = 129


def measure(folder: str, repeats: int) -> dict[str, float]:
    """Measure one format: prefill in seconds, steps in milliseconds."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=1024 + NEW_TOKENS + 16,
        max_num_batched_tokens=8192,
        max_num_seqs=256,
        gpu_memory_utilization=0.85,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    rng = random.Random(0)

    def seconds(batch: int, length: int, tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [rng.randrange(1000, 100000) for _ in range(length)]}
            for _ in range(batch)
        ]
        sampling = SamplingParams(
            max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    result = {}
    for batch, length in STEPS:
        seconds(batch, length, 2)  # warm-up
        runs = [
            [seconds(batch, length, tokens) for _ in range(repeats)] for tokens in (1, NEW_TOKENS)
        ]
        first, all_tokens = (statistics.median(run) for run in runs)
        result[f"step {batch}"] = (all_tokens - first) / (NEW_TOKENS - 1) * 1e3
        if batch == STEPS[-1][0]:
            result["prefill"] = first
    return result


def table(results: dict[str, dict[str, float]], ours: list[str]) -> str:
    """Write a table with a row per number, a column per format, and ours against the best other."""
    peers = [found for name, found in results.items() if name not in ours]
    compared = {name: results[name] for name in ours if name in results and peers}
    heads = ["ms (prefill: s)", *results, *(f"best other / {name}" for name in compared)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for key in next(iter(results.values())):
        cells = [f"{found[key]:.3f}" for found in results.values()]
        best = min((peer[key] for peer in peers), default=0.0)
        cells += [f"{best / found[key]:.2f}" for found in compared.values()]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure each format in a process of its own, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--repeats", type=int, default=3, help="runs per number")
    parser.add_argument("--ours", default="", metavar="NAME,...", help="compared with the others")
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print("RESULT " + json.dumps(measure(args.only, args.repeats)))
        return

    results, ours = {}, args.ours.split(",")
    for item in args.checkpoints:
        name, _, folder = item.partition("=")
        print(f"measuring {name} ({folder})", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "-", "--only", folder, "--repeats", str(args.repeats)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
        if line is None:
            sys.exit(f"error: {name} could not be measured (status {done.returncode}), see above")
        results[name] = json.loads(line.removeprefix("RESULT "))
        print(table(results, ours), file=sys.stderr, flush=True)
    if args.output_json:
        args.output_json.write_text(json.dumps(results, indent=2))
    print(table(results, ours))


if __name__ == "__main__":
    main()

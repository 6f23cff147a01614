"""Time of a step, and how much fits, with the KV cache in several widths, in one run.

    python examples/make_random_checkpoints.py W --only-configs
    python examples/bench_kv_cache.py W/bf16

The weights are vLLM's dummies, so only config.json is read. Every width runs in a process of its
own with vLLM's default compilation and CUDA graphs. There are 256 prompts of 1024 random tokens
with 512 new tokens each; a step is what each token after the first takes. Then an engine with a
pool of 8 GiB says how many requests of 4096 tokens it holds, by vLLM's own count. The last columns
say how many times faster ours is than the unquantized and the fp8 cache, and how many times more
it holds.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

BATCH, PROMPT, NEW_TOKENS = 256, 1024, 512
POOL, REQUEST = 8 << 30, 4096
WIDTHS = {
    "bf16": {},
    "fp8": {"kv_cache_dtype": "fp8"},
    "kv8": {"quantization": "qoq", "additional_config": {"qoq": {"kv_bits": 8}}},
    "kv4": {"quantization": "qoq", "additional_config": {"qoq": {"kv_bits": 4}}},
}
TIMES = ("prompts, s", "step, ms")  # The other numbers tell what a pool holds.
OURS, PEERS = ("kv8", "kv4"), ("bf16", "fp8")


def engine(folder: str, width: str, **options: object) -> object:
    """Start an engine with dummy weights."""
    from vllm import LLM

    return LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_num_seqs=BATCH,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **WIDTHS[width],
        **options,
    )


def time_steps(folder: str, width: str, repeats: int) -> dict[str, float]:
    """Measure the seconds of the prompts, and the milliseconds of a step."""
    from vllm import SamplingParams

    llm = engine(
        folder,
        width,
        max_model_len=PROMPT + NEW_TOKENS + 16,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=0.85,
    )
    rng = random.Random(0)

    def seconds(tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [rng.randrange(1000, 100000) for _ in range(PROMPT)]}
            for _ in range(BATCH)
        ]
        sampling = SamplingParams(
            max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    seconds(2)  # warm-up
    first, both = (
        statistics.median(seconds(tokens) for _ in range(repeats)) for tokens in (1, NEW_TOKENS)
    )
    return dict(zip(TIMES, (first, (both - first) / (NEW_TOKENS - 1) * 1e3), strict=True))


def count_tokens(folder: str, width: str) -> dict[str, float]:
    """Count what a pool of POOL bytes holds."""
    llm = engine(
        folder, width, max_model_len=REQUEST, kv_cache_memory_bytes=POOL, enforce_eager=True
    )
    config = llm.llm_engine.vllm_config.cache_config
    tokens = config.num_gpu_blocks * config.block_size
    return {"tokens in 8 GiB": tokens, "requests of 4096": tokens / REQUEST}


def table(results: dict[str, dict[str, float]]) -> str:
    """Write a table with a row per number, a column per width, and our gains."""
    pairs = [(a, b) for b in OURS for a in PEERS if {a, b} <= set(results)]
    heads = ["", *results, *(f"{ours} against {peer}" for peer, ours in pairs)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for key in next(iter(results.values())):
        cells = [
            f"{found[key]:.0f}" if found[key] > 1000 else f"{found[key]:.3f}"
            for found in results.values()
        ]
        for peer, ours in pairs:
            times = results[peer][key] / results[ours][key]
            cells.append(f"{times if key in TIMES else 1 / times:.2f}")
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def in_a_process(folder: str, width: str, what: str, repeats: int) -> dict[str, float]:
    """Measure one width in a process of its own; `what` is "time" or "count"."""
    command = [sys.executable, __file__, folder, "--only", f"{what} {width}"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if what == "count" else None
    done = subprocess.run(
        [*command, "--repeats", str(repeats)], stdout=subprocess.PIPE, text=True, env=environment
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        sys.exit(f"error: {width} could not be measured (status {done.returncode}), see above")
    return json.loads(line.removeprefix("RESULT "))


def main() -> None:
    """Measure each width, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="DIR")
    parser.add_argument("--widths", default=",".join(WIDTHS), metavar="NAME,...")
    parser.add_argument("--repeats", type=int, default=3, help="runs per number")
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        what, width = args.only.split()
        if what == "time":
            result = time_steps(args.checkpoint, width, args.repeats)
        else:
            result = count_tokens(args.checkpoint, width)
        print("RESULT " + json.dumps(result))
        return

    results: dict[str, dict[str, float]] = {}
    for width in args.widths.split(","):
        if width not in WIDTHS:
            parser.error(f"{width!r} is not a width; choose from {', '.join(WIDTHS)}")
        results[width] = {}
    for width in results:
        for what in ("time", "count"):
            print(f"{what}: {width}", file=sys.stderr, flush=True)
            results[width] |= in_a_process(args.checkpoint, width, what, args.repeats)
        finished = {name: found for name, found in results.items() if found}
        print(table(finished), file=sys.stderr, flush=True)
    if args.output_json:
        args.output_json.write_text(json.dumps(results, indent=2))
    print(table(results))


if __name__ == "__main__":
    main()

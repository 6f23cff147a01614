"""Time to first token and time per output token of several checkpoints, in one run.

    python examples/bench_serving.py w8a8=DIR w4a16=DIR merged=DIR [--output-json FILE]

Each checkpoint is loaded by an engine in a process of its own, with vLLM's
default compilation and CUDA graphs. The prompts are random tokens. TTFT is the
time of a request for one token; TPOT is what each further token adds at the
given batch size. Both are medians over repeated runs, in milliseconds.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT_LENGTHS = (128, 512, 768, 1024, 2048, 4096)
BATCHES = (1, 16, 64)
MAX_NUM_SEQS = 256  # With it, vLLM captures graphs of up to 512 tokens, as by default.
NEW_TOKENS = 129


def measure(checkpoint: str, repeats: int) -> dict[str, float]:
    """Measure all numbers of one checkpoint."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        checkpoint,
        skip_tokenizer_init=True,
        max_model_len=max(PROMPT_LENGTHS) + NEW_TOKENS,
        max_num_batched_tokens=8192,
        max_num_seqs=MAX_NUM_SEQS,
        gpu_memory_utilization=0.6,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    rng = random.Random(0)

    def seconds(batch: int, length: int, tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [rng.randrange(1000, vocabulary - 1000) for _ in range(length)]}
            for _ in range(batch)
        ]
        sampling = SamplingParams(
            max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    def median_ms(batch: int, length: int, tokens: int, times: int) -> float:
        seconds(batch, length, tokens)  # warm-up
        return statistics.median(seconds(batch, length, tokens) for _ in range(times)) * 1e3

    result = {f"TTFT {n}": median_ms(1, n, 1, 5 * repeats) for n in PROMPT_LENGTHS}
    for batch in BATCHES:
        first, all_tokens = (median_ms(batch, 128, n, repeats) for n in (1, NEW_TOKENS))
        result[f"TPOT {batch}"] = (all_tokens - first) / (NEW_TOKENS - 1)
    return result


def table(results: dict[str, dict[str, float]]) -> str:
    """Write a table in milliseconds, with a row per number and a column per checkpoint."""
    names = list(results)
    lines = ["| ms | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for key in next(iter(results.values())):
        cells = " | ".join(f"{results[name][key]:.3f}" for name in names)
        lines.append(f"| {key} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Measure each checkpoint in a process of its own, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--repeats", type=int, default=3, help="runs per number (TTFT: 5 times)")
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print("RESULT " + json.dumps(measure(args.only, args.repeats)))
        return

    results = {}
    for item in args.checkpoints:
        name, _, folder = item.partition("=")
        print(f"measuring {name} ({folder})", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "-", "--only", folder, "--repeats", str(args.repeats)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
        if line is None:
            sys.exit(f"error: {name} could not be measured (status {done.returncode}), see above")
        results[name] = json.loads(line.removeprefix("RESULT "))
    if args.output_json:
        args.output_json.write_text(json.dumps(results, indent=2))
    print(table(results))


if __name__ == "__main__":
    main()

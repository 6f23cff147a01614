"""Time of a step and of a prefill with W4A8 beside the formats that vLLM offers, in one run.

    python examples/bench_w4a8.py [--only w8a8 w4a8] [--output-json FILE]

The shape is Llama-3-8B's, the weights are vLLM's dummies, so nothing is downloaded or written.
Each format runs in a process of its own with vLLM's default compilation and CUDA graphs:
prefill is 256 prompts of 1024 random tokens; a step is what each token after the first takes,
at batches of 1, 16 and 64 after prompts of 128 tokens and of 256 after prompts of 1024. Medians
over repeated runs.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from make_random_checkpoints import config

# Batch, prompt length.
STEPS = ((1, 128), (16, 128), (64, 128), (256, 1024))
NEW_TOKENS = 129
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
QOQ = {
    "quant_method": "qoq",
    "format_version": 1,
    "sets": {"w4a8": {"quant_method": "qoq_linear", "group_size": 128, "ignore": ["lm_head"]}},
    "routing": {"prefill": "w4a8", "decode": [{"set": "w4a8"}]},
}


def formats(layers: int) -> dict[str, dict]:
    """Name -> config.json."""
    w8a8 = config("w8a8", layers)
    fp8 = json.loads(json.dumps(w8a8))
    fp8["quantization_config"]["format"] = "float-quantized"
    group = fp8["quantization_config"]["config_groups"]["group_0"]
    group["weights"] = {**FP8, "strategy": "channel", "dynamic": False}
    group["input_activations"] = {**FP8, "strategy": "token", "dynamic": True}
    return {
        "w8a8": w8a8,
        "fp8": fp8,
        "w4a16": config("w4a16", layers),
        "w4a8": {**w8a8, "quantization_config": QOQ},
    }


def measure(folder: str, repeats: int) -> dict[str, float]:
    """All numbers of one format: prefill in seconds, steps in milliseconds."""
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


def table(results: dict[str, dict[str, float]]) -> str:
    """One row per number, one column per format, and how W4A8 compares with the best other."""
    names = list(results)
    peers = [name for name in names if name != "w4a8"]
    has_ratio = "w4a8" in names and peers
    heads = ["ms (prefill: s)", *names, *(["best peer / w4a8"] if has_ratio else [])]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for key in next(iter(results.values())):
        cells = [f"{results[name][key]:.3f}" for name in names]
        if has_ratio:
            best = min(results[name][key] for name in peers)
            cells.append(f"{best / results['w4a8'][key]:.2f}")
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure each format in a process of its own, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(formats(1)), help="leave out the others")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="runs per number")
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT " + json.dumps(measure(args.child, args.repeats)))
        return

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in formats(args.layers).items():
            if args.only and name not in args.only:
                continue
            print(f"measuring {name}", file=sys.stderr, flush=True)
            model = Path(folder, name)
            model.mkdir()
            (model / "config.json").write_text(json.dumps(content))
            command = [sys.executable, __file__, "--child", str(model)]
            command += ["--repeats", str(args.repeats)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
            if line is None:
                sys.exit(f"error: {name} could not be measured, see above")
            results[name] = json.loads(line.removeprefix("RESULT "))
    if args.output_json:
        args.output_json.write_text(json.dumps(results, indent=2))
    print(table(results))


if __name__ == "__main__":
    main()

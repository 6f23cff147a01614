"""Perplexity of every set, and what each step of QoQ adds, on one model.

    python examples/accuracy.py MODEL --text calibration.txt --heldout heldout.txt -o OUT
        [--compare NAME=CHECKPOINT ...]

Quantizes MODEL with `vllm-qoq quantize` once as it comes and once per step left out,
and measures each in plain transformers with a 16-bit and a simulated 4-bit KV cache.
`--compare` adds finished checkpoints, e.g. llmcompressor's. Writes OUT/accuracy.json,
OUT/accuracy.md and OUT/accuracy.png.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_qoq.checkpoint import Checkpoint
from vllm_qoq.format import split_layer, split_name
from vllm_qoq.quantize import evaluate
from vllm_qoq.quantize.architectures import architecture
from vllm_qoq.quantize.job import Job, run
from vllm_qoq.quantize.options import Options
from vllm_qoq.quantize.sets import NAMES, dequantize
from vllm_qoq.quantize.text import pieces

ROUND_TO_NEAREST = {
    "rotate": False,
    "smooth_attention": 0.0,
    "reorder": False,
    "clip": False,
    "gptq": False,
}
# Name of the run -> sets and options. The table has a row per set.
RUNS = {
    "round to nearest": {"sets": ("w8a8", "w4a8"), **ROUND_TO_NEAREST},
    "QoQ": {"sets": ("w8a8", "w4a16", "w4a8")},
    "QoQ per channel": {"sets": ("w4a8",), "group_size": -1},
    "QoQ without rotation": {"sets": ("w4a8",), "rotate": False},
    "QoQ without SmoothAttention": {"sets": ("w4a8",), "smooth_attention": 0.0},
    "QoQ with smoothed outputs (0.3)": {"sets": ("w4a8",), "smooth_output": 0.3},
    "QoQ without reordering": {"sets": ("w4a8",), "reorder": False},
    "QoQ without clipping": {"sets": ("w4a8",), "clip": False},
    "QoQ without GPTQ": {"sets": ("w4a8",), "gptq": False},
}
KV_BITS = (16, 4)


class Measurer:
    """Measures sets of checkpoints against one float model."""

    def __init__(self, model: Path, heldout: Path, seqlen: int) -> None:
        self.model = model
        config = json.loads((model / "config.json").read_text())
        self.arch = architecture(config)
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.windows = pieces(heldout, tokenizer, seqlen, None)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def float_model(self) -> torch.nn.Module:
        """The unquantized model."""
        loaded = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto")
        return loaded.to(self.device).eval()

    def base(self) -> dict[str, float]:
        """Of the unquantized model."""
        return self._perplexities(self.float_model())

    def of_set(self, checkpoint: Checkpoint, set_name: str | None, int8: bool) -> dict[str, float]:
        """Of one set; None for a checkpoint without sets."""
        layers: dict[str, dict[str, torch.Tensor]] = {}
        weights = {}
        for name in checkpoint.tensors:
            owner, tensor = split_name(name, NAMES if set_name else ())
            if owner not in (None, set_name):
                continue
            layer, leaf = split_layer(tensor)
            if (
                owner is not None
                or leaf.startswith("weight_")
                or f"{layer}.weight_scale" in checkpoint.tensors
            ):
                layers.setdefault(layer, {})[leaf] = checkpoint.get(name)
            else:
                weights[tensor] = checkpoint.get(name)
        for layer, tensors in layers.items():
            weights[f"{layer}.weight"] = dequantize(tensors)
            if "bias" in tensors:
                weights[f"{layer}.bias"] = tensors["bias"]
        model = self.float_model()
        evaluate.load_set(model, self.arch, weights, int8)
        return self._perplexities(model)

    def _perplexities(self, model: torch.nn.Module) -> dict[str, float]:
        return {f"KV{bits}": evaluate.perplexity(model, self.windows, bits) for bits in KV_BITS}


def quantize(model: Path, text: Path, values: dict, samples: int, seqlen: int, out: Path) -> dict:
    """One run of the quantizer into `out`; returns its report."""
    options = Options.parse({**values, "samples": samples, "seqlen": seqlen}, "run")
    work = out.with_name(out.name + ".work")
    job = Job(model, out, text, work, "never", True, 5 << 30, True)
    return run(job, options)


def table(rows: list[dict]) -> str:
    """Markdown: perplexity and its distance from bf16, for both KV settings."""
    base = rows[0]["KV16"]
    lines = ["| version | set | KV16 | | KV4 (simulated) | |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [
            cell
            for key in ("KV16", "KV4")
            for cell in (f"{row[key]:.4f}", f"{row[key] / base - 1:+.2%}")
        ]
        lines.append(f"| {row['version']} | {row['set']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Distance from bf16 per row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base, labels = rows[0]["KV16"], [f"{row['version']}: {row['set']}" for row in rows[1:]]
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(labels) + 1.5))
    for offset, key, colour in ((0.2, "KV16", "tab:blue"), (-0.2, "KV4", "tab:orange")):
        places = [len(labels) - i + offset for i in range(len(labels))]
        values = [100 * (row[key] / base - 1) for row in rows[1:]]
        axes.barh(places, values, height=0.38, label=key, color=colour)
    axes.set_yticks([len(labels) - i for i in range(len(labels))], labels)
    axes.set_xlabel("perplexity above bf16, %")
    axes.set_xlim(0, 15)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--heldout", type=Path, required=True, help="text to measure on")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--compare", nargs="*", default=[], metavar="NAME=CHECKPOINT")
    parser.add_argument("--only", nargs="*", metavar="RUN", help="of: " + "; ".join(RUNS))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    measurer = Measurer(args.model, args.heldout, args.seqlen)
    rows = [{"version": "bf16", "set": "", **measurer.base()}]

    def add(row: dict) -> None:
        rows.append(row)
        (args.output / "accuracy.json").write_text(json.dumps(rows, indent=2))
        print(table([rows[0], row]).splitlines()[-1], file=sys.stderr, flush=True)

    for item in args.compare:
        name, _, folder = item.partition("=")
        checkpoint = Checkpoint.open(folder)
        groups = checkpoint.config["quantization_config"]["config_groups"].values()
        int8 = any(group["input_activations"] for group in groups)
        add({"version": name, "set": "", **measurer.of_set(checkpoint, None, int8)})
    with tempfile.TemporaryDirectory() as folder:
        for name, values in RUNS.items():
            if args.only is not None and name not in args.only:
                continue
            started = time.monotonic()
            out = Path(folder) / "checkpoint"
            report = quantize(args.model, args.text, values, args.samples, args.seqlen, out)
            seconds = time.monotonic() - started
            for set_name in values["sets"]:
                found = measurer.of_set(Checkpoint.open(out), set_name, set_name.endswith("a8"))
                facts = {"seconds": seconds, "memory_bytes": report["peak_memory_bytes"]}
                add({"version": name, "set": set_name, **found, **facts})
    (args.output / "accuracy.md").write_text(table(rows))
    plot(rows, args.output / "accuracy.png")
    print(table(rows))


if __name__ == "__main__":
    main()

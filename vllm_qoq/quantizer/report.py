"""The report of a quantization: the error of every layer in every set, time and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypedDict

from typing_extensions import NotRequired

from vllm_qoq.models.names import split_expert
from vllm_qoq.models.table import LayerNames
from vllm_qoq.progress import duration, human_bytes
from vllm_qoq.quantizer import QuantizeError
from vllm_qoq.quantizer.gguf_source.convert import note
from vllm_qoq.quantizer.options import NO_MEAN_UNDER_A_CAP, STEPS, QuantizeOptions

_SHOWN = 8
"""How many experts a warning names."""


class LayerError(TypedDict):
    """One row of the report: a layer in a set.

    output_error   |W x - W' x| / |W x| over the calibration inputs
    clipped_share  in a nested set, the share of weights whose residual 4 bits do not hold
    tokens         of an expert, how many went through it; the error of one without a token is
                   |W - W'| / |W|
    rounded_to_nearest  that an expert got too few for GPTQ
    """

    layer: str
    set: str
    output_error: float
    seconds: float
    clipped_share: NotRequired[float]
    tokens: NotRequired[int]
    rounded_to_nearest: NotRequired[bool]


def refuse_clipped(errors: Iterable[LayerError], limit: float) -> None:
    """Raise QuantizeError if a layer's clipped share is above `limit`."""
    rows = (row for row in errors if "clipped_share" in row)
    worst = max(rows, key=lambda row: row["clipped_share"], default=None)
    if worst is not None and worst["clipped_share"] > limit:
        seen = ""
        if "tokens" in worst:
            seen = f"give more text, of which {worst['tokens']} tokens went through this expert, "
        raise QuantizeError(
            f"{worst['layer']}: {worst['clipped_share']:.2%} of the residuals are clipped, more "
            f"than --max-clipped {limit:g}; {seen}leave out --nested to store w8a8 by itself, or "
            "raise --max-clipped, which goes on with what is done"
        )


def starved(errors: Iterable[LayerError]) -> dict[str, int]:
    """Find the experts that were rounded to the nearest, with the tokens that each of them got."""
    found = {}
    for row in errors:
        place = split_expert(row["layer"])
        if place is not None and row.get("rounded_to_nearest"):
            found[f"{place[0]}.{place[1]}"] = row["tokens"]
    return found


def starved_warning(experts: Mapping[str, int], options: QuantizeOptions) -> str:
    """Write the warning about `starved` experts."""
    some = list(experts.items())[:_SHOWN]
    named = ", ".join(f"{name} ({tokens})" for name, tokens in some)
    more = f" and {len(experts) - len(some)} more" if len(experts) > len(some) else ""
    return (
        f"experts that fewer than {options.min_expert_tokens} tokens of the text went through were "
        f"rounded to the nearest, without GPTQ: {named}{more}; give more or other text (--text, "
        "--samples, --seqlen), or lower --min-expert-tokens"
    )


class Steps:
    """A stopwatch for the steps of a run, which follow each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def done(self, step: str) -> None:
        """Note that a step ends here."""
        now = time.monotonic()
        self.seconds[step] = round(now - self._last, 1)
        self._last = now


def summary(errors: list[LayerError], steps: Mapping[str, float]) -> dict[str, Any]:
    """Make the content of quantization_report.json, without what `job` knows.

    steps  seconds by step
    """
    import torch

    peak_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "seconds": round(sum(steps.values()), 1),
        "seconds_of_steps": dict(steps),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_gpu_memory_bytes": peak_gpu,
        "sets": {name: _total(errors, name) for name in dict.fromkeys(r["set"] for r in errors)},
        "layers": errors,
    }


def _total(errors: Iterable[LayerError], set_name: str) -> dict[str, Any]:
    mine = [row for row in errors if row["set"] == set_name]
    worst = max(mine, key=lambda row: row["output_error"])
    return {
        "output_error": sum(row["output_error"] for row in mine) / len(mine),
        "worst_layer": worst["layer"],
        "worst_output_error": worst["output_error"],
    }


def steps_that_ran(options: QuantizeOptions, samples: int) -> str:
    """Say what a run did: its effort, its steps, and how much text it saw."""
    steps = [name for name in STEPS if getattr(options, name)]
    if options.rotate == "values":
        steps[steps.index("rotate")] = "rotate V"
    if options.gptq:
        steps[steps.index("gptq")] = f"gptq with {options.passes} passes of descent"
    if options.kv_bits == 16:  # A 16-bit cache rounds nothing that these would help.
        steps = [step for step in steps if step not in ("k_mean", "smooth_attention")]
    effort = f"effort {options.effort}" if options.effort else "steps"
    return (
        f"{effort}: {', '.join(steps) or 'rounding to the nearest alone'}; "
        f"{samples} pieces of {options.seqlen} tokens"
    )


def left_out(
    names: LayerNames, options: QuantizeOptions, unused: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Say which steps the model cannot take, and why: {"left_out": {step: reason}}, or nothing.

    unused  modules of the model that are not in the output, with what they are
    """
    steps = {module: f"{what} are not in the output" for module, what in unused.items()}
    if names.fixed_stream is not None and options.rotate == "values":
        steps["rotation of the residual stream"] = names.fixed_stream
    if names.fixed_values is not None and options.rotate:
        steps["rotation of V"] = names.fixed_values
    if names.has_capped_scores and options.is_cache_quantized:
        steps["mean of K"] = NO_MEAN_UNDER_A_CAP
    return {"left_out": steps} if steps else {}


def table(report: dict[str, Any]) -> str:
    """Format the report as text: errors by kind of layer and set, checks, time and memory."""
    errors: list[LayerError] = report["layers"]
    sets = list(dict.fromkeys(row["set"] for row in errors))
    kinds = list(dict.fromkeys(_kind(row["layer"]) for row in errors))
    lines = [report["steps"]]
    lines += [f"left out: {step}: {why}" for step, why in report.get("left_out", {}).items()]
    lines += [_row("output error, mean (worst)", sets)]
    for kind in kinds:
        cells = []
        for name in sets:
            mine = [
                row["output_error"]
                for row in errors
                if row["set"] == name and _kind(row["layer"]) == kind
            ]
            cells.append(f"{sum(mine) / len(mine):.4f} ({max(mine):.4f})")
        lines.append(_row(f"  {kind}", cells))
    totals = [report["sets"][name] for name in sets]
    cells = [f"{one['output_error']:.4f} ({one['worst_output_error']:.4f})" for one in totals]
    lines.append(_row("  all layers", cells))
    lines.append(_row("  worst layer", [_short(one["worst_layer"]) for one in totals]))
    lines += _clipped(errors, sets)
    lines += _perplexities(report, sets) + _texts(report)
    if "source" in report:
        lines.append(note(report["source"]))
    gpu = report["peak_gpu_memory_bytes"]
    long = {k: v for k, v in report["seconds_of_steps"].items() if v >= 1}
    steps = ", ".join(f"{step} {duration(seconds)}" for step, seconds in long.items())
    lines.append(
        f"{duration(report['seconds'])} ({steps}), "
        f"peak memory {human_bytes(report['peak_memory_bytes'])}"
        + (f", on the GPU {human_bytes(gpu)}" if gpu else "")
    )
    return "\n".join(lines)


def _kind(layer: str) -> str:
    """Name the kind of a layer, down_proj or experts.down_proj."""
    leaf = layer.rpartition(".")[2]
    if split_expert(layer) is not None:
        return f"experts.{leaf}"
    return f"shared_expert.{leaf}" if ".shared_expert." in layer else leaf


def _short(layer: str) -> str:
    """Shorten model.layers.12.mlp.down_proj to 12.down_proj, and an expert's to 12.7.down_proj."""
    numbers = filter(str.isdigit, layer.split("."))
    return ".".join((*numbers, layer.rpartition(".")[2]))


def _clipped(errors: list[LayerError], sets: list[str]) -> list[str]:
    cells = []
    for name in sets:
        mine = [
            row["clipped_share"] for row in errors if row["set"] == name and "clipped_share" in row
        ]
        cells.append(f"{sum(mine) / len(mine):.2%} ({max(mine):.2%})" if mine else "")
    return [_row("clipped, mean (worst)", cells)] if any(cells) else []


def _perplexities(report: dict[str, Any], sets: list[str]) -> list[str]:
    before = report.get("before", {}).get("perplexity")
    if before is None:
        return []
    lines = [_row("perplexity", ["before", *sets])]
    for cache, value in before.items():
        label = "  KV16" if cache == "kv16" else f"  {cache.upper()}, simulated"
        cells = [f"{value:.4f}"]
        for name in sets:
            found = report["after"][name]["perplexity"][cache]
            cells.append(f"{found:.4f} ({found / before['kv16'] - 1:+.2%})")
        lines.append(_row(label, cells))
    return lines


def _texts(report: dict[str, Any]) -> list[str]:
    lines = []
    for index, text in enumerate(report.get("before", {}).get("generated", ())):
        lines.append(f"before   {text!r}")
        lines += [
            f"{name:8} {found['generated'][index]!r}" for name, found in report["after"].items()
        ]
    return lines


def _row(label: str, cells: Iterable[str]) -> str:
    return label.ljust(28) + "".join(cell.rjust(19) for cell in cells)

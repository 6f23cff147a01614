"""What is in a merged checkpoint, from its headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_tools.progress import human_bytes
from merge_tools.sources import WeightSet
from merge_tools.tensor_parallel import obstacles
from merge_tools.verify import open_merged
from vllm_qoq.format import INPUT_RATIO, printable, split_layer


def describe(folder: Path) -> dict[str, Any]:
    """Sets, bytes and routing as one JSON object; no tensor is read."""
    checkpoint, section, sets = open_merged(folder)
    report = {weights.name: _set(weights) for weights in sets}
    own = sum(entry["bytes"] for entry in report.values())
    return {
        "checkpoint": str(folder),
        "architectures": checkpoint.config.get("architectures"),
        "sets": report,
        "shared_bytes": checkpoint.total_bytes - own,
        "total_bytes": checkpoint.total_bytes,
        "routing": section.routing.to_json(),
        **({"stream": section.stream.model_dump()} if section.stream is not None else {}),
        "tensor_parallel": _tensor_parallel(checkpoint.config, sets),
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{report['checkpoint']}  {', '.join(report['architectures'] or ['?'])}"]
    for name, entry in report["sets"].items():
        lines.append(
            f"  {name:10} {entry['method']:20} {human_bytes(entry['bytes']):>10}  "
            f"{entry['bits_per_weight']:.2f} bits a weight in {entry['layers']} layers"
            + (_with_base(entry) if "base" in entry else "")
            + (f", {entry['input_ratios']} with input_ratio" if entry["input_ratios"] else "")
        )
    lines.append(f"  {'shared':31} {human_bytes(report['shared_bytes']):>10}")
    lines.append(f"  {'total':31} {human_bytes(report['total_bytes']):>10}")
    if "stream" in report:
        lines.append(f"residual stream: rotated, rotation {report['stream']['rotation']}")
    routing = report["routing"]
    lines += _phases(routing)
    if load := routing.get("load"):
        lines.append(f"busy, from {load['enter']} waiting requests until {load['leave']} are left:")
        lines += (f"  {line}" for line in _phases(load))
    for rule in routing.get("layers", []):
        lines.append(
            f"layers {rule['match']}: { ({k: v for k, v in rule.items() if k != 'match'}) }"
        )
    parallel = report["tensor_parallel"]
    lines.append(f"--tensor-parallel-size: {', '.join(map(str, parallel['sizes']))}")
    for size, reason in list(parallel["refused"].items())[:1]:
        lines.append(f"  not {size}: {printable(reason)}")
    return "\n".join(lines)


def _phases(table: Mapping[str, Any]) -> Iterator[str]:
    """What a routing table, or its `load`, says of each phase that it names."""
    if "prefill" in table:
        yield f"prompts: {table['prefill']}"
    for row in table.get("decode", []):
        bound = f"up to {row['max_batch']} requests" if "max_batch" in row else "any batch"
        yield f"generation, {bound}: {row['set']}"


def _tensor_parallel(config: Mapping[str, Any], sets: list[WeightSet]) -> dict[str, Any]:
    """The sizes that can be served, and the others (as text, for JSON) with the reason."""
    layouts = {w.name: {layer: w.describe(layer) for layer in sorted(w.quantized)} for w in sets}
    found = obstacles(config, layouts)
    return {
        "sizes": [size for size, reason in found.items() if reason is None],
        "refused": {str(size): reason for size, reason in found.items() if reason is not None},
    }


def _with_base(entry: Mapping[str, Any]) -> str:
    return f", {entry['bits_per_weight_with_base']:.2f} with its base {entry['base']}"


def _set(weights: WeightSet) -> dict[str, Any]:
    own = [i for i in weights.tensors.values() if i.name.startswith(f"{weights.name}.")]
    sizes = [weights.size(layer) for layer in sorted(weights.quantized)]
    count = sum(n * k for n, k in sizes)
    size = sum(info.nbytes for info in own)
    bits = 8 * size / count if count else 0.0
    report = {
        "method": weights.config["quant_method"],
        "bytes": size,
        "layers": len(sizes),
        "bits_per_weight": bits,
        "input_ratios": sum(split_layer(i.name)[1] == INPUT_RATIO for i in own),
    }
    if weights.base is None:
        return report
    together = bits + _set(weights.base)["bits_per_weight"]
    return report | {"base": weights.base.name, "bits_per_weight_with_base": together}

"""The command `inspect`: what is in a checkpoint of ours, from its headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_qoq.checkpoint import hub, k_mean
from vllm_qoq.checkpoint.folder import ITEM_BYTES, Checkpoint
from vllm_qoq.checkpoint.format import INPUT_RATIO, KVSection, Section, split_layer
from vllm_qoq.checkpoint.kv_config import UNQUANTIZED, KVCache, described
from vllm_qoq.checkpoint.language import language_part
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.checkpoint.tensor_parallel import obstacles
from vllm_qoq.checkpoint.verify import open_merged
from vllm_qoq.errors import printable
from vllm_qoq.models.config import CONFIG
from vllm_qoq.models.names import experts_of, split_expert
from vllm_qoq.models.tensors import HEAD
from vllm_qoq.progress import human_bytes

_SHOWN = 20
"""How many layer rules the text shows."""


def inspect(folder: str | Path, quiet: bool = True) -> dict[str, Any]:
    """Describe a checkpoint of ours: sets, bytes, routing and KV cache, as one JSON object.

    folder  the checkpoint's folder, or its id on the Hugging Face Hub, which is downloaded first

    Reads headers only. Raises FormatError for a folder that is no checkpoint of ours, and HubError
    for an id that cannot be downloaded.
    """
    checkpoint, section, sets = open_merged(hub.local_folder(folder, quiet=quiet))
    has_sets = isinstance(section, Section)
    stream = section.stream if isinstance(section, Section) else None
    report = {weights.name: _set(weights) for weights in sets if has_sets}
    own = sum(entry["bytes"] for entry in report.values())
    return {
        "checkpoint": str(folder),
        "architectures": checkpoint.config.get("architectures"),
        "sets": report,
        "shared_bytes": checkpoint.total_bytes - own,
        "total_bytes": checkpoint.total_bytes,
        "routing": section.routing.to_json() if isinstance(section, Section) else None,
        "kv_cache": section.kv_cache.to_json() if section.kv_cache is not None else None,
        "k_means": len(k_mean.stored(checkpoint)),
        "lm_head": {"bits": _head_bits(checkpoint, section)},
        **({"stream": stream.model_dump()} if stream is not None else {}),
        **({"experts": experts} if (experts := _experts(sets)) else {}),
        "tensor_parallel": _tensor_parallel(checkpoint.config, sets),
    }


def table(report: dict[str, Any]) -> str:
    """Format a report of `inspect` as text, without what a terminal would obey."""
    return "\n".join(map(printable, _lines(report)))


def _lines(report: dict[str, Any]) -> Iterator[str]:
    names = report["architectures"]
    names = names if isinstance(names, list) and names else ["?"]
    yield f"{report['checkpoint']}  {', '.join(map(str, names))}"
    for name, entry in report["sets"].items():
        yield (
            f"  {name:10} {entry['method']:20} {human_bytes(entry['bytes']):>10}  "
            f"{entry['bits_per_weight']:.2f} bits a weight in {entry['layers']} layers"
            + (_with_base(entry) if "base" in entry else "")
            + (f", {entry['input_ratios']} with input_ratio" if entry["input_ratios"] else "")
        )
    if report["sets"]:
        yield f"  {'shared':31} {human_bytes(report['shared_bytes']):>10}"
    yield f"  {'total':31} {human_bytes(report['total_bytes']):>10}"
    yield from _kv_cache(report["kv_cache"], report["k_means"])
    if "stream" in report:
        yield f"residual stream: rotated, rotation {report['stream']['rotation']}"
    if "experts" in report:
        yield (
            f"experts: {report['experts']['mixtures']} mixtures of "
            f"{report['experts']['experts']}, " + _who_has(report["experts"])
        )
    if (bits := report["lm_head"]["bits"]) is not None:
        yield f"lm_head: {bits} bits"
    routing = report["routing"] or {}
    yield from _phases(routing)
    if load := routing.get("load"):
        yield f"busy, from {load['enter']} waiting requests until {load['leave']} are left:"
        yield from (f"  {line}" for line in _phases(load))
    rules = routing.get("layers", [])
    for rule in rules[:_SHOWN]:
        yield f"layers {rule['match']}: { ({k: v for k, v in rule.items() if k != 'match'}) }"
    yield from _more(rules)
    parallel = report["tensor_parallel"]
    yield f"--tensor-parallel-size: {', '.join(map(str, parallel['sizes'])) or 'none'}"
    for size, reason in list(parallel["refused"].items())[:1]:
        yield f"  not {size}: {reason}"


def _experts(sets: Sequence[StoredSet]) -> dict[str, Any] | None:
    """Count the mixtures of experts and the experts in one of them; None without any."""
    layers = frozenset().union(*(weights.layers for weights in sets))
    places = [place for place in map(split_expert, layers) if place is not None]
    if not places:
        return None
    own = {
        experts
        for weights in sets
        for name, info in weights.tensors.items()
        if info.name.startswith(f"{weights.name}.")
        for experts in experts_of([split_layer(name)[0]])
    }
    return {
        "mixtures": len({place[0] for place in places}),
        "experts": max(place[1] for place in places) + 1,
        "mixtures_per_set": len(own),
    }


def _who_has(experts: Mapping[str, Any]) -> str:
    if not experts["mixtures_per_set"]:
        return "which all sets share"
    if experts["mixtures_per_set"] == experts["mixtures"]:
        return "which each set has for itself"
    return f"of which each set has {experts['mixtures_per_set']} for itself"


def _kv_cache(raw: Mapping[str, Any] | None, means: int) -> Iterator[str]:
    cache = KVCache.model_validate(raw) if raw is not None else KVCache(bits=UNQUANTIZED)
    is_quantized = cache.is_quantized()
    rotated = ", keys rotated" if cache.hadamard and is_quantized else ""
    centred = ", keys without their mean" if cache.k_mean and is_quantized else ""
    asked = ", none is asked for" if raw is None else ""
    yield f"KV cache: {described(cache.bits)}{rotated}{centred}{asked}"
    for rule in cache.layers[:_SHOWN]:
        yield f"  layers {rule.match}: {described(rule.bits)}"
    yield from _more(cache.layers)
    if means and not cache.k_mean:
        yield (
            f"  {means} means of K are in the files and not announced in {CONFIG}, so no server "
            "takes the checkpoint; `vllm-qoq verify` says what to do"
        )
    elif means and not is_quantized:
        yield (
            f"  {means} means of K are in the files; 16 bits need none, and a server that is told "
            "kv_bits 4, k8v4 or 8 uses them"
        )
    elif cache.k_mean and not means:
        yield (
            f"  {CONFIG} announces means of K and the files have none; `vllm-qoq verify` says what "
            "to do"
        )


def _more(rules: Sequence[object]) -> Iterator[str]:
    if len(rules) > _SHOWN:
        yield f"  and {len(rules) - _SHOWN} more rules"


def _head_bits(checkpoint: Checkpoint, section: Section | KVSection) -> int | None:
    """Bits of a weight of the lm_head, None where the embedding is the lm_head."""
    if isinstance(section, Section) and section.lm_head is not None:
        return section.lm_head.bits
    info = language_part(checkpoint).tensors.get(HEAD)
    return 8 * ITEM_BYTES[info.dtype] if info is not None else None


def _phases(table: Mapping[str, Any]) -> Iterator[str]:
    """Describe a routing table, or its `load`, a line for each phase and row."""
    if "prefill" in table:
        yield f"prompts: {table['prefill']}"
    for row in table.get("decode", []):
        bound = f"up to {row['max_batch']} requests" if "max_batch" in row else "any batch"
        yield f"generation, {bound}: {row['set']}"


def _tensor_parallel(config: Mapping[str, Any], sets: list[StoredSet]) -> dict[str, Any]:
    """List the sizes that can be served, and the others (as text, for JSON) with the reason."""
    layouts = {w.name: {layer: w.describe(layer) for layer in sorted(w.quantized)} for w in sets}
    found = obstacles(config, layouts)
    return {
        "sizes": [size for size, reason in found.items() if reason is None],
        "refused": {str(size): reason for size, reason in found.items() if reason is not None},
    }


def _with_base(entry: Mapping[str, Any]) -> str:
    return f", {entry['bits_per_weight_with_base']:.2f} with its base {entry['base']}"


def _set(weights: StoredSet) -> dict[str, Any]:
    prefix = f"{weights.name}."
    own = {name: i for name, i in weights.tensors.items() if i.name.startswith(prefix)}
    sizes = [weights.size(layer) for layer in sorted({split_layer(name)[0] for name in own})]
    count = sum(n * k for n, k in sizes)
    size = sum(info.nbytes for info in own.values())
    bits = 8 * size / count if count else 0.0
    report = {
        "method": weights.config["quant_method"],
        "bytes": size,
        "layers": len(sizes),
        "bits_per_weight": bits,
        "input_ratios": sum(split_layer(name)[1] == INPUT_RATIO for name in own),
    }
    if weights.base is None:
        return report
    together = bits + _set(weights.base)["bits_per_weight"]
    return report | {"base": weights.base.name, "bits_per_weight_with_base": together}

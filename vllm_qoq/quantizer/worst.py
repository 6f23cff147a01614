"""The decoder layers in which generation loses most, and the routing that keeps them accurate."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_qoq.quantizer.report import LayerError
from vllm_qoq.routing.sensitive import losses, rule
from vllm_qoq.routing.table import DecodeRow, Routing

_SHARE = 10  # one of so many decoder layers is proposed


def worst_layers(errors: Iterable[LayerError], sets: tuple[str, ...]) -> dict[str, Any]:
    """Rank the decoder layers, for quantization_report.json.

    sets  the checkpoint's, of which the last one generates

    `decoder_layers` has the mean squared output error of each in the last set, the largest first,
    beyond that of the most accurate set where there are several. `routing` is the table that keeps
    a tenth of them in that set; there is none where the last set is the most accurate.
    """
    rows = [(row["layer"], row["set"], row["output_error"]) for row in errors]
    squares = {name: sum(e**2 for _, owner, e in rows if owner == name) for name in sets}
    best, last = min(sets, key=squares.__getitem__), sets[-1]
    ranked = losses(rows, last, best if best != last else None)
    found: dict[str, Any] = {
        "decoder_layers": [{"layer": block, "lost": lost} for block, lost in ranked.items()]
    }
    if best != last and ranked:
        kept = list(ranked)[: -(-len(ranked) // _SHARE)]
        routing = Routing(
            prefill=sets[0],
            decode=(DecodeRow(set_name=last),),
            layers=tuple(rule(block, best) for block in kept),
        )
        found["routing"] = routing.to_json()
    return found


def advice(report: dict[str, Any], out: Path) -> str:
    """Say what to do with `worst_layers` of the report of a checkpoint `out`; "" without a way."""
    if "routing" not in report:
        return ""
    layers, routing = report["decoder_layers"], report["routing"]
    count = len(routing["layers"])
    total = sum(max(row["lost"], 0.0) for row in layers)
    share = sum(max(row["lost"], 0.0) for row in layers[:count]) / total if total else 0.0
    named = ", ".join(row["layer"] for row in layers[:count])
    best, last = (one["decode"][-1]["set"] for one in (routing["layers"][0], routing))
    option = json.dumps({"qoq": {"routing": routing}})
    return (
        f"{last} loses most in {named}: {share:.0%} of its squared error in {count} of "
        f"{len(layers)} decoder layers; to generate there in {best}, give vllm serve\n"
        f"  --additional-config {shlex.quote(option)}\n"
        "or, on the GPU that will serve, write it into the checkpoint: "
        f"vllm-qoq tune {shlex.quote(str(out))} --keep-sensitive {count}"
    )

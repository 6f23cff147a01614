"""What a quantization reports: the error of every layer in every set, time and memory."""

from __future__ import annotations

import resource
from typing import Any, TypedDict


class LayerError(TypedDict):
    """One row of the report.

    output_error  |W x - W' x| / |W x| over the calibration inputs
    """

    layer: str
    set: str
    output_error: float
    seconds: float


def summary(errors: list[LayerError], seconds: float) -> dict[str, Any]:
    """The content of quantization_report.json, without what `job` knows."""
    import torch

    peak_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "seconds": round(seconds, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_gpu_memory_bytes": peak_gpu,
        "layers": errors,
    }


def table(errors: list[LayerError]) -> str:
    """Mean and worst output error by kind of layer and set, as plain text."""
    sets = list(dict.fromkeys(row["set"] for row in errors))
    kinds = list(dict.fromkeys(row["layer"].rpartition(".")[2] for row in errors))
    lines = ["output error, mean (worst)".ljust(28) + "".join(name.rjust(18) for name in sets)]
    for kind in kinds:
        cells = []
        for name in sets:
            mine = [
                row["output_error"]
                for row in errors
                if row["set"] == name and row["layer"].endswith("." + kind)
            ]
            cells.append(f"{sum(mine) / len(mine):.4f} ({max(mine):.4f})".rjust(18))
        lines.append(f"  {kind}".ljust(28) + "".join(cells))
    return "\n".join(lines)

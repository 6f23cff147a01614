"""Checkpoints in the format of another tool, beside which vLLM takes no KV cache of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_qoq.bench import BenchError
from vllm_qoq.checkpoint.format import QUANT_METHOD, SECTION
from vllm_qoq.errors import shown

# What older compressed-tensors called the section, and vLLM still reads.
_OLDER_SECTION = "compression_config"


def refuse_cache(folder: Path, config: dict[str, Any], asked: str, remedy: str) -> None:
    """Raise BenchError if `config`, that of the model in `folder`, has another tool's section.

    asked   what was asked for of the KV cache
    remedy  what to give instead
    """
    section = config.get(SECTION, config.get(_OLDER_SECTION))
    method = section.get("quant_method") if isinstance(section, dict) else None
    if section is None or method == QUANT_METHOD:
        return
    raise BenchError(
        f"{folder}: quant_method {shown(method)} is that of another tool, with which vLLM takes no "
        f"KV cache of ours ({asked}); {remedy}, or make a checkpoint of ours of it, "
        f"`vllm-qoq merge NAME={folder} -o MERGED`, and give MERGED"
    )

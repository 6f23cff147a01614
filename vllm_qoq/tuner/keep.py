"""Layer rules that keep decoder layers in the most accurate set, whatever the others use."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from vllm_qoq.checkpoint.folder import Checkpoint, read_json
from vllm_qoq.checkpoint.format import Section, split_layer, split_name
from vllm_qoq.errors import one_line
from vllm_qoq.routing.sensitive import block_of, losses, rule
from vllm_qoq.routing.table import LayerRule
from vllm_qoq.tuner import TuneError

REPORT = "quantization_report.json"
_REPORT_BYTES = 64 << 20


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore")

    layer: str
    set: str
    output_error: FiniteFloat


class _Report(BaseModel):
    model_config = ConfigDict(extra="ignore")

    layers: list[_Row]


def first(folder: Path, section: Section, count: int) -> list[str]:
    """Name the first `count` decoder layers of a checkpoint; TuneError if it has fewer."""
    layers = (
        split_layer(name)[0]
        for set_name, name in (
            split_name(tensor, section.sets) for tensor in Checkpoint.open(folder).tensors
        )
        if set_name is not None
    )
    return _counted(f"--keep-first {count}", sorted(_blocks(layers), key=_by_number), count)


def sensitive(folder: Path, order: tuple[str, ...], count: int) -> list[str]:
    """Name the `count` decoder layers that lose most in the least accurate set.

    What a layer loses is the mean over its linear layers of the squared output error that
    `vllm-qoq quantize` reported, less that of the most accurate set. Raises TuneError where there
    is no report.
    """
    option = f"--keep-sensitive {count}"
    if not (folder / REPORT).exists():
        raise TuneError(
            f"{option}: {folder} has no {REPORT}, which `vllm-qoq quantize` writes; use "
            "--keep-first"
        )
    try:
        report = _Report.model_validate(read_json(folder / REPORT, _REPORT_BYTES))
    except ValidationError as error:
        raise TuneError(f"{option}: {one_line(error, str(folder / REPORT))}") from None
    errors = ((row.layer, row.set, row.output_error) for row in report.layers)
    lost = losses(errors, order[-1], order[0])
    if not lost:
        raise TuneError(f"{option}: {folder / REPORT} has no errors of {order[-1]} or {order[0]}")
    return sorted(_counted(option, list(lost), count), key=_by_number)


def rules(blocks: Iterable[str], set_name: str, others: Iterable[LayerRule]) -> list[LayerRule]:
    """Make rules by which the decoder layers `blocks` generate in `set_name`, before `others`."""
    kept = [rule(block, set_name) for block in blocks]
    matches = {one.match for one in kept}
    return kept + [other for other in others if other.match not in matches]


def _blocks(layers: Iterable[str]) -> set[str]:
    return {block for layer in layers if (block := block_of(layer)) is not None}


def _by_number(block: str) -> tuple[str, int]:
    stem, _, number = block.rpartition(".")
    return stem, int(number)


def _counted(option: str, blocks: list[str], count: int) -> list[str]:
    if count > len(blocks):
        raise TuneError(f"{option}: the model has {len(blocks)} quantized decoder layers")
    return blocks[:count]

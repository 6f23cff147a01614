"""The memory of measurements of this and other machines: `qoq_tune.json` in the checkpoint.

Nobody vouches for the file. It is read whole or not at all, and where it is not as it should be,
everything is measured again.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_qoq.checkpoint.folder import read_json
from vllm_qoq.checkpoint.writer import replace_file
from vllm_qoq.errors import FormatError, one_line
from vllm_qoq.tuner.measurements import PREFILL_TOKENS, Key, Measurements, StepCheck, decode_batches

FILE = "qoq_tune.json"

_BYTES = 4 << 20
# So many machines are remembered; then the oldest is dropped.
_RUNS = 16


class MeasuredRun(BaseModel):
    """The measurements of one device, and the last check of a routing there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measured: Measurements
    check: StepCheck | None = None

    @model_validator(mode="after")
    def _same_sets(self) -> MeasuredRun:
        checked = self.check.step_seconds.values() if self.check is not None else ()
        if any(set(row) != set(self.measured.sets) for row in checked):
            raise ValueError("the check is of other sets")
        return self


class Memory(BaseModel):
    """The content of the file, whose last run is the newest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    runs: tuple[MeasuredRun, ...] = Field(default=(), max_length=_RUNS)

    def with_run(self, run: MeasuredRun) -> Memory:
        """Copy it with `run` at the end, and without an older one of the same key."""
        others = [old for old in self.runs if old.measured.key != run.measured.key]
        return self.model_copy(update={"runs": (*others, run)[-_RUNS:]})


def load(folder: Path) -> tuple[Memory, str | None]:
    """Read what earlier runs measured; empty, with the reason, where the file cannot be used."""
    path = folder / FILE
    if not path.exists():
        return Memory(), None
    try:
        return Memory.model_validate(read_json(path, _BYTES)), None
    except ValidationError as error:
        reason = one_line(error, FILE)
    except (FormatError, OSError) as error:
        reason = str(error)
    return Memory(), f"{FILE} is of no use, measuring again: {reason}"


def recall(
    memory: Memory, key: Key, sets: Collection[str], max_batch: int
) -> tuple[MeasuredRun | None, str | None]:
    """Find the run of this device with `sets` up to `max_batch`, or say why none is of use."""
    run = next((run for run in memory.runs if run.measured.key == key), None)
    if run is None:
        return None, _difference(memory, key)
    measured = run.measured
    if set(measured.sets) != set(sets):
        return None, f"{FILE} has other sets than the checkpoint; measuring again"
    wanted = decode_batches(max_batch)
    if not set(wanted) <= set(measured.decode) or measured.prefill != PREFILL_TOKENS:
        return None, (
            f"{FILE} has batches up to {measured.decode[-1]} of this device, but "
            f"{max_batch} is asked for; measuring again"
        )
    return run.model_copy(update={"measured": measured.at(wanted)}), None


def save(folder: Path, memory: Memory) -> None:
    """Write the memory into the file; readers see the old or the new one."""
    content = json.dumps(memory.model_dump(mode="json"), indent=1) + "\n"
    replace_file(folder / FILE, content.encode())


def _difference(memory: Memory, key: Key) -> str | None:
    """Say how the newest run of the same device differs; None if there is none."""
    same_device = [r.measured.key for r in memory.runs if r.measured.key.device == key.device]
    if not same_device:
        return None
    old = same_device[-1]
    fields = {
        "vllm_qoq": "vllm-qoq",
        "vllm": "vLLM",
        "tensor_parallel_size": "tensor-parallel size",
    }
    changed = [
        f"{text} {getattr(old, name)} instead of {getattr(key, name)}"
        for name, text in fields.items()
        if getattr(old, name) != getattr(key, name)
    ]
    reason = ", ".join(changed) or "another config.json"
    return f"{FILE} was measured on this device with {reason}; measuring again"

"""Carry out a plan: stream the tensors into a hidden folder, verify it, rename it.

The output is absent or complete. A folder that a killed process left behind is
removed by the next merge into the same place. Inputs are only read.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merge_tools import MergeError, card, compatible, nest, verify
from merge_tools.norms import ratio
from merge_tools.plan import Plan, Planned
from merge_tools.progress import Progress
from merge_tools.sources import WeightSet
from merge_tools.survey import torch_dtype
from merge_tools.writer import copy_file, sync_folder, write_bytes, write_json, write_shard
from vllm_qoq.checkpoint import CONFIG, INDEX, TensorInfo
from vllm_qoq.format import Section

_PIECE_BYTES = 16 << 20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
_README, _RECIPE = "README.md", "recipe.yaml"


def execute(
    plan: Plan,
    sources: Mapping[str, WeightSet],
    section: Section,
    out: Path,
    overwrite: bool,
    progress: Progress,
    model_card: bool = True,
    notes: Sequence[str] = (),
) -> None:
    """Write the checkpoint `out`; `notes` go into its model card.

    MergeError, FormatError or OSError leave nothing behind.
    """
    with replacing(out, overwrite) as folder:
        with progress.stage("write", plan.total_bytes) as advance:
            for file, shard in plan.shards.items():
                _write(folder / file, shard, sources, plan, advance)
        config = compatible.merged_config(sources[plan.prefill], section, plan.dtype)
        write_json(folder / INDEX, plan.index())
        write_json(folder / CONFIG, config)
        _copy_other_files(folder, sources, plan.prefill)
        if model_card:
            sizes = {owner: plan.bytes_of(owner) for owner in (None, *plan.sets)}
            inputs = [source.checkpoint.path for source in sources.values()]
            text = card.text(out.name, section, sizes, inputs, notes)
            write_bytes(folder / _README, text.encode())
        sync_folder(folder)
        if findings := verify.structure(folder):
            raise MergeError(f"the written checkpoint is not sound: {findings[0]}")


def _write(
    path: Path,
    shard: Sequence[Planned],
    sources: Mapping[str, WeightSet],
    plan: Plan,
    advance: Any,
) -> None:
    planned = {p.info.name: p for p in shard}

    def read(info: TensorInfo) -> Iterator[memoryview]:
        flat = _tensor(planned[info.name], sources, plan).contiguous().reshape(-1)
        data = memoryview(flat.view(_uint8()).numpy())
        for start in range(0, len(data), _PIECE_BYTES):
            yield data[start : start + _PIECE_BYTES]
        advance(info.nbytes)

    write_shard(path, [p.info for p in shard], read)


def _tensor(planned: Planned, sources: Mapping[str, WeightSet], plan: Plan) -> Any:
    origin = planned.origin
    source = sources[origin.set_name]
    if origin.how == "ratio":
        return ratio(source, sources[plan.prefill], origin.tensor)
    if origin.how == "nest":
        return nest.residual(source, sources[plan.bases[origin.set_name]], origin.tensor)
    tensor = source.get(origin.tensor)
    return tensor.to(torch_dtype(planned.info.dtype)) if origin.how == "cast" else tensor


def _uint8() -> Any:
    import torch

    return torch.uint8


def _copy_other_files(folder: Path, sources: Mapping[str, WeightSet], prefill: str) -> None:
    """Tokenizer, generation config, licence, remote code: all but weights, once."""
    for item in sorted(sources[prefill].checkpoint.path.iterdir()):
        is_ours = item.name in (CONFIG, _README, _RECIPE) or item.name.startswith(".")
        if item.is_file() and not is_ours and not item.name.endswith(_WEIGHTS):
            copy_file(item, folder / item.name)
    for name, source in sources.items():
        recipe = source.checkpoint.path / _RECIPE
        if recipe.is_file():
            copy_file(recipe, folder / f"recipe-{name}.yaml")


@contextmanager
def replacing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden sibling of `out` to write into, which becomes `out` at the end."""
    out = out.resolve()
    _remove_leftovers(out)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    old = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    with _terminable():
        try:
            partial.mkdir()
            yield partial
            if out.exists():
                if not overwrite:
                    raise MergeError(f"{out}: appeared in the meantime; choose another folder")
                out.rename(old)
            try:
                partial.rename(out)
            except OSError:
                if old.exists():
                    old.rename(out)
                raise
            sync_folder(out.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Clear what a killed merge left, and bring an output back that it had moved aside."""
    for kind in ("partial", "replaced"):
        for left in out.parent.glob(f".{out.name}.{kind}-*"):
            process = left.name.rpartition("-")[2]
            if not process.isdecimal() or _is_alive(int(process)):
                continue
            if kind == "replaced" and not out.exists():
                left.rename(out)
            else:
                shutil.rmtree(left)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM clean up like Ctrl-C."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""Write an imported set as a checkpoint: the steps of `merge_tools.execute`, with a note more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from merge_tools import MergeError, card, verify
from merge_tools.execute import _copy_other_files, _write, replacing
from merge_tools.plan import Plan
from merge_tools.progress import Progress
from merge_tools.writer import sync_folder, write_bytes, write_json
from vllm_qoq.checkpoint import CONFIG, INDEX
from vllm_qoq.format import SECTION, Section
from vllm_qoq.importer.imported import ImportedSet


def write(
    plan: Plan,
    imported: ImportedSet,
    section: Section,
    out: Path,
    overwrite: bool,
    progress: Progress,
    notes: Sequence[str],
) -> None:
    """Write the checkpoint `out`; `notes` go into its model card. Errors leave nothing behind."""
    sources = {imported.name: imported}
    with replacing(out, overwrite) as folder:
        with progress.stage("import", plan.total_bytes) as advance:
            for file, shard in plan.shards.items():
                _write(folder / file, shard, sources, plan.prefill, advance)
        write_json(folder / INDEX, plan.index())
        write_json(folder / CONFIG, {**imported.checkpoint.config, SECTION: section.to_json()})
        _copy_other_files(folder, sources, plan.prefill)
        text = card.text(plan, sources, section, out.name)
        lines = ["Imported:", "", *(f"- {note}" for note in notes), ""] if notes else []
        write_bytes(folder / "README.md", "\n".join([text, *lines]).encode())
        sync_folder(folder)
        if findings := verify.structure(folder):
            raise MergeError(f"the imported checkpoint is not sound: {findings[0]}")

"""Checks of an import that need no torch, which takes seconds to import."""

from __future__ import annotations

from pathlib import Path

from vllm_qoq.checkpoint.folder import Checkpoint, read_config, require_folder, side_files
from vllm_qoq.checkpoint.output import check_output
from vllm_qoq.models.linears import linear_layers


def check_inputs(source: Path, base: Path, out: Path, overwrite: bool) -> None:
    """Raise UserError for folders, an output or a model with which an import cannot be done."""
    require_folder(source)
    config = read_config(base)
    check_output(out, (source, base), overwrite)
    linear_layers(config, "imported")
    Checkpoint(base, config, {}).check_links()
    side_files(base)  # raises FormatError for a link that cannot be copied at the end

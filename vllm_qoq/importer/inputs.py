"""Checks of an import that need no torch, which takes seconds to import."""

from __future__ import annotations

from pathlib import Path

from vllm_qoq.checkpoint import hub
from vllm_qoq.checkpoint.folder import Checkpoint, read_config, require_folder, side_files
from vllm_qoq.checkpoint.output import check_output
from vllm_qoq.models.linears import linear_layers

IMPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""The architectures of which sources are known."""


def local_inputs(
    source: str | Path, base: str | Path, out: Path, *, overwrite: bool, quiet: bool
) -> tuple[Path, Path]:
    """Find the folders of an import's source and base, which may be ids of the Hugging Face Hub.

    Raises UserError for folders, an output or a model with which an import cannot be done. The
    base, of which no weights are needed, comes first, and is checked before the source is loaded.
    """
    if hub.is_to_download(source) or hub.is_to_download(base):
        # Before minutes of downloads; what is an id overlaps no output.
        here = [Path(one) for one in (source, base) if not hub.is_to_download(one)]
        check_output(out, here, overwrite)
    if not hub.is_to_download(source):
        source = hub.local_folder(source)
        require_folder(source)
    base = hub.local_folder(base, has_weights=False, quiet=quiet)
    _check_base(base)
    source = hub.local_folder(source, quiet=quiet)
    check_output(out, (source, base), overwrite)
    return source, base


def _check_base(base: Path) -> None:
    config = read_config(base)
    linear_layers(config, "imported", IMPORTED)
    Checkpoint(base, config, {}).check_links()
    side_files(base)  # raises FormatError for a link that cannot be copied at the end

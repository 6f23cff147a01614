"""The checkpoint of an engine as files here, for checks before there is one."""

from __future__ import annotations

from pathlib import Path

from vllm.config import VllmConfig

from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.errors import FormatError
from vllm_qoq.serving.methods.weight_set import UNTRACKED_LOADERS


def local_checkpoint(vllm_config: VllmConfig) -> Checkpoint | None:
    """Open the headers of the checkpoint that vLLM will load.

    None for a model of the Hub, which may not be here yet, for a loader that does not read these
    files, and for files that cannot be read: vLLM may load them in other ways, or says why not.
    """
    folder = Path(vllm_config.model_config.model)
    if not folder.is_dir() or vllm_config.load_config.load_format in UNTRACKED_LOADERS:
        return None
    try:
        return Checkpoint.open(folder)
    except FormatError:
        return None

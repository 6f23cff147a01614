"""The mark of a LoRA adapter that `convert-lora` brought into the basis of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_qoq.checkpoint.folder import read_json
from vllm_qoq.errors import FormatError, shown

CONFIG = "adapter_config.json"
KEY = "vllm_qoq"
"""The key of the config under which the mark is."""

CONFIG_BYTES = 1 << 20
"""The bytes that a config has at most."""


@dataclass(frozen=True)
class Mark:
    """What a converted adapter says of itself.

    converted_for  the name of the checkpoint's folder
    basis          the `transforms.digest` of the checkpoint
    """

    converted_for: str
    basis: str

    def to_json(self) -> dict[str, str]:
        """Make what `adapter_config.json` has under `KEY`."""
        return asdict(self)


def of_config(config: Mapping[str, Any]) -> Mark | None:
    """Find the mark in the config of an adapter; None in that of one that was not converted.

    Raises FormatError for a mark that `convert-lora` did not write.
    """
    if KEY not in config:
        return None
    found = config[KEY]
    fields = [found.get(key) if isinstance(found, dict) else None for key in Mark.__annotations__]
    name, basis = fields
    if not isinstance(name, str) or not isinstance(basis, str):
        raise FormatError(f"{CONFIG}: {KEY}: {shown(found)} is not what convert-lora writes there")
    return Mark(name, basis)


def of_folder(folder: Path) -> Mark | None:
    """Read the mark of the adapter in a folder; FormatError for a config that cannot be read."""
    return of_config(read_json(folder / CONFIG, CONFIG_BYTES))

"""The checkpoint that is tuned: checks before work begins, and writing of its routing."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_qoq.checkpoint.folder import read_config
from vllm_qoq.checkpoint.format import QUANT_METHOD, SECTION, Section
from vllm_qoq.checkpoint.inspect import inspect
from vllm_qoq.checkpoint.tensor_parallel import SIZES
from vllm_qoq.checkpoint.writer import replace_file
from vllm_qoq.errors import FormatError
from vllm_qoq.models.config import CONFIG
from vllm_qoq.routing.table import Routing
from vllm_qoq.tuner import TuneError, keep
from vllm_qoq.tuner.accuracy import accuracy_order


@dataclass(frozen=True)
class Target:
    """A checkpoint with several sets to choose from.

    order   the sets, the most accurate first
    digest  digest of config.json without the routing
    """

    folder: Path
    section: Section
    order: tuple[str, ...]
    digest: str

    @property
    def methods(self) -> dict[str, str]:
        """The quant_method of each set."""
        return {name: config["quant_method"] for name, config in self.section.sets.items()}

    @classmethod
    def open(cls, folder: Path, will_write: bool) -> Target:
        """Read config.json; TuneError or FormatError for a checkpoint that cannot be tuned."""
        config, section = _read(folder)
        if len(section.sets) == 1:
            raise TuneError(
                f"{folder}: has one set, {next(iter(section.sets))!r}, so there is nothing to "
                "choose from; `vllm-qoq merge` makes a checkpoint of several"
            )
        order = accuracy_order(section.sets)
        if will_write and not os.access(folder, os.W_OK):
            raise TuneError(
                f"{folder}: not writable; copy the checkpoint, or add --dry-run to measure only"
            )
        return cls(folder, section, order, _digest(config))

    def check_split(self, tensor_parallel_size: int) -> None:
        """Raise TuneError for a number of ranks that the layers cannot be split over."""
        if tensor_parallel_size == 1:
            return
        option = f"--tensor-parallel-size {tensor_parallel_size}"
        found = inspect(self.folder)["tensor_parallel"]
        sizes = ", ".join(map(str, found["sizes"]))
        if tensor_parallel_size not in SIZES:
            raise TuneError(f"{option}: is not one of {', '.join(map(str, SIZES))}")
        if reason := found["refused"].get(str(tensor_parallel_size)):
            raise TuneError(f"{option}: {reason}; {self.folder} can be served with {sizes}")

    def layers_to_keep(self, first: int, sensitive: int) -> tuple[str, ...]:
        """The decoder layers that `--keep-first` and `--keep-sensitive` name, each once."""
        blocks = keep.first(self.folder, self.section, first) if first else []
        if sensitive:
            blocks += keep.sensitive(self.folder, self.order, sensitive)
        return tuple(dict.fromkeys(blocks))

    def write(self, routing: Routing) -> None:
        """Put `routing` into config.json and leave everything else in it as it is."""
        config, section = _read(self.folder)
        if section.sets.keys() != self.section.sets.keys():
            raise TuneError(f"{self.folder / CONFIG}: its sets changed in the meantime; tune again")
        config[SECTION]["routing"] = routing.to_json()
        # Characters are escaped: the file may hold half a surrogate pair, which UTF-8 cannot.
        replace_file(self.folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _read(folder: Path) -> tuple[dict[str, Any], Section]:
    config = read_config(folder)
    section = config.get(SECTION)
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        raise TuneError(
            f"{folder}: not a vllm-qoq checkpoint ({CONFIG} has no {SECTION} of method "
            f"{QUANT_METHOD!r}); make one with `vllm-qoq quantize` or `vllm-qoq merge`"
        )
    if "sets" not in section and "kv_cache" in section:
        raise TuneError(
            f"{folder}: only its KV cache is quantized, so there are no sets to choose from; "
            "`vllm-qoq quantize` makes some"
        )
    try:
        return config, Section.parse(section)
    except FormatError as error:
        raise FormatError(f"{folder / CONFIG}: {error}") from None


def _digest(config: dict[str, Any]) -> str:
    section = {key: value for key, value in config[SECTION].items() if key != "routing"}
    text = json.dumps({**config, SECTION: section}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

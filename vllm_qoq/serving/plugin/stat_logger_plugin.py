"""The entry point of our stat logger, which vLLM finds in front ends of our models alone.

vLLM takes stat loggers from the entry points `vllm.stat_logger_plugins`. As soon as it finds one
it counts statistics, for every model and whatever `--disable-log-stats` says, so an entry point of
the installed package would change the servers of other people's models. This one is in the memory
of a process, through a finder of importlib.metadata, from `offer` until vLLM has loaded it for the
engine that it was offered for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder, EntryPoint
from os import PathLike
from pathlib import Path
from typing import Any

from vllm_qoq.version import __version__

_NAME = "vllm-qoq-stat-logger"
_GROUP = "vllm.stat_logger_plugins"
_METADATA = f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {__version__}\n"


def offer() -> None:
    """Show the entry point to whoever looks for one in this process from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def withdraw() -> None:
    """Hide the entry point again."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]


class _EntryPoint(EntryPoint):
    def load(self) -> Any:
        """Load the class and hide the entry point: the next engine may have another model."""
        withdraw()
        return super().load()


class _InMemory(Distribution):
    """A distribution that has an entry point and no files."""

    @property
    def entry_points(self) -> Any:
        return (_EntryPoint("qoq", "vllm_qoq.serving.plugin.metrics:RoutingStatLogger", _GROUP),)

    def read_text(self, filename: str) -> str | None:
        return _METADATA if filename == "METADATA" else None

    def locate_file(self, path: str | PathLike[str]) -> Path:
        return Path(__file__).parent / path


class _Finder(DistributionFinder):
    def find_spec(self, *args: object) -> None:
        """Find no module, because there are none here."""

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterable[Distribution]:
        return (_InMemory(),) if context is None or context.name in (None, _NAME) else ()

"""What llmcompressor prints of its own, without what this command says better."""

from __future__ import annotations

import os
import sys
from typing import Any

_FORMAT = "{level}: {message} ({name})"


def hide_bars() -> None:
    """No bars of libraries, also on a terminal: they would tear our lines.

    Call before tqdm is imported, which reads this once. A user may set it to 0.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")


def show_warnings() -> None:
    """Print warnings and errors of llmcompressor on stderr, each once."""
    from llmcompressor import LoggerConfig, configure_logger
    from loguru import logger

    if "LLM_COMPRESSOR_LOG_LEVEL" in os.environ:
        configure_logger()  # the user's choice
        return
    configure_logger(LoggerConfig(console_log_level=None))
    logger.add(sys.stderr, level="WARNING", format=_FORMAT, filter=_Once())


class _Once:
    """Lets a message pass once, and never that there is no GPU, which `job` says itself."""

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def __call__(self, record: Any) -> bool:
        message = record["message"]
        is_new = message not in self._shown
        self._shown.add(message)
        return is_new and not message.startswith("No accelerator available")

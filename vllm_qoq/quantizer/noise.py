"""Silencing of what llmcompressor and torch print and this command says better."""

from __future__ import annotations

import logging
import os
import sys
from functools import partialmethod
from typing import TYPE_CHECKING, Any

from vllm_qoq.quantizer import QuantizeError

if TYPE_CHECKING:
    from loguru import Record

_FORMAT = "{level}: {message} ({name})"
_LEVEL = "LLM_COMPRESSOR_LOG_LEVEL"


def hide_bars(owns_process: bool = False) -> None:
    """Hide the progress bars of libraries, which would tear our lines, also on a terminal.

    This must be called before tqdm is imported, which reads its variable once, or by a command that
    `owns_process`: a download shows the bars of tqdm, and none may come after it. A variable that
    the user has set stays.
    """
    is_chosen = "TQDM_DISABLE" in os.environ
    os.environ.setdefault("TQDM_DISABLE", "1")
    if owns_process and not is_chosen and (imported := sys.modules.get("tqdm.std")) is not None:
        bar: Any = imported.tqdm  # which does to itself what this does, for its variable
        bar.__init__ = partialmethod(bar.__init__, disable=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # Else llmcompressor does, and warns.


def import_llmcompressor() -> None:
    """Import llmcompressor, and from then on print its warnings and errors on stderr, each once.

    Raises QuantizeError if it is not installed.
    """
    is_chosen = _LEVEL in os.environ
    # llmcompressor reads this variable first, and logs while it is imported.
    os.environ.setdefault(_LEVEL, "ERROR")
    try:
        from llmcompressor import LoggerConfig, configure_logger
    except ImportError as error:
        raise QuantizeError(f"{error}; install it: pip install 'vllm-qoq[quantize]'") from None
    finally:
        if not is_chosen:
            del os.environ[_LEVEL]
    if not is_chosen:
        from loguru import logger

        configure_logger(LoggerConfig(console_log_level=None))
        logger.add(sys.stderr, level="WARNING", format=_FORMAT, filter=_Once())
    # torch warns of a name that llmcompressor uses.
    logging.getLogger("torch.fx._symbolic_trace").addFilter(
        lambda record: "is_fx_tracing" not in record.getMessage()
    )


class _Once:
    """A filter that lets a message pass once, and never that there is no GPU, which `job` says."""

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def __call__(self, record: Record) -> bool:
        message = record["message"]
        is_new = message not in self._shown
        self._shown.add(message)
        return is_new and not message.startswith("No accelerator available")

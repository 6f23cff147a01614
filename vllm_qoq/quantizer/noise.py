"""What llmcompressor and torch print of their own, without what this command says better."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from vllm_qoq.quantizer import QuantizeError

_FORMAT = "{level}: {message} ({name})"
_LEVEL = "LLM_COMPRESSOR_LOG_LEVEL"


def hide_bars() -> None:
    """No bars of libraries, also on a terminal: they would tear our lines.

    Call before tqdm is imported, which reads this once. A user may set both.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or llmcompressor does, and warns


def import_llmcompressor() -> None:
    """Import it, and from then on print its warnings and errors on stderr, each once.

    QuantizeError if it is not installed.
    """
    is_chosen = _LEVEL in os.environ
    # It logs while it is imported, and reads this first.
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
    """Lets a message pass once, and never that there is no GPU, which `job` says itself."""

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def __call__(self, record: Any) -> bool:
        message = record["message"]
        is_new = message not in self._shown
        self._shown.add(message)
        return is_new and not message.startswith("No accelerator available")

"""vllm-qoq: one checkpoint, several precisions; every vLLM step runs in the one that suits it.

Importing this package touches neither torch nor vLLM. vLLM calls `register`
through the entry point `vllm.general_plugins` in every process that it starts.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM

__version__ = "0.1.0"

_is_registered = False


def register() -> None:
    """Make vLLM know the quantization method `qoq` and the `FlexQuant*` models.

    Idempotent and cheap: nothing of what serves a model is imported before one asks for it
    (`integration.register`). Raises nothing, because vLLM would stop, whatever model it serves:
    where this vLLM lacks what registering needs, one line in its log says so.
    """
    global _is_registered
    if _is_registered:
        return
    _is_registered = True
    try:
        from vllm_qoq.integration.register import register_with_vllm

        register_with_vllm()
    except Exception as error:
        from vllm_qoq.environment import vllm_obstacle

        # Under vLLM's logger, so that its settings apply.
        logging.getLogger("vllm.vllm_qoq").error(
            "%s. Other models are served as without vllm-qoq", vllm_obstacle(error)
        )


def step_counts(llm: LLM) -> dict[tuple[str, str], int]:
    """How many steps `llm` has run, by phase and set: `{("decode", "w4a16"): 12, ...}`.

    Counts every forward pass with real requests since the model was loaded, and,
    under CUDA graphs, the few that vLLM runs to capture them; take differences.
    Raises ValueError when the model was not loaded with the method `qoq`.
    """
    from vllm_qoq.integration.counters import read_step_counts

    return read_step_counts(llm.llm_engine.vllm_config)

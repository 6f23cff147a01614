"""vllm-qoq: one checkpoint, several precisions; every vLLM step runs in the one that suits it.

Importing this package touches neither torch nor vLLM. vLLM calls `register`
through the entry point `vllm.general_plugins` in every process that it starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM

__version__ = "0.1.0"

_is_registered = False


def register() -> None:
    """Make vLLM know the quantization method `qoq` and the `FlexQuant*` models.

    Idempotent and cheap; changes nothing for models of other methods.
    """
    global _is_registered
    if _is_registered:
        return
    from vllm_qoq.integration.register import register_with_vllm

    register_with_vllm()
    _is_registered = True


def step_counts(llm: LLM) -> dict[tuple[str, str], int]:
    """How many steps `llm` has run, by phase and set: `{("decode", "w4a16"): 12, ...}`.

    Counts every forward pass with real requests since the model was loaded, and,
    under CUDA graphs, the few that vLLM runs to capture them; take differences.
    Raises ValueError when the model was not loaded with the method `qoq`.
    """
    from vllm_qoq.integration.counters import read_step_counts

    return read_step_counts(llm.llm_engine.vllm_config)

"""A vLLM plugin: one checkpoint, several precisions; every step runs in the one that suits it.

Importing this package touches neither torch nor vLLM. vLLM calls `register`
through the entry point `vllm.general_plugins` in every process that it starts.

Each command is a function of this package, imported when it is asked for: `quantize`, `merge`,
`calibrate_kv`, `import_checkpoint`, `inspect`, `verify`, `convert_lora`, `tune`, `perplexity` and
`evaluate`. They return what they found, and raise `UserError` with what is wrong and what to do.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from vllm_qoq.errors import UserError as UserError
from vllm_qoq.version import __version__ as __version__

if TYPE_CHECKING:
    from vllm import LLM

    from merge_tools.job import merge as merge
    from vllm_qoq.bench.evaluate.job import evaluate as evaluate
    from vllm_qoq.bench.perplexity import perplexity as perplexity
    from vllm_qoq.checkpoint.inspect import inspect as inspect
    from vllm_qoq.checkpoint.verify import verify as verify
    from vllm_qoq.importer.job import import_checkpoint as import_checkpoint
    from vllm_qoq.lora.job import convert_lora as convert_lora
    from vllm_qoq.quantizer.calibrate_kv import calibrate_kv as calibrate_kv
    from vllm_qoq.quantizer.job import quantize as quantize
    from vllm_qoq.tuner.job import tune as tune


_COMMANDS = {
    "quantize": "vllm_qoq.quantizer.job",
    "calibrate_kv": "vllm_qoq.quantizer.calibrate_kv",
    "merge": "merge_tools.job",
    "import_checkpoint": "vllm_qoq.importer.job",
    "inspect": "vllm_qoq.checkpoint.inspect",
    "verify": "vllm_qoq.checkpoint.verify",
    "convert_lora": "vllm_qoq.lora.job",
    "tune": "vllm_qoq.tuner.job",
    "perplexity": "vllm_qoq.bench.perplexity",
    "evaluate": "vllm_qoq.bench.evaluate.job",
}
# Package that a function may need -> the extra of ours that brings it.
_EXTRAS = {"llmcompressor": "quantize", "compressed_tensors": "quantize", "vllm": "vllm"}
__all__ = ["UserError", "register", "step_counts", *_COMMANDS]

_is_registered = False


def register() -> None:
    """Make vLLM know the quantization method `qoq` and the `FlexQuant*` models.

    Idempotent and cheap: nothing of what serves a model is imported before one asks for it
    (`serving.plugin.register`). Raises nothing, because vLLM would stop, whatever model it serves:
    where this vLLM lacks what registering needs, one line in its log says so.
    """
    global _is_registered
    if _is_registered:
        return
    _is_registered = True
    try:
        from vllm_qoq.serving.plugin.register import register_with_vllm

        register_with_vllm()
    except Exception as error:
        from vllm_qoq.environment import vllm_obstacle

        # The logger is below vLLM's, so that its settings apply.
        logging.getLogger("vllm.vllm_qoq").error(
            "%s. Other models are served as without vllm-qoq", vllm_obstacle(error)
        )


def step_counts(llm: LLM) -> dict[tuple[str, str], int]:
    """Count the steps that `llm` has run, by phase and set: `{("decode", "w4a16"): 12, ...}`.

    Counts every forward pass with real requests since the model was loaded, and,
    under CUDA graphs, the few that vLLM runs to capture them; take differences.
    Raises ValueError when the model was not loaded with the method `qoq`, or its engine counts on
    another host.
    """
    from vllm_qoq.serving.plugin.step_counts import read_step_counts

    return read_step_counts(llm.llm_engine.vllm_config)


def __getattr__(name: str) -> Any:
    if name not in _COMMANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_COMMANDS[name])
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise UserError(f"{error}; install it: pip install 'vllm-qoq[{extra}]'") from error
    return getattr(module, name)

"""The work of the entry point `vllm.general_plugins` in each of vLLM's processes.

It registers names, a class that stands for `QoQConfig` and the `FlexQuant*` models, and warns of
options that will be ignored. What serves a model (our ops, the set methods, the KV cache) is
imported when vLLM makes the quantization config of a model that asks for `qoq`, so vLLM serves any
other model with the modules, ops and files that it would have without this package.
"""

from __future__ import annotations

import logging
import sys
from types import FrameType
from typing import Any, NoReturn

import vllm
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from vllm_qoq.checkpoint.format import QUANT_METHOD
from vllm_qoq.environment import SERVED_VLLM, is_served, vllm_obstacle
from vllm_qoq.errors import EngineError, as_engine_error

logger = logging.getLogger("vllm." + __name__)  # below vLLM's, so that its settings apply


def register_with_vllm() -> None:
    """Register the quantization method and the model classes.

    Raises what vLLM raises. The method stays registered then, if it could be, and refuses models
    with the reason.
    """
    register_quantization_config(QUANT_METHOD)(LazyQoQConfig)
    _warn_of_ignored_options()
    try:
        from vllm_qoq.serving.plugin.flex_models import register_models

        register_models()
    except Exception as error:
        LazyQoQConfig.obstacle = error
        raise


class LazyQoQConfig(QuantizationConfig):
    """A stand-in for `QoQConfig`, which makes one when vLLM asks for an instance.

    obstacle  why registering failed, None where it did not
    """

    obstacle: Exception | None = None

    def __new__(cls) -> Any:
        """Make the config of a model without a section, for which vLLM calls the class."""
        with as_engine_error():
            return cls._real()()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make the config of a section of config.json; EngineError says what is wrong with it."""
        with as_engine_error():
            return cls._real().from_config(config)

    @classmethod
    def get_name(cls) -> str:
        """Name the method as vLLM's command line and config.json do."""
        return QUANT_METHOD

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Name no more files to read, because everything is in config.json."""
        return []

    @classmethod
    def _real(cls) -> type[QuantizationConfig]:
        if cls.obstacle is not None:
            _refuse(cls.obstacle)
        try:
            from vllm_qoq.serving.plugin.config import QoQConfig
        except Exception as error:
            _refuse(error)
        version = getattr(vllm, "__version__", "")
        if not is_served(version):
            logger.warning("vllm-qoq is tested with vLLM %s, and this is %s", SERVED_VLLM, version)
        return QoQConfig


def _warn_of_ignored_options() -> None:
    """Warn where an engine that starts has our options, and a model that is not ours.

    vLLM calls no code of ours for such a model, but in a process that it starts for an engine it
    loads plugins while the engine has its configuration, on the stack. In a process that the engine
    shares, or was forked from, plugins were loaded before, and nothing can be said.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        config = frame.f_locals.get("vllm_config") if frame.f_code.co_name == "__init__" else None
        options = getattr(config, "additional_config", None)
        if isinstance(options, dict) and QUANT_METHOD in options:
            quantization = getattr(getattr(config, "model_config", None), "quantization", None)
            if quantization != QUANT_METHOD:
                logger.warning(
                    "--additional-config: %r is ignored, because the quantization of this model is "
                    "%s; start with --quantization %s, or leave it out",
                    QUANT_METHOD,
                    quantization,
                    QUANT_METHOD,
                )
            return
        frame = frame.f_back


def _refuse(error: Exception) -> NoReturn:
    # The cause goes along, because a bug report needs its traceback.
    raise EngineError(vllm_obstacle(error)) from error

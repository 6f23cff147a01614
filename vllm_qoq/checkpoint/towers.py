"""Checks that what is beside the language model of a model of images and text fits `config.json`.

transformers says which tensors that are, because it knows every tower, and renames what older files
have. It gets their shapes and none of their values, and runs no code of the folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from vllm_qoq.checkpoint.folder import CODE_KEYS, Checkpoint
from vllm_qoq.checkpoint.format import SECTION
from vllm_qoq.errors import reason
from vllm_qoq.models.config import CONFIG, architecture_name
from vllm_qoq.models.linears import CONSTANT
from vllm_qoq.models.tensors import MOST_LAYERS
from vllm_qoq.models.vision import language_name, vision_language

UNUSED_KEYS = CODE_KEYS | {
    *(SECTION, "_name_or_path", "fusion_config", "distributed_config"),
    *("attn_implementation", "_attn_implementation", "experts_implementation"),
}
"""Keys of a `config.json` that name code or files, or that a float model does without."""

_DEPTHS = ("depth", "num_hidden_layers")
# How many times the numbers that are there, or of this size, a config may ask for.
_TIMES, _SMALL = 4, 1 << 20


def can_be_checked(checkpoint: Checkpoint) -> bool:
    """Whether transformers is there and has the class of the model."""
    if find_spec("transformers") is None:
        return False
    return _class_of(checkpoint) is not None


def findings(checkpoint: Checkpoint) -> Iterator[str]:
    """Find tensors beside the language model that are missing, too many, or of another shape.

    There are none where there is nothing beside it, or where that `can_be_checked` not.
    """
    if vision_language(checkpoint.config) is None or not can_be_checked(checkpoint):
        return
    import torch

    try:
        config = _config(checkpoint)
        for key in _DEPTHS:
            if getattr(config.vision_config, key, 0) > MOST_LAYERS:
                yield f"{CONFIG}: vision_config.{key}: is more than {MOST_LAYERS}"
                return
        with torch.device("meta"):
            blank = _class_of(checkpoint)(config).state_dict()
        expected, found = _beside(blank), _beside(checkpoint.tensors)
        if expected > _TIMES * max(found, _SMALL):  # transformers would make what is missing
            yield (
                f"{CONFIG}: describes {expected} numbers beside the language model, of which only "
                f"{found} are there"
            )
            return
        loaded = _loading_info(checkpoint, config, blank)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except Exception as error:  # whatever a library raises at a stranger's file
        yield f"{CONFIG}: transformers cannot build the model that it describes: {reason(error)}"
        return
    for name in sorted(loaded["missing_keys"]):
        yield f"{name}: missing, the model that {CONFIG} describes has it"
    for name in sorted(loaded["unexpected_keys"]):
        yield f"{name}: is not in the model that {CONFIG} describes"
    for name, found, expected in sorted(loaded["mismatched_keys"]):
        yield (
            f"{name}: is {list(found)}, and {list(expected)} in the model that {CONFIG} describes"
        )
    yield from loaded["error_msgs"]


def _class_of(checkpoint: Checkpoint) -> Any:
    import transformers

    return getattr(transformers, architecture_name(checkpoint.config) or "", None)


def _beside(tensors: Mapping[str, Any]) -> int:
    """Count the numbers of the tensors beside the language model, each of which has a `shape`."""
    return sum(math.prod(one.shape) for name, one in tensors.items() if language_name(name) is None)


def _loading_info(checkpoint: Checkpoint, config: Any, blank: Mapping[str, Any]) -> dict[str, Any]:
    """Let transformers load the model from tensors that take no memory, and say what did not fit.

    blank  the tensors of the model that `config` describes; the language model's are there as such
    """
    import torch

    nothing = torch.zeros((), dtype=torch.bfloat16)
    state = {
        name: nothing.expand(tensor.shape)
        for name, tensor in blank.items()
        if language_name(name) is not None
    }
    state |= {
        name: nothing.expand(info.shape)
        for name, info in checkpoint.tensors.items()
        if language_name(name) is None and not name.endswith(CONSTANT)
    }
    with _silent():
        _, info = _class_of(checkpoint).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=nothing.dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    found: dict[str, Any] = info
    return found


def _config(checkpoint: Checkpoint) -> Any:
    """Make the config of the whole model, with a language model that has no layers."""
    from transformers import CONFIG_MAPPING

    values = {k: v for k, v in checkpoint.config.items() if k not in UNUSED_KEYS}
    config: Any = CONFIG_MAPPING[values.pop("model_type")].from_dict(values)
    text = config.get_text_config()
    empty = {"num_hidden_layers": 0, "layer_types": [], "vocab_size": 1, "pad_token_id": None}
    for key, value in empty.items():
        if hasattr(text, key):
            setattr(text, key, value)
    config.tie_word_embeddings = text.tie_word_embeddings = False
    return config


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from printing a bar, and a report of what did not fit."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()

"""Checks that what is beside the language model of a model of images and text fits `config.json`.

transformers says which tensors that are, because it knows every tower, and renames what older files
have. It gets their shapes and none of their values, and runs no code of the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from vllm_qoq.checkpoint.folder import CODE_KEYS, Checkpoint
from vllm_qoq.checkpoint.format import SECTION
from vllm_qoq.errors import reason
from vllm_qoq.models.config import CONFIG, architecture_name
from vllm_qoq.models.linears import CONSTANT
from vllm_qoq.models.vision import language_name, vision_language

UNUSED_KEYS = CODE_KEYS | {
    *(SECTION, "_name_or_path", "fusion_config", "distributed_config"),
    *("attn_implementation", "_attn_implementation", "experts_implementation"),
}
"""Keys of a `config.json` that name code or files, or that a float model does without."""


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
    try:
        loaded = _loading_info(checkpoint)
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


def _loading_info(checkpoint: Checkpoint) -> dict[str, Any]:
    """Let transformers load the model from tensors that take no memory, and say what did not fit.

    Those of the language model are made as it expects them.
    """
    import torch

    nothing = torch.zeros((), dtype=torch.bfloat16)
    config, model_class = _config(checkpoint), _class_of(checkpoint)
    with torch.device("meta"):
        blank = model_class(config).state_dict()
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
        _, info = model_class.from_pretrained(
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

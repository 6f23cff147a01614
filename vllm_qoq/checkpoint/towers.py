"""Checks that what is beside the language model of a model of images and text fits `config.json`.

transformers says which tensors that are, because it knows every tower, and renames what older files
have. It gets their shapes and none of their values, and runs no code of the folder. Of the
`config.json` it gets the keys that shape a tower or its projector, held to bounds, and no others: a
hostile file would have it build, or write a list of, whatever a number there says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.errors import reason, shown
from vllm_qoq.models.config import CONFIG, architecture_name, text_config
from vllm_qoq.models.linears import CONSTANT
from vllm_qoq.models.tensors import MOST_LAYERS, MOST_SIZE
from vllm_qoq.models.vision import (
    VisionLanguage,
    language_config,
    language_name,
    vision_language,
)

_VISION, _TEXT = "vision_config", "text_config"
_LAYER_COUNTS = ("depth", "num_hidden_layers")
# What the supported towers are made of, and what their classes check of it.
_TOWER_KEYS = (
    *("model_type", "hidden_size", "intermediate_size", "hidden_act", *_LAYER_COUNTS),
    *("num_heads", "num_attention_heads", "in_channels", "num_channels", "image_size"),
    *("patch_size", "temporal_patch_size", "spatial_merge_size", "window_size"),
    *("out_hidden_size", "num_position_embeddings", "projection_dim", "vision_use_head"),
    *("fullatt_block_indexes", "deepstack_visual_indexes"),
)
_PROJECTOR_KEYS = ("projector_hidden_act", "multimodal_projector_bias", "vision_feature_layer")
# A language model that takes no time and no memory; towers depend on the width of its stream alone.
_NO_LAYERS: Mapping[str, Any] = {
    **{"num_hidden_layers": 0, "layer_types": [], "vocab_size": 1},
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    **{"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64},
}
# How many times the numbers that are there, or of this size, a config may ask for.
_TIMES, _SMALL = 4, 1 << 20


def can_be_checked(checkpoint: Checkpoint) -> bool:
    """Whether transformers is there and has the class of the model."""
    if find_spec("transformers") is None:
        return False
    return _class_of(checkpoint) is not None


def findings(checkpoint: Checkpoint) -> Iterator[str]:
    """Find tensors beside the language model that are missing, too many, or of another shape.

    There are none where there is nothing beside it, or where that `can_be_checked` not. The
    language model has to be checked before: FormatError for one that is not known.
    """
    known = vision_language(checkpoint.config)
    if known is None or not can_be_checked(checkpoint):
        return
    description = _description(checkpoint.config)
    refusal = next(_refusals(description, known, checkpoint.config), None)
    if refusal is not None:
        yield f"{CONFIG}: {refusal}"
        return
    import torch

    try:
        config = _config(known, description)
        with torch.device("meta"):
            model = _class_of(checkpoint)(config)
        blank = model.state_dict()
        # Loading makes what is missing, and the buffers that no file has.
        asked = _numbers_beside({**blank, **dict(model.named_buffers())}.items())
        stored = _numbers_beside(checkpoint.tensors.items())
        if asked > _TIMES * max(stored, _SMALL):
            yield (
                f"{CONFIG}: describes {asked} numbers beside the language model, of which only "
                f"{stored} are there"
            )
            return
        loaded = _loading_info(checkpoint, config, blank)
    except MemoryError:
        raise
    except Exception as error:  # whatever a library raises at a stranger's file
        yield f"{CONFIG}: transformers cannot build the model that it describes: {reason(error)}"
        return
    for name in sorted(loaded["missing_keys"]):
        yield f"{name}: missing, the model that {CONFIG} describes has it"
    for name in sorted(loaded["unexpected_keys"]):
        yield f"{name}: is not in the model that {CONFIG} describes"
    for name, shape, expected in sorted(loaded["mismatched_keys"]):
        yield (
            f"{name}: is {list(shape)}, and {list(expected)} in the model that {CONFIG} describes"
        )
    yield from loaded["error_msgs"]


def _class_of(checkpoint: Checkpoint) -> Any:
    import transformers

    return getattr(transformers, architecture_name(checkpoint.config) or "", None)


def _description(config: Mapping[str, Any]) -> dict[str, Any]:
    """Take from a `config.json` what decides the tensors beside the language model."""
    vision = config.get(_VISION)
    if isinstance(vision, dict):
        vision = {key: vision[key] for key in _TOWER_KEYS if key in vision}
    text = {
        "model_type": text_config(config).get("model_type"),
        "hidden_size": language_config(config).get("hidden_size"),
    }
    projector = {key: config[key] for key in _PROJECTOR_KEYS if key in config}
    return {**projector, _VISION: vision, _TEXT: text}


def _refusals(
    description: Mapping[str, Any], known: VisionLanguage, config: Mapping[str, Any]
) -> Iterator[str]:
    """Find what transformers must not be asked to build."""
    whole = config.get("model_type")
    if whole != known.type:
        yield f"model_type: {shown(whole)} is not {known.type}, that of {architecture_name(config)}"
    vision = description[_VISION]
    if vision is not None and not isinstance(vision, dict):
        yield f"{_VISION}: {shown(vision)} is not an object"
        return
    kind = vision.get("model_type") if vision is not None else None
    if kind is not None and kind not in known.tower_types:
        yield (
            f"{_VISION}.model_type: {shown(kind)} is not supported in "
            f"{architecture_name(config)}; supported are {', '.join(known.tower_types)}"
        )
    for key, value in description.items():
        yield from _unbounded(key, value)


def _unbounded(place: str, value: object) -> Iterator[str]:
    """Find a number, or a length of a list or text, that no model has."""
    if isinstance(value, int):
        most = MOST_LAYERS if place.rpartition(".")[2] in _LAYER_COUNTS else MOST_SIZE
        if value > most:
            yield f"{place}: {shown(value)} is more than {most}"
    elif isinstance(value, str | list) and len(value) > MOST_LAYERS:
        yield f"{place}: has a length of {len(value)}, more than {MOST_LAYERS}"
    elif isinstance(value, list):
        for entry in value:
            yield from _unbounded(place, entry)
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _unbounded(f"{place}.{key}", entry)


def _numbers_beside(tensors: Iterable[tuple[str, Any]]) -> int:
    """Count the numbers of the tensors beside the language model, each of which has a `shape`."""
    return sum(math.prod(one.shape) for name, one in tensors if language_name(name) is None)


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


def _config(known: VisionLanguage, description: Mapping[str, Any]) -> Any:
    """Make the config of the whole model, with a language model that has no layers."""
    from transformers import CONFIG_MAPPING

    text = {**description[_TEXT], **_NO_LAYERS}
    return CONFIG_MAPPING[known.type].from_dict(
        {**description, _TEXT: text, "tie_word_embeddings": False}
    )


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

"""The files by which a server turns images into pixels, without which it does not start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_qoq.checkpoint.folder import read_json
from vllm_qoq.errors import FormatError
from vllm_qoq.models.vision import vision_language

PROCESSOR, IMAGE_PROCESSOR = "processor_config.json", "preprocessor_config.json"
NESTED_IMAGES = "image_processor"
"""The key of `processor_config.json` that may have what is in `preprocessor_config.json`."""
JSON_BYTES = 64 << 20
"""The size of a file of a processor or a tokenizer's config, at most."""


def finding(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Say that a model of images and text has no processor; None where all is well."""
    if vision_language(config) is None or (folder / IMAGE_PROCESSOR).is_file():
        return None
    try:
        has_file = (folder / PROCESSOR).is_file()
        whole = read_json(folder / PROCESSOR, JSON_BYTES) if has_file else {}
    except FormatError as error:
        return str(error)
    if isinstance(whole.get(NESTED_IMAGES), dict):
        return None
    return (
        f"{IMAGE_PROCESSOR}: missing, and no {NESTED_IMAGES} is in a {PROCESSOR}, so the model "
        "cannot be served; copy the files of the original model's processor into the folder"
    )

"""Checks that a folder is a checkpoint of ours alone, so that --overwrite may delete it.

It is not enough that its config.json says so: whatever lies there that no command of ours
writes or copies would be lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from vllm_qoq.checkpoint.folder import INDEX, read_json
from vllm_qoq.checkpoint.format import QUANT_METHOD, SECTION
from vllm_qoq.errors import FormatError
from vllm_qoq.models.config import CONFIG

COPIED = "copied_files"
"""The key of the index's metadata for files and folders that came from a model."""

_CONFIG_BYTES = 16 << 20
_INDEX_BYTES = 256 << 20
# Files that commands of ours write, and those that models have beside their weights.
_NAMES = re.compile(
    r"config\.json|model\.safetensors\.index\.json|README\.md|recipe(-[a-z0-9]+)?\.yaml"
    r"|quantization_report\.json|qoq_transforms\.safetensors|qoq_tune\.(json|md|png)|\.vllm-qoq-lock|\.gitattributes|\.cache"
    r"|\.[\w.]+\.partial-\d+"
    r"|(generation|preprocessor|processor|video_preprocessor|image_processor)_config\.json"
    r"|(special_tokens_map|added_tokens|vocab|modules|config_sentence_transformers)\.json"
    r"|sentence_\w+_config\.json|additional_chat_templates|assets"
    r"|\d_(Pooling|WeightedLayerPooling|Dense|LayerNorm|Normalize|Dropout)"
    r"|tokenizer\S*|vocab\.txt|merges\.txt|spiece\.model|sentencepiece\S*|tekken\.json"
    r"|chat_template\S*"
    r"|(LICEN[CS]E|NOTICE|USE_POLICY|Notice|license)\S*",
)


def foreign(folder: Path) -> str | None:
    """Say what would be lost if the folder was deleted; None where all in it is ours."""
    names = sorted(item.name for item in folder.iterdir())
    if not names:
        return None
    if CONFIG not in names:
        return f"holds {names[0]} and is no checkpoint of ours"
    try:
        section = read_json(folder / CONFIG, _CONFIG_BYTES).get(SECTION)
        listed = _listed(folder)
    except (FormatError, OSError) as error:
        return f"is no checkpoint of ours: {error}"
    if not _is_ours(section, is_written=COPIED in _metadata(folder)):
        return f"is no checkpoint of ours: {CONFIG} has no {SECTION} with our sets"
    for name in names:
        if name not in listed and not _NAMES.fullmatch(name):
            return f"holds {name}, which is no part of the checkpoint"
    return None


def _is_ours(section: object, is_written: bool) -> bool:
    # A section without sets may be in somebody's own model, of which we quantize the KV cache.
    return (
        isinstance(section, dict)
        and section.get("quant_method") == QUANT_METHOD
        and (isinstance(section.get("sets"), dict) or is_written)
    )


def _listed(folder: Path) -> frozenset[str]:
    """List the files that the index names: weights, and what was copied from a model."""
    if not (folder / INDEX).exists():
        return frozenset({"model.safetensors"})
    weight_map = read_json(folder / INDEX, _INDEX_BYTES).get("weight_map")
    weights = weight_map.values() if isinstance(weight_map, dict) else ()
    copied = _metadata(folder).get(COPIED)
    return frozenset(
        [name for name in weights if isinstance(name, str) and name.endswith(".safetensors")]
        + [name for name in (copied if isinstance(copied, list) else ()) if isinstance(name, str)]
    )


def _metadata(folder: Path) -> Mapping[str, object]:
    """Read what the index says of the checkpoint; nothing without an index."""
    if not (folder / INDEX).exists():
        return {}
    metadata = read_json(folder / INDEX, _INDEX_BYTES).get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def index(
    weight_map: Mapping[str, str], total_bytes: int, copied: Iterable[Path]
) -> dict[str, object]:
    """Make the index of an output, by which `--overwrite` will know that the folder is ours.

    copied  the files that came from a model, as relative paths
    """
    names = sorted({file.parts[0] for file in copied})
    return {
        "metadata": {"total_size": total_bytes, COPIED: names},
        "weight_map": dict(sorted(weight_map.items())),
    }

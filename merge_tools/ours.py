"""Is a folder a checkpoint of ours and nothing else, so that --overwrite may delete it?

Not only its config.json has to say so: whatever lies there that no command of ours
writes or copies would be lost.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vllm_qoq.checkpoint import CONFIG, INDEX, read_json
from vllm_qoq.format import QUANT_METHOD, SECTION, FormatError

_CONFIG_BYTES = 16 << 20
_INDEX_BYTES = 256 << 20
# What commands of ours write, and what models have beside their weights.
_NAMES = re.compile(
    r"config\.json|model\.safetensors\.index\.json|README\.md|recipe(-[a-z0-9]+)?\.yaml"
    r"|quantization_report\.json|qoq_tune\.(json|md|png)|\.vllm-qoq-lock|\.gitattributes|\.cache"
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
    """What in the folder would be lost if it was deleted as a checkpoint of ours; None: nothing."""
    names = sorted(item.name for item in folder.iterdir())
    if not names:
        return None
    if CONFIG not in names:
        return f"holds {names[0]} and is no checkpoint of ours"
    try:
        section = read_json(folder / CONFIG, _CONFIG_BYTES).get(SECTION)
        weights = _weights(folder)
    except (FormatError, OSError) as error:
        return f"is no checkpoint of ours: {error}"
    if not _is_ours(section):
        return f"is no checkpoint of ours: {CONFIG} has no {SECTION} with our sets"
    for name in names:
        if name not in weights and not _NAMES.fullmatch(name):
            return f"holds {name}, which is no part of the checkpoint"
    return None


def _is_ours(section: Any) -> bool:
    # Without sets it is a model of somebody's, of which we quantize the KV cache.
    return (
        isinstance(section, dict)
        and section.get("quant_method") == QUANT_METHOD
        and isinstance(section.get("sets"), dict)
    )


def _weights(folder: Path) -> frozenset[str]:
    if not (folder / INDEX).exists():
        return frozenset({"model.safetensors"})
    weight_map = read_json(folder / INDEX, _INDEX_BYTES).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return frozenset(n for n in names if isinstance(n, str) and n.endswith(".safetensors"))

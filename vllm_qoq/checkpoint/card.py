"""The model card (README.md) of a checkpoint that is merged, imported or quantized."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_qoq.checkpoint import hub
from vllm_qoq.checkpoint.folder import read_config
from vllm_qoq.checkpoint.format import Section
from vllm_qoq.errors import UserError
from vllm_qoq.progress import human_bytes
from vllm_qoq.version import __version__

README = "README.md"
_README_BYTES = 1 << 20
_KEYS = ("license", "license_name", "license_link", "base_model")
# Values are ids of the Hub, names of licences and links; none could end line or front matter.
_VALUE = re.compile(r"[A-Za-z0-9][\w.+:/ -]{0,199}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")


def text(
    name: str,
    section: Section,
    sizes: Mapping[str | None, int],
    inputs: Sequence[Path],
    notes: Sequence[str] = (),
    body: str = "",
) -> str:
    """Write the text of README.md, with the front matter that the Hugging Face Hub reads.

    name    name of the output folder
    sizes   bytes of each set, and of the shared tensors under None
    inputs  folders whose cards say where the model comes from and under which licence
    notes   sentences, which become a list
    body    Markdown that stands at the end
    """
    rows = [
        f"| `{set_name}` | {config['quant_method']} | {human_bytes(sizes.get(set_name, 0))} |"
        for set_name, config in section.sets.items()
    ]
    known, apart = _provenance(inputs)
    front = [f"{key}: {json.dumps(value)}" for key, value in known.items()]
    return "\n".join(
        [
            "---",
            *front,
            *(["base_model_relation: quantized"] if "base_model" in known else []),
            "library_name: vllm",
            "tags:",
            "- vllm",
            "- qoq",
            "- quantized",
            "---",
            "",
            f"# {name}",
            "",
            "One checkpoint with several quantized versions (sets) of a model. vLLM with the",
            "plugin vllm-qoq runs each step in the set that suits it.",
            "",
            "```",
            f"vllm serve {name} --quantization qoq",
            "```",
            "",
            "| set | method | size |",
            "|---|---|---|",
            *rows,
            f"| shared | | {human_bytes(sizes.get(None, 0))} |",
            f"| total | | {human_bytes(sum(sizes.values()))} |",
            "",
            f"Made with vllm-qoq {__version__}.",
            "",
            "Routing:",
            "",
            "```json",
            json.dumps(section.routing.to_json(), indent=2),
            "```",
            "",
            *(f"- {note}" for note in (*apart, *notes)),
            *(["", body] if body else []),
        ]
    )


def _provenance(inputs: Sequence[Path]) -> tuple[dict[str, str | list[str]], list[str]]:
    """Derive front matter from that of the inputs, and notes on what they do not agree on."""
    found = [_front_matter(folder) for folder in inputs]
    known: dict[str, str | list[str]] = {}
    notes = []
    for key in _KEYS[:3]:
        values = sorted({value for front in found for value in front.get(key, [])})
        if len(values) == 1:
            known[key] = values[0]
        elif values:
            notes.append(f"the inputs differ in {key}: {', '.join(values)}")
    bases = {value for front in found for value in front.get("base_model", [])}
    bases = bases or {base for folder in inputs for base in _named_in_config(folder)}
    bases = bases or {base for folder in inputs if (base := hub.id_of(folder)) is not None}
    if bases:
        known["base_model"] = sorted(bases)
    return known, notes


def _front_matter(folder: Path) -> dict[str, list[str]]:
    """Read the values of `_KEYS` from the card of a folder that nobody vouches for.

    Lines other than `key: value` and `- value` are passed over.
    """
    readme = folder / README
    if not readme.is_file() or readme.stat().st_size > _README_BYTES:
        return {}
    lines = readme.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found: dict[str, list[str]] = {}
    key = ""
    for line in lines[1:]:
        if line.strip() == "---":
            return found
        name, colon, value = line.partition(":")
        if line.startswith(("-", " ")):
            value = line.strip().removeprefix("-")
        elif colon:
            key = name.strip()
        value = value.strip().strip("'\"")
        if key in _KEYS and _VALUE.fullmatch(value):
            found.setdefault(key, []).append(value)
    return {}  # The front matter has no end, so it is none.


def _named_in_config(folder: Path) -> list[str]:
    try:
        name = read_config(folder).get("_name_or_path")
    except UserError:
        return []
    return [name] if isinstance(name, str) and _HUB_ID.fullmatch(name) else []

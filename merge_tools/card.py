"""The model card of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence

from merge_tools.plan import Plan
from merge_tools.progress import human_bytes
from vllm_qoq.format import Section


def text(
    plan: Plan,
    section: Section,
    name: str,
    notes: Sequence[str] = (),
) -> str:
    """README.md with the front matter that the Hugging Face Hub reads."""
    rows = [
        f"| `{set_name}` | {section.sets[set_name]['quant_method']} | "
        f"{human_bytes(plan.bytes_of(set_name))} |"
        for set_name in plan.sets
    ]
    return "\n".join(
        [
            "---",
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
            f"| shared | | {human_bytes(plan.bytes_of(None))} |",
            "",
            "Routing:",
            "",
            "```json",
            json.dumps(section.routing.to_json(), indent=2),
            "```",
            "",
            *(f"- {note}" for note in notes),
        ]
    )

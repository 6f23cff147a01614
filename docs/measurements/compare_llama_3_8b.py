"""Compare the formats of Llama-3-8B with each other.

    python docs/measurements/compare_llama_3_8b.py

prints the tables of llama_3_8b.md from data/throughput_h200/llama-3-8b.json, which
`vllm-qoq bench serving` wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_qoq.markdown import markdown_table

RUN = Path(__file__).resolve().parent / "data" / "throughput_h200" / "llama-3-8b.json"
STEP, PROMPTS, RATE = "step_seconds", "prompts_seconds", "tokens_per_second"
OURS, NESTED = "w4a8-head8-kv4", "nested-head8-kv4"
NUMBERS = (
    ("new tokens a second", RATE, 1, ",.0f"),
    ("a step, ms", STEP, 1e3, ".3f"),
    ("all prompts, ms", PROMPTS, 1e3, ",.1f"),
)
# Title -> the formats of which one changes a single thing, the slower one first.
PAIRS = {
    "W4A8 weights": (("w8a8", "w4a8-head8"),),
    "a 4-bit cache": (("w4a8-head8", OURS),),
    "nested sets": ((OURS, NESTED), ("w8a8-kvfp8", NESTED)),
}


def cases_of(run: dict[str, Any]) -> dict[str, dict[int, dict[str, float]]]:
    """Map the name of every format to what was measured of each batch."""
    return {one["name"]: {case["batch"]: case for case in one["cases"]} for one in run["engines"]}


def tables() -> Iterator[tuple[str, str]]:
    """Yield what every table is about, and the table."""
    run = json.loads(RUN.read_text(encoding="utf-8"))
    found = cases_of(run)
    sizes = sorted({size for cases in found.values() for size in cases})

    def table(first: str, rows: dict[str, Callable[[int], float]], form: str = ".2f") -> str:
        return markdown_table(
            [first, *map(str, sizes)],
            [[name, *(cell(value, size, form) for size in sizes)] for name, value in rows.items()],
        )

    def ratio(number: str, slow: str, fast: str) -> Callable[[int], float]:
        return lambda size: found[slow][size][number] / found[fast][size][number]

    def speedup(ours: str) -> Callable[[int], float]:
        peers = [one["name"] for one in run["engines"] if not one["is_ours"]]
        return lambda size: (
            found[ours][size][RATE] / max(found[p][size][RATE] for p in peers if size in found[p])
        )

    for what, key, unit, form in NUMBERS:
        values = {
            name: lambda size, cases=cases, key=key, unit=unit: unit * cases[size][key]
            for name, cases in found.items()
        }
        yield what, table(f"{what}; batch", values, form)
    yield (
        "ours against vLLM's best",
        table("new tokens; batch", {f"{one} / best": speedup(one) for one in (OURS, NESTED)}),
    )
    for what, pairs in PAIRS.items():
        rows = {
            f"{name}, {slow} / {fast}": ratio(number, slow, fast)
            for slow, fast in pairs
            for name, number in (("a step", STEP), ("prompts", PROMPTS))
        }
        yield what, table("time; batch", rows)
    memory = [
        [one["name"], f"{one['weights_gib']:.2f}", f"{one['pool_tokens']:,}"]
        for one in run["engines"]
    ]
    yield "memory", markdown_table(["", "weights, GiB", "tokens in the cache"], memory)


def cell(value: Callable[[int], float], size: int, form: str) -> str:
    """Write the value at a batch size, "-" where the pool of a format does not hold it."""
    try:
        return format(value(size), form)
    except KeyError:
        return "-"


def main() -> None:
    """Print everything."""
    for what, table in tables():
        print(f"{what}\n\n{table}")


if __name__ == "__main__":
    main()

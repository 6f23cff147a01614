"""What it would bring to draft with one set of a checkpoint and to verify with another.

    python examples/self_speculation.py OUT --text heldout.txt --draft w4a8 --verify w8a8 \\
        --ratio 1.61

Greedy text is made in the verifying set. Then the drafting set says the likeliest token after each
of its tokens: a draft is accepted as long as the two agree. `--ratio` is how many times as long a
step takes in the verifying set as in the drafting one; docs/measurements/llama_3_8b.md has it
for every batch. From both follows how many times as fast as each set alone the pair could be, if a
step that verifies several tokens took no longer than one that makes one, and drafting cost
nothing but its steps: a bound from above.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from vllm_qoq.bench import BenchError
from vllm_qoq.bench.evaluate import job
from vllm_qoq.bench.evaluate.log import pool_settings
from vllm_qoq.bench.evaluate.windows import Windows
from vllm_qoq.errors import UserError
from vllm_qoq.markdown import markdown_table

MOST_DRAFTED = 7


class Gain(NamedTuple):
    """Drafts of one length.

    drafted          tokens of a draft
    tokens           tokens that a draft and its verification make, in the mean
    against_verify   times as fast as the verifying set alone, at most
    against_draft    times as fast as the drafting set alone, at most
    """

    drafted: int
    tokens: float
    against_verify: float
    against_draft: float


def gain(agreed: Sequence[Sequence[bool]], drafted: int, ratio: float) -> Gain:
    """Replay drafts of one length over texts of which `agreed` says where both sets agree."""
    made = steps = 0
    for text in agreed:
        position = 0
        while position + drafted < len(text):  # a draft at the end would be cut off
            run = text[position : position + drafted]
            # The verifying step makes one more token than it accepts.
            accepted = next((i for i, same in enumerate(run) if not same), drafted)
            position += accepted + 1
            made, steps = made + accepted + 1, steps + 1
    tokens = made / steps
    cost = drafted + ratio  # in steps of the drafting set
    return Gain(drafted, tokens, tokens * ratio / cost, tokens / cost)


def agreement(
    windows: Windows, folder: Path, count: int, draft: str, verify: str
) -> list[list[bool]]:
    """Say for each token of the verifying set's greedy text whether the drafting set agrees."""
    from vllm_qoq.bench.evaluate.engine import Engine

    length = windows.first + 1 + count
    engine = Engine(folder, (draft, verify), length=length, kv_bits=16, chunk=length)
    found = []
    for index in range(len(windows.tokens)):
        context = windows.context(index)
        made = engine.continuation(context, count, verify)
        logits = engine.logits((*context, *made), windows.first, draft)
        likeliest = logits.argmax(dim=-1).tolist()
        found.append([one == other for one, other in zip(likeliest, made, strict=True)])
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder with both sets")
    parser.add_argument("--text", type=Path, required=True, help="whose beginnings are continued")
    parser.add_argument("--draft", default="w4a8", metavar="SET")
    parser.add_argument("--verify", default="w8a8", metavar="SET")
    parser.add_argument("--ratio", type=float, nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=16, help="texts (default: 16)")
    parser.add_argument("--seqlen", type=int, default=256, help="half of it is context")
    parser.add_argument("--tokens", type=int, default=128, help="that each text is continued by")
    parser.add_argument("-o", "--output", type=Path, help="where agreements are written, JSON")
    args = parser.parse_args()
    try:
        sets = job.sets_of(args.checkpoint)[0]
        for name in (args.draft, args.verify):
            if name not in sets:
                raise BenchError(f"{args.checkpoint}: has no set {name!r}, but {', '.join(sets)}")
        if args.tokens <= MOST_DRAFTED or not all(r > 0 and math.isfinite(r) for r in args.ratio):
            raise BenchError(f"--tokens is more than {MOST_DRAFTED}, and --ratio above 0")
        cut = job.cut_windows(
            args.checkpoint, args.checkpoint, args.text, args.seqlen, args.windows
        )
        # A process of its own keeps vLLM's log out of the table, unless it fails.
        with pool_settings(is_quiet=True) as settings, ProcessPoolExecutor(1, **settings) as pool:
            given = (cut, args.checkpoint, args.tokens, args.draft, args.verify)
            agreed = pool.submit(agreement, *given).result()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    if args.output:
        args.output.write_text(json.dumps(agreed), encoding="utf-8")
    flat = [same for text in agreed for same in text]
    print(
        f"{args.draft} agrees with {args.verify} on {100 * sum(flat) / len(flat):.1f} % of "
        f"{len(flat)} greedy tokens",
        file=sys.stderr,
    )
    head = ["a step, verify / draft", "drafted", "tokens a cycle"]
    head += [f"against {args.verify} alone", f"against {args.draft} alone"]
    rows = [
        [f"{ratio:.2f}", str(one.drafted), *(f"{value:.2f}" for value in one[1:])]
        for ratio in args.ratio
        for one in (gain(agreed, drafted, ratio) for drafted in range(1, MOST_DRAFTED + 1))
    ]
    print(markdown_table(head, rows), end="")


if __name__ == "__main__":
    main()

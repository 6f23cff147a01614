"""Draw what a replay of conversations found: requests, the set of every step, and tokens over time.

    python examples/plot_replay.py replay.json -o replay.png --decode 4:w4a8,w8a8

`replay.json` is of examples/replay_conversations.py. `--decode` is the routing of the server, as
`vllm-qoq merge` takes it, for the line at its batch size. With a trace there is a mark for every
step, without one the steps a second in each set.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, ValidationError

from vllm_qoq import plots
from vllm_qoq.errors import UserError, one_line
from vllm_qoq.routing.table import parse_decode

WINDOWS = 120  # so many rates a second are drawn beside each other
MARKERS = {"prefill": "^", "decode": "o"}
Kind = Annotated[str, Field(pattern=r"^(prefill|decode) \S+$")]


class Sample(BaseModel):
    """The server's numbers at a time; `steps` are by "phase set"."""

    time: FiniteFloat
    running: int
    waiting: int
    generated_tokens: int
    steps: dict[Kind, int]


class Step(BaseModel):
    """A line of the trace."""

    time: FiniteFloat
    phase: Literal["prefill", "decode"]
    set: str
    num_tokens: PositiveInt


class Replay(BaseModel):
    """What is drawn of the file that replay_conversations.py writes."""

    model: str
    conversations: int
    start: FiniteFloat
    requests: list[Any]
    samples: Annotated[list[Sample], Field(min_length=2)]
    trace: list[Step] | None


def read_replay(path):
    """Read the file as objects of JSON, and refuse one that leaves nothing to draw."""
    remedy = "give what replay_conversations.py wrote"
    try:
        replay = Replay.model_validate_json(path.read_bytes(), strict=True).model_dump()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {remedy}") from None
    except ValidationError as error:
        raise UserError(f"{one_line(error, str(path))}; {remedy}") from None
    first, last = replay["samples"][0], replay["samples"][-1]
    if last["time"] <= max(first["time"], replay["start"]):
        raise UserError(f"{path}: its last sample is not later than its beginning; {remedy}")
    steps = sum(counts(replay).values())
    if not steps:
        raise UserError(f"{path}: no step ran between its samples; replay conversations again")
    if replay["trace"] == []:
        raise UserError(
            f"{path}: the trace is empty, but {steps} steps ran; replay again, with the trace that "
            "the server writes or without --trace"
        )
    return replay


def check_output(path):
    """Refuse a file that could not be written after all is drawn."""
    if path.suffix.lower() != ".png":
        raise UserError(f"-o {path}: the picture is a PNG; give a name that ends with .png")
    if path.is_dir():
        raise UserError(f"-o {path}: is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"-o {path}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"-o {path}: cannot be written; get the right to it or choose another")


def counts(replay):
    """Count the steps of the replay by (phase, set)."""
    first, last = replay["samples"][0]["steps"], replay["samples"][-1]["steps"]
    # A set that nothing had run in yet is not in the first sample.
    return Counter(
        {
            tuple(key.split()): n - first.get(key, 0)
            for key, n in last.items()
            if n > first.get(key, 0)
        }
    )


def windows(samples):
    """List (time, seconds, first sample, last sample) of stretches of about the same length."""
    shortest = (samples[-1]["time"] - samples[0]["time"]) / WINDOWS
    found, before = [], samples[0]
    for after in samples[1:]:
        seconds = after["time"] - before["time"]
        if seconds >= shortest:
            found.append(((before["time"] + after["time"]) / 2, seconds, before, after))
            before = after
    return found


def label(set_name):
    """Write a set's name as other pictures do."""
    return plots.method(set_name).label.partition(",")[0]


def finding(steps, bound):
    """Say which steps ran in which set.

    steps  (phase, set) -> number of steps
    bound  the batch above which generation runs as prompts do, None where that is not known
    """
    prefill = {name for phase, name in steps if phase == "prefill"}
    others = sorted({name for _, name in steps} - prefill)
    names = " and ".join(label(name) for name in sorted(prefill))
    if not prefill or not others:
        return f"All {sum(steps.values())} steps ran in {names or label(others[0])}"
    share = 100 * sum(n for (_, name), n in steps.items() if name in others) / sum(steps.values())
    rest = f"the other {share:.0f} % of steps in {' and '.join(label(name) for name in others)}"
    if not any(phase == "decode" and name in prefill for phase, name in steps):
        return f"Prompts ran in {names}, {rest}"
    some = "some of the generation" if bound is None else f"steps of more than {bound} requests"
    return f"Prompts and {some} ran in {names}, {rest}"


def figure(replay, decode, where):
    """Draw a replay.

    decode  rows of the server's decode table, for the lines; empty where it is not known
    where   the model and the machine, in words
    """
    steps = counts(replay)
    is_as_prompts = len(decode) == 2 and ("prefill", decode[-1].set_name) in steps
    seconds = replay["samples"][-1]["time"] - replay["start"]
    drawn = plots.figure(
        finding(steps, decode[0].max_batch if is_as_prompts else None),
        f"{where or replay['model']}: {replay['conversations']} conversations, "
        f"{len(replay['requests'])} requests, {sum(steps.values())} steps in {seconds:.0f} s",
        height=5.6,
    )
    top, middle, bottom = drawn.subplots(3, 1, sharex=True, height_ratios=(1, 2.4, 1))
    _requests(top, replay)
    if replay["trace"] is not None:
        _each_step(middle, replay)
        _thresholds(middle, decode)
    else:
        _step_rates(middle, replay, list(steps))
        _thresholds(top, decode)
    _tokens(bottom, replay)
    bottom.set(xlim=(0, seconds), xlabel="seconds")
    for axes in (top, middle, bottom):
        plots.tidy(axes)
    return drawn


def _requests(axes, replay):
    times = [sample["time"] - replay["start"] for sample in replay["samples"]]
    running = [sample["running"] for sample in replay["samples"]]
    everyone = [sample["running"] + sample["waiting"] for sample in replay["samples"]]
    style = {"step": "post", "linewidth": 0}
    axes.fill_between(times, running, color=plots.GREY, alpha=0.55, label="running", **style)
    axes.fill_between(
        times, running, everyone, color=plots.INK, alpha=0.75, label="waiting", **style
    )
    plots.values_axis(axes, everyone, "requests", may_be_log=False)
    plots.panel_title(axes, "Requests on the server")
    _legend(axes)


def _each_step(axes, replay):
    groups = {}
    for step in replay["trace"]:
        groups.setdefault((step["phase"], step["set"]), []).append(step)
    for (phase, set_name), steps in sorted(groups.items()):
        axes.scatter(
            [step["time"] - replay["start"] for step in steps],
            [step["num_tokens"] for step in steps],
            s=22 if phase == "prefill" else 7, marker=MARKERS[phase], linewidths=0,
            **_style(phase, set_name, groups),
        )  # fmt: skip
    sizes = [step["num_tokens"] for step in replay["trace"]]
    plots.values_axis(axes, sizes, "tokens in the step")
    plots.panel_title(axes, "The set of every step")
    _legend(axes)


def _step_rates(axes, replay, kinds):
    found, bottoms = windows(replay["samples"]), 0
    times = [time - replay["start"] for time, *_ in found]
    for kind in sorted(kinds):
        key = " ".join(kind)
        heights = [(b["steps"].get(key, 0) - a["steps"].get(key, 0)) / s for _, s, a, b in found]
        axes.bar(
            times, heights, [seconds for _, seconds, *_ in found], bottoms,
            hatch="////" if kind[0] == "prefill" else None, edgecolor="white", linewidth=0,
            **_style(*kind, kinds),
        )  # fmt: skip
        bottoms = [x + y for x, y in zip(heights, bottoms or [0] * len(heights), strict=True)]
    plots.values_axis(axes, bottoms, "steps/s", may_be_log=False)
    plots.panel_title(axes, "Steps a second by set")
    _legend(axes)


def _style(phase, set_name, kinds):
    """Give the steps of a phase in a set the set's colour and a name."""
    colour = plots.method(set_name, sorted({name for _, name in kinds})).colour
    what = "prompts" if phase == "prefill" else "generation"
    return {"color": colour, "label": f"{what} in {label(set_name)}"}


def _thresholds(axes, decode):
    for row in decode[:-1]:
        height = row.max_batch + 0.5
        axes.axhline(height, color=plots.INK, linewidth=0.9, linestyle="--")
        axes.annotate(
            f"generation: {label(row.set_name)} up to {row.max_batch} requests",
            (1, height), (0, 3), ("axes fraction", "data"), "offset points",
            ha="right", size=plots.SMALL - 0.5,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5},
        )  # fmt: skip


def _tokens(axes, replay):
    found = windows(replay["samples"])
    tokens = [(b["generated_tokens"] - a["generated_tokens"]) / s for _, s, a, b in found]
    axes.plot([time - replay["start"] for time, *_ in found], tokens, color=plots.INK)
    plots.values_axis(axes, tokens, "tokens/s", may_be_log=False)
    plots.panel_title(axes, "Tokens generated a second")


def _legend(axes):
    """Write the legend at the right end of the line of the panel's title."""
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 0.98), ncols=3, fontsize=plots.SMALL,
        frameon=False, markerscale=1.5, columnspacing=1.2, handletextpad=0.4, borderaxespad=0,
    )  # fmt: skip


def main():
    """Draw the picture of a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("replay", type=Path, metavar="REPLAY.json")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--decode", metavar="[BATCH:]SET,...", help="the routing of the server")
    parser.add_argument("--where", help="the model and the machine, in words")
    args = parser.parse_args()
    try:
        check_output(args.output)
        decode = parse_decode(args.decode) if args.decode is not None else ()
        replay = read_replay(args.replay)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    plots.save(figure(replay, decode, args.where), args.output)
    print(args.output)


if __name__ == "__main__":
    main()

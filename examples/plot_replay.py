"""Draw what a replay of conversations found: requests, the set of every step, and tokens over time.

    python examples/plot_replay.py replay.json -o replay.png --decode 4:w4a8,w8a8

`replay.json` is of examples/replay_conversations.py. `--decode` is the routing of the server, as
`vllm-qoq merge` takes it, for the line at its batch size. With a trace there is a mark for every
step, without one the steps a second in each set.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from vllm_qoq import plots
from vllm_qoq.routing.table import RoutingError, parse_decode

WINDOWS = 120  # so many rates a second are drawn beside each other
MARKERS = {"prefill": "^", "decode": "o"}


def counts(replay):
    """Count the steps of the replay by (phase, set)."""
    first, last = replay["samples"][0]["steps"], replay["samples"][-1]["steps"]
    return Counter(
        {tuple(key.split()): n - first[key] for key, n in last.items() if n > first[key]}
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
        heights = [(b["steps"][key] - a["steps"][key]) / s for _, s, a, b in found]
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
        decode = parse_decode(args.decode) if args.decode else ()
        replay = json.loads(args.replay.read_text())
    except RoutingError as error:
        sys.exit(f"error: {error}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {args.replay}: {error}; give what replay_conversations.py wrote")
    plots.save(figure(replay, decode, args.where), args.output)
    print(args.output)


if __name__ == "__main__":
    main()

"""The replay of conversations: the file, the prompts, and the pictures of made-up replays."""

import json
from datetime import datetime

import pytest
from conftest import ROOT
from example_scripts import load_example

pytest.importorskip("matplotlib")

from matplotlib.text import Text

from vllm_qoq import plots
from vllm_qoq.routing.table import parse_decode

CONVERSATIONS = ROOT / "examples" / "conversations.jsonl"
TABLE = "4:w4a8,w8a8"


@pytest.fixture(scope="module")
def replaying():
    return load_example("replay_conversations")


@pytest.fixture(scope="module")
def plotting():
    return load_example("plot_replay")


# The conversations


def test_the_file_has_the_form_of_wildchat_and_a_burst():
    assert CONVERSATIONS.stat().st_size < 150_000
    entries = [json.loads(line) for line in CONVERSATIONS.read_text().splitlines()]
    assert 40 <= len(entries) <= 60
    assert len({entry["conversation_hash"] for entry in entries}) == len(entries)
    for entry in entries:
        assert {"model", "language"} <= entry.keys()
        roles = [part["role"] for part in entry["conversation"]]
        assert roles == ["user", "assistant"] * entry["turn"]
    assert {entry["turn"] for entry in entries} >= {1, 2, 3, 4}
    words = [len(part["content"].split()) for e in entries for part in e["conversation"]]
    assert min(words) < 10 and max(words) > 1000
    times = [datetime.fromisoformat(entry["timestamp"]).timestamp() for entry in entries]
    assert times == sorted(times)
    assert max(sum(t <= u < t + 4 for u in times) for t in times) > 15, "no burst"


def test_a_turn_is_the_text_so_far_and_as_long_as_the_recorded_answer(replaying):
    messages = [("user", "A?"), ("assistant", "one two three"), ("user", "B?")]
    assert replaying.turns(messages) == [
        ("user: A?\n\nassistant:", 4),
        ("user: A?\n\nassistant: one two three\n\nuser: B?\n\nassistant:", 1),
    ]


@pytest.mark.parametrize(
    "text, said",
    [("", "has no conversations"), ('{"turn": 1}', "line 1: KeyError"), ("no", "line 1: JSON")],
)
def test_a_file_that_is_not_conversations_is_refused(replaying, tmp_path, text, said):
    path = tmp_path / "conversations.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit, match=f"^error: .*{said}"):
        replaying.read_conversations(path)


def test_a_server_that_does_not_answer_is_refused(replaying, tmp_path, monkeypatch):
    pytest.importorskip("openai")
    arguments = ["replay", "--base-url", "http://127.0.0.1:9", "-o", str(tmp_path / "a.json")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match=r"^error: --base-url http://127\.0\.0\.1:9 does not"):
        replaying.main()


# The picture


def replay(is_traced=True, **steps):
    """A replay of 4 s, with one request and so many steps of each phase and set in each second."""
    counted = {key.replace("_", " "): n for key, n in steps.items()}
    samples = [
        {
            "time": 100.0 + i,
            "running": i % 2,
            "waiting": 0,
            "generated_tokens": 8 * i,
            "steps": {key: i * n for key, n in counted.items()},
        }
        for i in range(5)
    ]
    trace = [
        {"time": 100.5 + i, "phase": key.split()[0], "set": key.split()[1], "num_tokens": 1 + j}
        for i in range(4)
        for key, n in counted.items()
        for j in range(n)
    ]
    return {
        "model": "m",
        "conversations": 1,
        "start": 100.0,
        "requests": [{}],
        "samples": samples,
        "trace": trace if is_traced else None,
    }


@pytest.mark.parametrize(
    "steps, decode, title",
    [
        (
            {"prefill_w8a8": 1, "decode_w8a8": 2, "decode_w4a8": 7},
            TABLE,
            "Prompts and steps of more than 4 requests ran in W8A8, "
            "the other 70 % of steps in W4A8",
        ),
        (
            {"prefill_w8a8": 1, "decode_w8a8": 2, "decode_w4a8": 7},
            "4:w8a8,w4a8",
            "Prompts and some of the generation ran in W8A8, the other 70 % of steps in W4A8",
        ),
        (
            {"prefill_w8a8": 1, "decode_w8a8": 0, "decode_w4a8": 3},
            TABLE,
            "Prompts ran in W8A8, the other 75 % of steps in W4A8",
        ),
        ({"prefill_w8a8": 1, "decode_w8a8": 2}, "w8a8", "All 12 steps ran in W8A8"),
    ],
)
@pytest.mark.parametrize(
    "is_traced, panel", [(True, "The set of every step"), (False, "Steps a second by set")]
)
def test_the_title_says_what_ran_where(
    plotting, tmp_path, monkeypatch, is_traced, panel, steps, decode, title
):
    monkeypatch.setattr(plots, "DPI", 40)
    drawn = plotting.figure(replay(is_traced, **steps), parse_decode(decode), "a model")
    found = plots.title_of(drawn).replace("\N{NO-BREAK SPACE}", " ")
    assert found == title
    plots.save(drawn, tmp_path / "a.png")
    said = [text.get_text() for text in drawn.findobj(Text)]
    assert panel in said
    assert decode != TABLE or "generation: W4A8 up to 4 requests" in said


def test_a_routing_that_cannot_be_read_is_refused(plotting, tmp_path, monkeypatch):
    path = tmp_path / "replay.json"
    path.write_text(json.dumps(replay(prefill_w8a8=1)))
    monkeypatch.setattr("sys.argv", ["plot", str(path), "-o", "a.png", "--decode", "4:w4a8"])
    with pytest.raises(SystemExit, match=r"^error: --decode '4:w4a8': no row serves batches above"):
        plotting.main()

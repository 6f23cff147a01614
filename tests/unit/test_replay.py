"""The replay of conversations: the file, the prompts, and the pictures of made-up replays."""

import json
import re
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


def refusal(module, monkeypatch, capsys, *arguments):
    """The last line that an example says when it refuses its arguments."""
    monkeypatch.setattr("sys.argv", ["example", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2, said
    return said.splitlines()[-1]


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


def conversation(role="user", content="A?", time="2025-03-03T09:00:00+00:00", **dumping):
    entry = {"timestamp": time, "conversation": [{"role": role, "content": content}]}
    return json.dumps(entry, **dumping) + "\n"


def test_conversations_may_hold_every_character(replaying, tmp_path):
    contents = ["a\u2028b\u2029c", "d\x85e\x1cf\x0bg", "h\r\ni"]
    path = tmp_path / "conversations.jsonl"
    path.write_text("".join(conversation(content=c, ensure_ascii=False) for c in contents), "utf-8")
    found = replaying.read_conversations(path)
    assert {messages[0][1] for _, messages in found} == set(contents)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "has no conversations"),
        (conversation(role="system"), "has no conversations"),
        ('{"turn": 1}', "line 1: KeyError"),
        ("no", "line 1: JSON"),
        (conversation() + conversation(content=None), "line 2: TypeError: 'content' is None, not"),
        (conversation(role=7), "line 1: TypeError: 'role' is 7, not"),
        (conversation(content="\ud800"), "line 1: UnicodeEncodeError"),
        (conversation(time="noon"), "line 1: ValueError: .*noon"),
        (conversation().encode() + b"\xff\n", "not UTF-8 at byte 96 .*; convert it"),
        (None, "no such file; give a file"),
    ],
)
def test_a_file_that_is_not_conversations_is_refused(
    replaying, tmp_path, monkeypatch, capsys, text, said
):
    path = tmp_path / "conversations.jsonl"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    arguments = ("--conversations", path, "-o", tmp_path / "a.json")
    line = refusal(replaying, monkeypatch, capsys, *arguments)
    assert re.match(rf"error: .*{re.escape(str(path))}.*{said}", line), line


@pytest.mark.parametrize(
    "option, value",
    [
        *(("--speed", value) for value in ("nan", "inf", "0", "-1", "fast")),
        *(("--every", value) for value in ("inf", "nan", "0")),
        *(("--think", value) for value in ("-1", "nan", "inf")),
        *(("--copies", value) for value in ("0", "1.5")),
        ("--max-tokens", "0"),
    ],
)
def test_a_number_without_a_meaning_is_refused(
    replaying, tmp_path, monkeypatch, capsys, option, value
):
    arguments = ("-o", tmp_path / "a.json", f"{option}={value}")
    line = refusal(replaying, monkeypatch, capsys, *arguments)
    assert re.search(f"argument {option}: '{value}' is not a .*number.*; give one", line), line


@pytest.mark.parametrize("text", ["{}\n", "[]\n", "no\n"])
def test_a_trace_that_is_none_is_refused(replaying, tmp_path, monkeypatch, capsys, text):
    trace = tmp_path / "steps.jsonl"
    trace.write_text(text)
    arguments = ("-o", tmp_path / "a.json", "--trace", trace)
    line = refusal(replaying, monkeypatch, capsys, *arguments)
    assert re.match(f"error: --trace {re.escape(str(trace))}: .*; name the file", line), line


def test_a_step_that_is_being_written_is_not_read(replaying, tmp_path):
    (tmp_path / "steps.jsonl").write_text('{"time": 1}\n{"time": 2}\n{"time"')
    assert replaying.read_trace(tmp_path / "steps.jsonl", since=2) == [{"time": 2}]


OUTPUTS = [
    (".", "is a folder; name"),
    ("no/a", "there is no folder .*/no; make it"),
    ("file/a", "there is no folder .*/file; make it"),
]


@pytest.mark.parametrize("name, said", OUTPUTS)
def test_a_result_that_could_not_be_written_is_refused_first(
    replaying, tmp_path, monkeypatch, capsys, name, said
):
    (tmp_path / "file").touch()
    line = refusal(replaying, monkeypatch, capsys, "-o", tmp_path / name)
    assert re.match(f"error: -o {re.escape(str(tmp_path / name))}: .*{said}", line), line


def test_a_server_that_does_not_answer_is_refused(replaying, tmp_path, monkeypatch):
    pytest.importorskip("openai")
    arguments = ["replay", "--base-url", "http://127.0.0.1:9", "-o", str(tmp_path / "a.json")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match=r"^error: --base-url http://127\.0\.0\.1:9 does not"):
        replaying.main()


def test_an_interrupt_is_told_in_a_line(replaying, tmp_path, monkeypatch, capsys):
    async def interrupted(args, conversations):
        raise KeyboardInterrupt

    monkeypatch.setattr(replaying, "run", interrupted)
    monkeypatch.setattr("sys.argv", ["replay", "-o", str(tmp_path / "a.json")])
    with pytest.raises(SystemExit) as stopped:
        replaying.main()
    assert stopped.value.code == 130 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == "interrupted; nothing is written\n"


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


def test_a_set_may_run_only_later(plotting, monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "DPI", 40)
    late = replay(is_traced=False, prefill_w8a8=1, decode_w4a8=3)
    for sample in late["samples"][:2]:
        del sample["steps"]["decode w4a8"]
    assert plotting.counts(late) == {("prefill", "w8a8"): 4, ("decode", "w4a8"): 12}
    plots.save(plotting.figure(late, (), None), tmp_path / "a.png")


def without(key):
    return {name: value for name, value in replay(prefill_w8a8=1).items() if name != key}


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "Invalid JSON"),
        (b"\xff", "Invalid JSON"),
        ({}, "model: Field required; add it"),
        ([], "valid dictionary|should be an object"),
        (without("trace"), "trace: Field required; add it"),
        (without("samples") | {"samples": []}, "samples: .* at least 2 items"),
        (without("start") | {"start": float("nan")}, "start: .* finite number"),
        (without("start") | {"start": 200.0}, "last sample is not later"),
        (without("trace") | {"trace": [{}]}, "trace.0.time: Field required"),
        (replay(**{"warm-up_w8a8": 1}), "samples.0.steps.warm-up w8a8"),
        (replay(), "no step ran"),
        (replay(prefill_w8a8=0), "no step ran"),
        (replay(prefill_w8a8=1) | {"trace": []}, "the trace is empty, but 4 steps ran"),
        (None, "No such file or directory; give what replay_conversations.py wrote"),
    ],
)
def test_what_is_not_a_replay_is_refused(plotting, tmp_path, monkeypatch, capsys, content, said):
    path = tmp_path / "replay.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    line = refusal(plotting, monkeypatch, capsys, path, "-o", tmp_path / "a.png")
    assert line.startswith("error: ") and str(path) in line and re.search(said, line), line
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "name, said",
    [
        *((f"{name}.png", said) for name, said in OUTPUTS),
        ("a.txt", r"is a PNG; give a name that ends with \.png"),
        ("a", "is a PNG"),
    ],
)
def test_a_picture_that_could_not_be_written_is_refused(
    plotting, tmp_path, monkeypatch, capsys, name, said
):
    (tmp_path / "..png").mkdir()
    (tmp_path / "file").touch()
    line = refusal(plotting, monkeypatch, capsys, "replay.json", "-o", tmp_path / name)
    assert re.match(f"error: -o {re.escape(str(tmp_path / name))}: .*{said}", line), line


def test_a_routing_that_cannot_be_read_is_refused(plotting, tmp_path, monkeypatch, capsys):
    path = tmp_path / "replay.json"
    path.write_text(json.dumps(replay(prefill_w8a8=1)))
    arguments = (path, "-o", tmp_path / "a.png", "--decode", "4:w4a8")
    line = refusal(plotting, monkeypatch, capsys, *arguments)
    assert line.startswith("error: --decode '4:w4a8': no row serves batches above"), line

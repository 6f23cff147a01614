"""examples/self_speculation.py: what drafts of one set would bring to another."""

import json
import re
import sys

import pytest
import warm_process
from conftest import ROOT
from example_scripts import load_example


@pytest.fixture(scope="module")
def script():
    return load_example("self_speculation")


def test_a_cycle_makes_what_is_accepted_and_one_token_more(script):
    text = [True, True, False, True] * 20 + [True]
    # Drafts of two tokens: two and a third, none accepted and one, two and a third, ...
    one = script.gain([text], 1, ratio=2.0)
    assert one == (1, one.tokens, one.tokens * 2 / 3, one.tokens / 3)
    assert script.gain([[True] * 100], 3, ratio=1.0) == (3, 4.0, 1.0, 1.0)
    assert script.gain([[False] * 100], 3, ratio=1.0).tokens == 1.0
    assert script.gain([[True, False] * 50], 1, ratio=1.0).tokens == 2.0
    assert script.gain([[False, True] * 50], 1, ratio=1.0).tokens == pytest.approx(1.98, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ratio", "1.5", "--draft", "w4a16"), "has no set 'w4a16', but w8a8, w4a8"),
        (("--ratio", "0"), "--tokens is more than 7, and --ratio above 0"),
        (("--ratio", "1", "--tokens", "7"), "--tokens is more than 7, and --ratio above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    script, nested_dir, heldout_text, options, message, monkeypatch
):
    given = ["self_speculation", str(nested_dir), "--text", str(heldout_text), *options]
    monkeypatch.setattr("sys.argv", given)
    with pytest.raises(SystemExit, match=message):
        script.main()


def test_drafts_are_compared_with_the_verifying_sets_greedy_text(
    nested_dir, heldout_text, tmp_path
):
    command = [sys.executable, ROOT / "examples" / "self_speculation.py", nested_dir]
    command += ["--text", heldout_text, "--windows", "3", "--seqlen", "64", "--tokens", "24"]
    command += ["--ratio", "1.5", "2", "-o", tmp_path / "agreed.json"]
    said = warm_process.run([str(part) for part in command], timeout=240)
    assert said.returncode == 0, said.stderr
    agreed = json.loads((tmp_path / "agreed.json").read_text())
    assert [len(text) for text in agreed] == [24] * 3
    share = sum(map(sum, agreed)) / 72
    assert 0.5 < share < 1, "4 bits lose something, and not nearly all"
    assert f"agrees with w8a8 on {100 * share:.1f} % of 72 greedy tokens" in said.stderr
    rows = [re.split(r" *\| *", line) for line in said.stdout.splitlines()[2:]]
    assert len(rows) == 14 and [row[2] for row in rows[:7]] == list("1234567")
    assert all(float(row[5]) < 1 for row in rows), "no draft is faster than its own set alone"

"""examples/accuracy.py: its commands are those of the programs, it goes on, and it draws."""

import importlib
import json
import re

import pytest
from example_scripts import load_example

from vllm_qoq.bench.evaluate import comparison, comparison_plot
from vllm_qoq.bench.evaluate.comparison import Measured
from vllm_qoq.bench.evaluate.scores import Estimate, Score
from vllm_qoq.cli.parser import Parser
from vllm_qoq.errors import UserError
from vllm_qoq.plots import title_of


@pytest.fixture(scope="module")
def accuracy():
    return load_example("accuracy")


def measured(name, kv_bits, text, divergence):
    score = Score(
        *(Estimate(divergence, divergence / 10), Estimate(0.9, 0.01), 21.0, 20.0),
        *(Estimate(0.05, 0.01), Estimate(28.0, 1.5) if kv_bits == 16 else None),
    )
    return Measured(name, kv_bits, text, score)


ROWS = (
    measured("W4A8", 16, "code", 0.02),
    measured("W4A8", 4, "code", 0.03),
    measured("peer", 16, "code", 0.08),
    measured("W4A8", 16, "prose", 0.02),
    measured("peer", 16, "prose", 0.05),
)


def test_a_table_has_no_number_for_what_was_not_measured():
    head, _, ours, peer = comparison.table(ROWS, "code").splitlines()
    assert re.findall(r"KL, (\w+)", head) == ["16", "4"]
    assert "| 0.0200 ± 0.0020 | 0.0300 ± 0.0030 |" in ours
    assert re.search(r" 28\.0 ± 1\.5 +\| +\|$", ours)
    assert re.search(r"\| 0.0800 ± 0.0080 \| +\|", peer)
    assert "0.05" not in peer


def test_rows_come_back_from_their_documents():
    assert [Measured.read(json.loads(json.dumps(row.document()))) for row in ROWS] == list(ROWS)


def test_the_title_has_the_least_ratio_of_the_texts_and_each_row_a_mark_a_cache():
    drawn = comparison_plot.figure(ROWS, "W4A8", {"peer": "the peer", "other": "x"}, "below")
    title = title_of(drawn).replace("\N{NO-BREAK SPACE}", " ")
    assert title == "the peer has at least 2.5 times the divergence of W4A8"
    marks = [list(line.get_xdata()) for line in drawn.axes[0].get_lines() if line.get_xdata().size]
    assert sorted(x for xs in marks for x in xs) == [0.02, 0.03, 0.08]


@pytest.fixture
def arguments(accuracy, tiny_model, heldout_text, tmp_path):
    def parse(*more):
        options = [tiny_model, "--text", heldout_text, "--heldout", heldout_text]
        return accuracy.parse([*map(str, [*options, "-o", tmp_path / "out"]), *more])

    return parse


def test_every_version_is_made_by_commands_that_the_programs_take(accuracy, arguments, monkeypatch):
    args = arguments("--dequantized", "w4a16", "llmcompressor-w8a8")
    quantize = Parser().add_subparsers()
    importlib.import_module("vllm_qoq.cli.quantize").add_parser(quantize)
    seen = {}
    for name in accuracy.KNOWN:
        for folder, (program, *command) in accuracy.commands(name, args).items():
            seen[folder.name] = command
            if program == "-m":
                quantize.choices["quantize"].parse_args(command[2:])
            else:
                taken = run_parser(program, command, monkeypatch)
                assert taken["out"] == accuracy.partial(folder)
    assert "--no-k-mean" in seen["round-to-nearest"] and "--no-gptq" in seen["round-to-nearest"]
    assert seen["w4a16"][0].endswith("w4a16-rounded") and "llmcompressor-w8a8-rounded" in seen
    assert "float" not in seen


def run_parser(program, command, monkeypatch):
    """What the parser of an example makes of a command; nothing after it runs."""
    import argparse

    found = {}
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *_):
        found.update(vars(parse(self, command)))
        raise SystemExit

    module = load_example(program.rpartition("/")[2].removesuffix(".py"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        module.main()
    return found


def test_what_no_version_could_be_made_of_is_refused_before_work(accuracy, arguments, tmp_path):
    empty, file = tmp_path / "empty.txt", tmp_path / "file"
    empty.touch()
    file.touch()
    for options, said in (
        (["--text", str(empty)], "--text .*: 0 bytes, fewer than one piece of 512 tokens"),
        (["--heldout", str(empty)], "--text .*: 0 bytes, fewer than two windows"),
        (["--windows", "1"], "--windows 1: "),
        (["-o", str(tmp_path)], "-o .*: holds something else"),
        (["-o", str(file)], "-o .*: holds something else"),
    ):
        with pytest.raises(UserError, match=said):
            accuracy.check(arguments(*options))
    assert sorted(tmp_path.iterdir()) == [empty, file]


def test_it_goes_on_after_what_fails_and_measures_nothing_twice(
    accuracy, arguments, monkeypatch, capsys
):
    args = arguments("--only", "float", "w4a16", "g64", "--kv-bits", "16", "4")
    monkeypatch.setattr(accuracy, "parse", lambda: args)
    done = []

    def make(name, _):
        if name == "w4a16":
            raise UserError("no room")

    def measure(name, _, bits, __):
        done.append((name, bits))
        rows = accuracy.KNOWN[name].rows.values()
        return [measured(row, bits, "heldout", 0.1) for row in rows]

    monkeypatch.setattr(accuracy, "make", make)
    monkeypatch.setattr(accuracy, "measure", measure)
    with pytest.raises(SystemExit, match="missing in the table: w4a16"):
        accuracy.main()
    assert done == [("float", 16), ("float", 4), ("g64", 16), ("g64", 4)]
    assert "failed: no room" in capsys.readouterr().err
    made = {path.name for path in args.output.iterdir() if path.is_file()}
    assert made == {"settings.json", "accuracy.json", "accuracy.md", "accuracy.png"}
    assert "W4A8 g64" in (args.output / "accuracy.md").read_text()
    with pytest.raises(SystemExit):
        accuracy.main()
    assert len(done) == 4
    args.samples = 64
    with pytest.raises(SystemExit, match="made with other options"):
        accuracy.main()

"""`vllm-qoq bench serving --online`: options, results, report and picture, without vLLM."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import shlex
import sys

import pytest
from matplotlib.text import Text
from online_units import made_up
from tokenizers import Tokenizer

from vllm_qoq import plots
from vllm_qoq.bench import BenchError
from vllm_qoq.bench.serving.cases import Lengths
from vllm_qoq.bench.serving.job import Job
from vllm_qoq.bench.serving.online import plot, report, result, tokenizer
from vllm_qoq.bench.serving.online.client import measured
from vllm_qoq.bench.serving.online.job import check_online
from vllm_qoq.bench.serving.online.load import OBJECTIVE, RATES, Load
from vllm_qoq.bench.serving.online.server import flags
from vllm_qoq.cli import bench_online, measurement
from vllm_qoq.cli import main as cli

LOAD = Load(Lengths(1024, 512))


# The command line


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """run(ARGUMENTS): exit code and stderr of the command, which must not begin to work."""
    monkeypatch.setattr(measurement, "stdout_for", lambda file: contextlib.nullcontext(sys.stdout))

    def run(*arguments):
        command = ["bench", "serving", *arguments, "--work-dir", tmp_path / "work"]
        monkeypatch.setattr(sys, "argv", ["vllm-qoq", *map(str, command)])
        try:
            code = cli.main()
        except SystemExit as stop:
            code = stop.code
        assert not (tmp_path / "work").exists()
        return code, capfd.readouterr().err

    return run


@pytest.mark.parametrize(
    "options, said",
    [
        (["--rates", "0"], "'0' is not a list of requests a second above 0 like 1,4,8"),
        (["--rates", "1,,2"], "'1,,2' is not a list of requests a second"),
        (["--rates", "1,inf"], "'1,inf' is not a list"),
        (["--rates", "nan"], "'nan' is not a list"),
        (["--seconds", "-1"], "'-1' is not a number of seconds above 0"),
        (["--fewest", "0"], "'0' is not a positive number"),
        (["--goodput", "ttft"], "'ttft' is not a list of milliseconds like ttft:500,tpot:25"),
        (["--goodput", "ttft:0"], "with each of ttft, tpot, e2el at most once"),
        (["--goodput", "itl:5"], "'itl:5' is not a list"),
        (["--goodput", "ttft:5,ttft:6"], "'ttft:5,ttft:6' is not a list"),
        (["--lengths", "8/8,16/8"], "--lengths 8/8,16/8: --online measures one pair of lengths"),
        (["--lengths", "8/1"], "an answer of one token has no time per output token"),
        (["--batches", "1"], "--batches is for batches that arrive together; leave out --batches"),
        (["--max-batch", "8"], "--max-batch is for batches"),
        (["--repeats", "2"], "--repeats is for batches that arrive together"),
        (["--engine-args", '{"port": 1}'], "--engine-args: port is what the benchmark gives"),
        (["--lengths", "9000/2"], "--lengths 9000/2: llama-3-8b has a context of 8192 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(run, options, said):
    code, err = run("llama-3-8b", "--online", *options)
    assert code == 2 and said in err


@pytest.mark.parametrize(
    "options",
    [["--rates", "1"], ["--seconds", "1"], ["--fewest", "1"], ["--goodput", "ttft:1"]],
)
def test_options_of_online_runs_are_refused_without_it(run, options):
    code, err = run("llama-3-8b", *options)
    assert code == 2 and f"{options[0]} is for requests that arrive one by one; add --online" in err


def test_a_checkpoint_without_a_tokenizer_is_refused(run, tiny_model, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    code, err = run("--online", "--checkpoint", f"a={tmp_path}", "--lengths", "32/8")
    assert code == 2 and f"{tmp_path}: has no tokenizer" in err


def test_without_vllm_nothing_begins(run, monkeypatch):
    monkeypatch.setattr(measurement, "find_spec", lambda name: None)
    code, err = run("llama-3-8b", "--online")
    assert code == 2 and "vLLM is not installed; install it" in err


def test_rates_and_objectives_are_parsed():
    assert bench_online.rates("8,0.5,8") == (0.5, 8)
    assert bench_online.objective("tpot:12.5,e2el:9000") == {"tpot": 12.5, "e2el": 9000}


# What servers and clients get


def test_a_rate_gets_requests_for_its_seconds_but_not_fewer_than_asked():
    load = dataclasses.replace(LOAD, seconds=10, fewest=12)
    assert [load.requests(rate) for rate in (0.5, 1, 4)] == [12, 12, 40]


def test_arguments_of_engines_become_options_of_servers():
    arguments = {"a_b": 1, "c": True, "d_e": False, "f": None, "g": {"h": [1]}, "i": ["x", 2]}
    assert flags(arguments) == [
        *("--a-b", "1", "--c", "--no-d-e", "--g", '{"h": [1]}', "--i", "x", "2")
    ]


def test_a_server_has_room_for_text_that_becomes_longer_but_not_beyond_the_model(tmp_path):
    def room(**more):
        job = Job(model="llama-2-7b", work_dir=tmp_path, formats=("fp8", "w4a8"), **more)
        asked = check_online(job, dataclasses.replace(LOAD, lengths=job.lengths[0]))
        assert {one["enable_prefix_caching"] for one in asked.engine_args.values()} == {False}
        return {one["max_model_len"] for one in asked.engine_args.values()}

    assert room() == {2560}
    assert room(lengths=(Lengths(3000, 1000),)) == {4096}
    assert room(engine_args={"max_model_len": 2000}) == {2000}


def test_every_token_of_the_made_up_tokenizer_is_a_word(tmp_path):
    tokenizer.write_tokenizer(tmp_path, 1000)
    read = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokens = [7, 999, 1, 500, 7]
    text = read.decode(tokens)
    assert text == "t7 t999 t1 t500 t7" and read.encode(text).ids == tokens
    vocabulary = read.get_vocab()
    unknown = json.loads((tmp_path / "tokenizer_config.json").read_text())["unk_token"]
    assert sorted(vocabulary.values()) == list(range(1000)) and vocabulary[unknown] == 0
    # vLLM takes as many characters of a prompt as its tokens could have, without the spaces.
    assert all(len(f"{word} ") < len(unknown) for word in vocabulary if word != unknown)


def test_the_result_of_the_client_is_read():
    found = {
        "duration": 12.5, "request_goodput": 27 / 12.5, "median_ttft_ms": 1.0, "p99_ttft_ms": 2.0,
        "median_tpot_ms": 3.0, "p99_tpot_ms": 4.0, "output_throughput": 5.0,
    }  # fmt: skip
    one = measured(found, LOAD, 1.0)
    assert (one.requests, one.good, one.share) == (30, 27, 0.9)
    assert one.goodput == pytest.approx(27 / 12.5)
    assert (one.ttft_ms, one.ttft_p99_ms, one.tpot_ms, one.tokens_per_second) == (1, 2, 3, 5)


# What follows from numbers


@pytest.mark.parametrize(
    "shares, held, holds_all",
    [
        ((1, 0.9, 0.5), 2, False),
        ((1, 1, 0.9), 4, True),
        ((0.5, 1, 1), 0, False),
        ((1, 0.899, 1), 1, False),
        ((0, 0, 0), 0, False),
        ((1,), 1, True),
        ((), None, False),
    ],
)
def test_a_server_holds_a_rate_where_nine_of_ten_requests_are_good_up_to_it(
    shares, held, holds_all
):
    (server,) = made_up(shares={"fp8": shares}, fewest=1000).servers
    assert (server.held_rate, server.holds_all) == (held, holds_all)


@pytest.mark.parametrize(
    "shares, said",
    [
        (
            {"fp8": (1, 0.5, 0), "w8a8": (0.5, 0, 0), "w4a8": (1, 1, 0.5)},
            "With our w4a8 90 % of the requests meet the objective up to 2 a second, "
            "with fp8 up to 1 a second",
        ),
        (
            {"fp8": (1, 1, 0.5), "w4a8": (1, 0.5, 0)},
            "With our w4a8 90 % of the requests meet the objective up to 1 a second, "
            "with fp8 up to 2 a second",
        ),
        (
            {"fp8": (1, 0.5, 0), "w4a8": (1, 1, 1)},
            "With our w4a8 90 % of the requests meet the objective still at 4 a second, "
            "the highest that was tried, with fp8 up to 1 a second",
        ),
        (
            {"fp8": (1, 1, 0.5), "w4a8": (1, 1, 0.6)},
            "With our w4a8 as with fp8 90 % of the requests meet the objective up to 2 a second; "
            "the highest goodput is 2.4 against 2.0 requests a second",
        ),
        (
            {"fp8": (0, 0, 0), "w4a8": (1, 0, 0)},
            "With our w4a8 90 % of the requests meet the objective up to 1 a second, "
            "with fp8 at no rate",
        ),
        (
            {"fp8": (0, 0, 0), "w4a8": (0.8, 0, 0)},
            "With our w4a8 and fp8 less than 90 % of the requests meet the objective, "
            "at every rate",
        ),
        (
            {"mine": (1, 0.5, 0)},
            "With mine 90 % of the requests meet the objective up to 1 a second",
        ),
        ({"fp8": ()}, "Nothing was measured"),
    ],
)
def test_the_finding_compares_ours_with_the_best_of_vllm(shares, said):
    assert report.finding(made_up(shares=shares)) == said


def test_among_servers_that_hold_the_same_rate_the_goodput_decides():
    found = made_up(shares={"fp8": (1, 0, 0), "w8a8": (1, 0.8, 0), "w4a8": (1, 0.8, 0)})
    assert found.best(is_ours=False).name == "w8a8" and found.goodput_ratio == 1
    assert "w4a8 is as fast as w8a8 (1.00x)" in report.markdown(found)


def test_without_a_good_request_there_is_no_ratio():
    found = made_up(shares={"fp8": (0, 0, 0), "w4a8": (1, 0, 0)})
    assert found.goodput_ratio is None and "1.00x" not in report.markdown(found)
    assert made_up(shares={"fp8": (1, 1, 1), "w4a8": (0, 0, 0)}).goodput_ratio == 0


def test_the_document_has_every_number():
    shares = {"fp8": (1, 0.5), "w4a8": (1, 1, 0.5)}
    document = result.to_json(made_up(shares=shares, left_out={"fp8": "no room"}))
    assert json.loads(json.dumps(document)) == document
    assert document["objective_ms"] == OBJECTIVE and document["lengths"] == "1024/512"
    assert (document["best_of_ours"], document["best_peer"]) == ("w4a8", "fp8")
    fp8, ours = document["servers"]
    assert (fp8["held_rate"], fp8["left_out"], ours["held_rate"]) == (1, "no room", 2)
    assert [one["share"] for one in ours["rates"]] == [1, 1, 0.5]
    assert ours["rates"][2]["goodput"] == pytest.approx(2)


# The report and the picture


def test_the_report_has_a_table_for_each_number_and_what_was_left_out():
    shares = {"fp8": (1, 0.5), "w4a8": (1, 1, 0.896)}
    text = report.markdown(made_up(shares=shares, left_out={"fp8": "no room"}, fewest=1000))
    assert text.count("### ") == len(report.NUMBERS)
    assert re.search(r"\| requests a second +\| +1 \| +2 \| +4 \|", text)
    assert re.search(r"\| w4a8 +\| +100\.0% \| +100\.0% \| +89\.6% \|", text)
    assert re.search(r"\| fp8 +\| +50\.0 \| +100\.0 \| +- \|", text)
    assert "Objective: the first token within 500 ms, 25 ms for each token after it." in text
    assert "- fp8: no room" in text


@pytest.mark.parametrize(
    "more",
    [
        {"rates": RATES, "shares": {"fp8": ()}},
        {"rates": (0.5, 1e5), "seconds": 2.5, "fewest": 3, "objective": {"e2el": 12.5}},
    ],
)
def test_the_command_of_the_report_measures_the_same(monkeypatch, more):
    found = dataclasses.replace(made_up(**more), engine_args={"tensor_parallel_size": 2})
    monkeypatch.setattr(sys, "argv", shlex.split(report.command(found)))
    parse_args = argparse.ArgumentParser.parse_args
    parsed = []

    def stop_after(*args):
        parsed.append(parse_args(*args))
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after)
    with pytest.raises(SystemExit):
        cli.main()
    (args,) = parsed
    load = found.load
    assert args.online and args.model == "llama-3-8b" and args.lengths == (load.lengths,)
    assert (args.rates, args.seconds, args.fewest) == (load.rates, load.seconds, load.fewest)
    assert args.goodput == load.objective and args.engine_args == found.engine_args
    assert args.formats == tuple(one.name for one in found.servers)


def test_the_picture_states_the_finding_and_has_plain_ticks(tmp_path):
    found = made_up(shares={"fp8-kvfp8": (1, 0.5, 0), "w4a8-kv4": (1, 1, 0.5), "mine": (1, 1, 1)})
    drawn = plot.figure(found)
    drawn.draw_without_rendering()
    assert plots.title_of(drawn).replace("\N{NO-BREAK SPACE}", " ") == report.finding(found)
    texts = [text.get_text() for text in drawn.findobj(Text)]
    assert not [text for text in texts if re.search(r"\^|\$|\de[+-]?\d", text)]
    lines = {line.get_label(): line for line in drawn.axes[0].get_lines()}
    assert lines["fp8-kvfp8"].get_color() == plots.METHODS["fp8"].colour
    assert lines["w4a8-kv4, ours"].get_color() == plots.METHODS["w4a8"].colour
    assert list(lines["mine"].get_ydata()) == [50, 100, 200]
    plot.save(found, tmp_path / "online.png")
    assert (tmp_path / "online.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shares", [{"fp8": (0, 0, 0)}, {"fp8": (), "w4a8": (0.5,)}])
def test_pictures_of_few_or_no_good_requests_are_drawn(shares):
    plot.figure(made_up(shares=shares)).draw_without_rendering()


def test_the_objective_is_drawn_where_times_are_near_it():
    def dotted(objective):
        axes = plot.figure(made_up(objective=objective)).axes[0]
        return [line.get_ydata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"]

    assert 150 in dotted({"ttft": 150.0}) and 9000 not in dotted({"ttft": 9000.0})
    assert dotted({"tpot": 9.0}) == dotted({"ttft": 9000.0})


def test_nothing_to_measure_is_refused(tmp_path):
    with pytest.raises(BenchError, match="nothing to measure; name a MODEL or a --checkpoint"):
        check_online(Job(model=None, work_dir=tmp_path), LOAD)

"""`vllm-qoq bench serving` and `bench table` without an engine, and the mistakes of users."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from bench_units import bench_command, cells
from conftest import DATA

from vllm_qoq import plots
from vllm_qoq.bench import BenchError
from vllm_qoq.bench.serving import (
    floor,
    formats,
    plot,
    process,
    report,
    result,
    run,
    table,
    table_plot,
)
from vllm_qoq.bench.serving.cases import Lengths, captured, fitting
from vllm_qoq.bench.serving.floor import Limits, Model
from vllm_qoq.bench.serving.job import Job, check_job
from vllm_qoq.bench.serving.random_weights import RandomWeights
from vllm_qoq.bench.serving.records import Facts, Line, Measured, read
from vllm_qoq.bench.serving.shapes import SHAPES
from vllm_qoq.bench.serving.work import close, identity, opened
from vllm_qoq.checkpoint import methods
from vllm_qoq.checkpoint.format import Section
from vllm_qoq.checkpoint.kv_config import Bits
from vllm_qoq.errors import FormatError
from vllm_qoq.models.linears import linear_layers
from vllm_qoq.models.table import ARCHITECTURES
from vllm_qoq.numerics.kv_layout import slot_bytes

LENGTHS = Lengths(1024, 512)
LIMITS = Limits(4e12, {"bf16": 8e14, "int8": 15e14, "fp8": 14e14})
PACKAGES = {"torch": "2.11.0", "vllm": "0.26.0"}
TINY = DATA / "tiny-llama"
ROUTERS = {"mixtral-8x7b": "block_sparse_moe.gate", "qwen3-30b-a3b": "mlp.gate"}
NAMES = ("fp8-kvfp8", "w4a8-head8-kv4")


def measured(batch, rate, lengths=LENGTHS, step=0.01):
    return Measured(
        prompt=lengths.prompt,
        new=lengths.new,
        batch=batch,
        seconds=batch * lengths.new / rate,
        prompts_seconds=0.5,
        step_seconds=step,
    )


def engine(name, *runs, left_out=None):
    how = formats.parse(name)
    facts = Facts(pool_blocks=1000, block_tokens=16, start_seconds=50.0)
    return result.Engine(name, how.is_ours, how, facts, 4.5, runs, left_out)


def made_up(model="llama-3-8b", device="Some GPU", ours=18000.0, peer=12000.0):
    """A result: the peer is best at its largest batch, ours before it."""
    return result.Result(
        model=model,
        config=SHAPES[model].config(),
        device=device,
        limits=LIMITS,
        environment={"packages": PACKAGES},
        lengths=(LENGTHS,),
        batches=("64", "256", "full"),
        most=2048,
        repeats=1,
        engine_args={},
        engines=(
            engine(NAMES[0], measured(64, peer / 2), measured(256, peer)),
            engine(NAMES[1], measured(256, ours), measured(512, ours - 1)),
        ),
    )


@pytest.fixture
def command(monkeypatch, capfd):
    return bench_command("serving", monkeypatch, capfd)


@pytest.fixture
def table_command(monkeypatch, capfd):
    return bench_command("table", monkeypatch, capfd)


# Formats and shapes


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_as_many_parameters_as_its_name_says(name):
    model = Model.of(SHAPES[name].config())
    # Experts of Mixtral share the attention.
    said = 46.7 if name == "mixtral-8x7b" else float(re.search(r"-([\d.]+)b", name)[1])
    others = model.weights + model.routers + 2 * model.head_weights
    assert 0.9 * said < (others + model.experts) / 1e9 < 1.14 * said
    if active := re.search(r"-a(\d+)b", name):
        said = float(active[1])
        assert 0.9 * said < (others + model.experts * model.share) / 1e9 < 1.14 * said


@pytest.mark.parametrize("weights", [name for name in formats.WEIGHTS if name != "bf16"])
@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "llama-2-7b"])
def test_every_format_quantizes_all_linear_layers_and_no_router(weights, name):
    config = {**SHAPES[name].config(), "num_hidden_layers": 1}
    section = formats.parse(weights).config(config)["quantization_config"]
    section = section["sets"]["w4a8"] if formats.WEIGHTS[weights].is_ours else section
    found = methods.parse(section)
    layers = linear_layers(config, "measured", ARCHITECTURES).linears
    kept = {one for one in layers if not found.quantizes(methods.Unit.of(one, layers), ())}
    router = ROUTERS.get(name)
    assert kept == ({f"model.layers.0.{router}"} if router else set())


@pytest.mark.parametrize("weights", formats.WEIGHTS)
@pytest.mark.parametrize("cache", formats.CACHES)
def test_the_section_of_a_format_is_one_that_we_serve(weights, cache):
    try:
        how = formats.parse(f"{weights}-{'' if cache == 'k8v4' else 'kv'}{cache}")
    except BenchError as error:
        assert "16, 8 or 4 bits" in str(error) and cache == "fp8"
        return
    config = how.config(SHAPES["qwen2.5-7b"].config())
    section = config.get("quantization_config")
    assert (section is None) == (weights == "bf16")
    assert how.is_ours == (how.weights.is_ours or cache in ("8", "k8v4", "4"))
    args = how.engine_args()
    if how.weights.is_ours:
        parsed = Section.parse(section)
        bits = parsed.kv_cache.bits if parsed.kv_cache else 16
        assert str(bits) == cache and not args
        assert ("w8a8" in parsed.sets) == weights.startswith("nested")
    elif cache in ("8", "k8v4", "4"):
        assert args["quantization"] == "qoq"
        bits = args["additional_config"]["qoq"]["kv_bits"]
        assert str(bits) == cache and bits in get_args(Bits)
    else:
        assert args == ({"kv_cache_dtype": "fp8"} if cache == "fp8" else {})


def test_a_format_does_not_change_the_config_of_the_model():
    config = SHAPES["llama-2-7b"].config()
    formats.parse("w8a8").config(config)
    assert config == SHAPES["llama-2-7b"].config()


# Batches


def test_a_full_batch_is_the_largest_with_a_graph_that_the_pool_holds():
    sizes = captured(("16", "full"), 256)
    assert sizes[-1] == 256 and 16 in sizes and sizes == sorted(set(sizes))
    # A request takes 96 blocks of 16 tokens; 203 of them fit.
    assert fitting(("16", "full"), sizes, LENGTHS, 203 * 96 + 95, 16) == [192, 16]
    assert fitting(("16", "64"), (16, 64), LENGTHS, 63 * 96, 16) == [16]
    assert fitting(("full",), sizes, LENGTHS, 95, 16) == []
    # The last block of a request is its own.
    assert fitting(("2",), (2,), Lengths(10, 7), 3, 16) == []


# The floor


def test_the_floor_of_a_step_is_its_bytes_or_its_operations():
    config = SHAPES["llama-3-8b"].config()
    model, ours = Model.of(config), formats.parse("w4a8-head8-kv4")
    assert model.weights == sum(
        n * k for n, k in linear_layers(config, "measured").linears.values()
    )
    assert model.cache_bytes("4") == 32 * 8 * 2 * (64 + 4)
    assert model.cache_bytes("k8v4") == 32 * 8 * slot_bytes(128, "k8v4")
    assert model.cache_bytes("fp8") == 32 * 8 * 2 * 128 == model.cache_bytes("16") / 2
    one = floor.step_seconds(model, ours, LIMITS, 1, 1000)
    bytes_ = model.weights * 4.125 / 8 + model.head_weights + 1000 * model.cache_bytes("4")
    assert one == pytest.approx(bytes_ / 4e12)
    many = floor.step_seconds(model, ours, LIMITS, 1024, 0)
    assert many == pytest.approx(2 * (model.weights + model.head_weights) * 1024 / 15e14)


def test_the_floor_of_a_mixture_reads_the_experts_of_its_tokens():
    model, ours = Model.of(SHAPES["qwen3-30b-a3b"].config()), formats.parse("w4a8-kv4")
    assert (model.experts, model.share) == (48 * 128 * 3 * 2048 * 768, 8 / 128)
    assert model.routers == 48 * 128 * 2048
    assert model.weights == 48 * (2 * 32 + 2 * 4) * 128 * 2048
    one = floor.step_seconds(model, ours, LIMITS, 1, 0)
    read = (model.weights + model.experts / 16) * 4.125 / 8
    assert one == pytest.approx((read + 2 * (model.routers + model.head_weights)) / 4e12)
    limits = LIMITS._replace(copy_rate=1e30)
    many = floor.step_seconds(model, ours, limits, 64, 0)
    in_float = 2 * 64 * (model.routers + model.head_weights) / 8e14
    assert many == pytest.approx(2 * 64 * (model.weights + model.experts / 16) / 15e14 + in_float)
    prompt = floor.prompt_seconds(model, ours, LIMITS, 1)
    attention = 2 * 32 * 128 * 48 / 8e14
    routers = 2 * model.routers / 8e14
    products = 2 * (model.weights + model.experts / 16) / 15e14
    assert prompt == pytest.approx(products + routers + attention)


@pytest.mark.parametrize("batch", [1, 16, 64])
def test_a_step_reads_as_many_experts_as_random_tokens_have(batch):
    model, random = Model.of(SHAPES["qwen3-30b-a3b"].config()), torch.Generator().manual_seed(0)
    chosen = torch.rand(200, batch, 128, generator=random).topk(8).indices.flatten(1)
    distinct = torch.zeros(200, 128).scatter_(1, chosen, 1).sum(1).mean().item()
    assert model.experts_read(batch) / model.experts == pytest.approx(distinct / 128, 0.01)


def test_all_tokens_go_through_shared_experts_and_dense_layers():
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    config = {
        **SHAPES["qwen2.5-7b"].config(),
        **{"architectures": ["Qwen2MoeForCausalLM"], "num_hidden_layers": 2},
        **{"shared_expert_intermediate_size": 512, "mlp_only_layers": [0], **sizes},
    }
    model, dense = Model.of(config), Model.of(SHAPES["qwen2.5-7b"].config())
    mlp = 3 * 3584 * 18944
    assert model.weights == 2 * (dense.weights // 28 - mlp) + mlp + 3 * 3584 * 512
    assert model.experts == 4 * 3 * 3584 * 256
    assert model.routers == (4 + 1) * 3584
    for chosen in (0, 5, "2"):
        with pytest.raises(FormatError, match="num_experts_per_tok: "):
            Model.of({**config, "num_experts_per_tok": chosen})


def test_the_floor_counts_prompts_and_steps():
    model, how = Model.of(SHAPES["llama-3-8b"].config()), formats.parse("fp8-kvfp8")
    prompt = floor.prompt_seconds(model, how, LIMITS, 1024)
    step = floor.step_seconds(model, how, LIMITS, 64, 1024 + 256)
    rate = floor.tokens_per_second(model, how, LIMITS, LENGTHS, 64)
    assert rate == pytest.approx(64 * 512 / (64 * prompt + 511 * step))


def test_a_floor_that_is_not_known_is_left_out():
    whole = made_up()
    runs = [
        replace(whole, limits=None),
        replace(whole, limits=Limits(4e12, {"bf16": 8e14})),
        replace(whole, engine_args={"tensor_parallel_size": 2}),
    ]
    for one in runs:
        ours = one.engines[1]
        assert one.share_of_floor(ours, ours.measured[0]) is None
        assert "of the floor" in report.markdown(one)
    assert whole.share_of_floor(whole.engines[1], whole.engines[1].measured[0]) > 0


# Results and reports


def test_the_best_of_each_side_are_compared():
    found = made_up()
    assert found.speedup(LENGTHS) == pytest.approx(1.5)
    text = report.markdown(found)
    assert "Our w4a8-head8-kv4 is 1.50x as fast as fp8-kvfp8 at 1024 tokens in, 512 out." in text
    row = cells(text, "1024 in, 512 out: highest throughput", "w4a8-head8-kv4")
    assert row[:2] == ["18,000", "256"] and row[-1] == "16,000"
    batches = text.split("### 1024/512: tokens a second")[1].split("###")[0]
    assert "| fp8-kvfp8      | 6,000 | 12,000 |      - |" in batches
    assert "vllm-qoq bench serving llama-3-8b --formats fp8-kvfp8,w4a8-head8-kv4" in text
    document = json.loads(json.dumps(result.to_json(found)))
    assert document["speed_against_the_best_peer"] == {"1024/512": pytest.approx(1.5)}
    assert [case["batch"] for case in document["engines"][0]["cases"]] == [64, 256]


def test_one_side_alone_has_a_report_and_a_picture():
    whole = made_up()
    for engines in (whole.engines[:1], whole.engines[1:]):
        alone = replace(whole, engines=engines)
        assert alone.speedup(LENGTHS) is None
        assert f"With {engines[0].name} vLLM generates" in report.markdown(alone)
        assert plots.title_of(plot.figure(alone)).startswith("With ")


def test_what_was_left_out_is_said():
    peer, ours = made_up().engines
    gone = replace(peer, facts=None, measured=(), left_out="OutOfMemoryError: no")
    small = replace(ours, too_large="batches that its pool does not hold: 999 at 1024/512")
    text = report.markdown(replace(made_up(), engines=(gone, small)))
    assert "Left out:\n\n- fp8-kvfp8: OutOfMemoryError: no\n- w4a8-head8-kv4: batches that" in text


def test_a_side_that_was_cut_off_is_told_where_it_is_compared(tmp_path):
    peer, ours = made_up().engines
    cut = replace(made_up(), engines=(replace(peer, left_out="the time was over"), ours))
    said = "is 1.50x as fast as fp8-kvfp8 at 1024 tokens in, 512 out, though batches are missing"
    assert said in report.markdown(cut) and said.split(", though")[0] in report.markdown(made_up())
    assert "though" not in report.markdown(made_up())
    found = table.read([write_run(tmp_path / "a", cut)], "1024/512")
    assert "| llama-3-8b * |" in table.markdown(found)
    assert "* not all batches were measured" in table.markdown(found)
    (label,) = table_plot.figure(found).axes[0].get_yticklabels()
    assert label.get_text() == "llama-3-8b *"


def test_the_arguments_of_engines_are_in_the_report():
    eager = replace(made_up(), engine_args={"enforce_eager": True}, repeats=3, most=512)
    text = report.markdown(eager)
    assert "--max-batch 512 --repeats 3 --engine-args '{\"enforce_eager\": true}'" in text
    assert "default compilation" not in text and "default compilation" in report.markdown(made_up())


def test_a_model_without_known_sizes_has_no_floor_and_a_report():
    config = {**SHAPES["llama-3-8b"].config(), "architectures": ["OtherForCausalLM"]}
    other = replace(made_up(), config=config)
    ours = other.engines[1]
    assert other.cache_gib(ours, ours.measured[0]) is None
    assert other.share_of_floor(ours, ours.measured[0]) is None
    assert report.markdown(other) and plot.figure(other)


def test_the_picture_has_a_line_a_format_and_plain_ticks():
    drawn = plot.figure(made_up())
    speed, memory = drawn.axes
    assert (
        [len(line.get_xdata()) for line in speed.lines]
        == [2, 2]
        == [len(line.get_xdata()) for line in memory.lines]
    )
    assert [tick.get_text() for tick in speed.get_xticklabels()] == ["64", "256"]
    assert speed.get_ylim()[0] == 0


# What is written down, and runs that go on


def test_a_cut_line_is_left_out_and_a_damaged_one_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    assert read(file) == (None, [])
    whole = Line(measured=measured(4, 100.0)).model_dump_json() + "\n"
    file.write_text(whole + whole[:20])
    assert read(file) == (None, [measured(4, 100.0)])
    zero = whole.replace('"batch":4', '"batch":0')
    for damaged in (b'{"measured": 3}\n', b"\xff\xfe\n", zero.encode(), b"\n"):
        file.write_bytes(damaged)
        with pytest.raises(BenchError, match="begin anew: --resume never"):
            read(file)


def prepare(checked):
    with opened(checked.job.work_dir):
        run._prepare(checked, {"packages": {}, "gpus": None})


def job(tmp_path, **options):
    return check_job(Job(model=str(TINY), work_dir=tmp_path / "work", formats=("bf16",), **options))


def test_a_run_goes_on_only_with_results_of_its_own_kind(tmp_path):
    checked = job(tmp_path)
    prepare(checked)
    records = tmp_path / "work" / "bf16.jsonl"
    records.write_text(Line(measured=measured(4, 100.0)).model_dump_json() + "\n")
    prepare(job(tmp_path, batches=("2", "full"), lengths=(Lengths(8, 1528),)))
    for other in (
        {"engine_args": {"enforce_eager": True}},
        {"most": 1024},  # and so other graphs, and another pool
        {"lengths": (Lengths(1024, 513),)},
    ):
        with pytest.raises(
            BenchError, match=r"another model, engine, GPU or version.*--resume never"
        ):
            prepare(job(tmp_path, **other))
    assert records.exists()
    prepare(job(tmp_path, engine_args={"enforce_eager": True}, resume="never"))
    assert not records.exists()
    with pytest.raises(BenchError, match="nothing to go on with"):
        prepare(job(tmp_path, resume="required"))


def test_only_cases_that_are_asked_for_are_taken_over(tmp_path):
    checked = job(tmp_path, batches=("2", "999", "full"))
    prepare(checked)
    facts = Facts(pool_blocks=96 * 16, block_tokens=16, start_seconds=1.0)
    records = tmp_path / "work" / "bf16.jsonl"
    lines = [Line(facts=facts), *(Line(measured=measured(b, 10.0)) for b in (16, 8, 2))]
    records.write_text("".join(f"{line.model_dump_json()}\n" for line in lines))
    (found,) = (run._engine(one, tmp_path / "work", None, quiet=True) for one in checked.subjects)
    assert [one.batch for one in found.measured] == [16, 2]
    assert found.too_large == (
        "batches that its pool of 24,576 tokens does not hold: 999 at 1024/512"
    )


def test_where_no_batch_fits_the_reason_is_said(tmp_path, monkeypatch):
    checked = job(tmp_path, batches=("999",))
    prepare(checked)
    facts = Facts(pool_blocks=96, block_tokens=16, start_seconds=1.0)
    (tmp_path / "work" / "bf16.jsonl").write_text(f"{Line(facts=facts).model_dump_json()}\n")
    monkeypatch.setattr(run, "_limits", lambda *_: ("A", None))
    monkeypatch.setattr(run, "describe", lambda: {"packages": {}, "gpus": None})
    with pytest.raises(BenchError, match=r"bf16: batches that its pool of 1,536 .* 999 at 1024/5"):
        run.measure(checked, quiet=True)


def test_the_limits_of_another_card_are_not_taken_over(tmp_path, monkeypatch):
    times = []
    monkeypatch.setattr(
        run, "_measure_limits", lambda: times.append(1) or {"device": "A", "copy_rate": None}
    )
    work = tmp_path / "work"
    work.mkdir()
    here = {"packages": {}, "gpus": [{"name": "A"}]}
    asked = Job(model=str(TINY), work_dir=work)
    for written in ("", '{"dev', '{"device": "B", "copy_rate": 8e12, "operations": {}}'):
        (work / "limits.json").write_text(written)
        assert run._limits(asked, here, True) == ("A", None)
    assert run._limits(asked, here, True) == ("A", None) and len(times) == 3
    run._limits(replace(asked, resume="never"), here, True)
    run._limits(asked, {**here, "gpus": [{"name": "B"}]}, True)
    assert len(times) == 5


def test_a_folder_of_others_and_one_in_use_are_refused(tmp_path):
    foreign = tmp_path / "models"
    (foreign / "w8a8").mkdir(parents=True)
    with pytest.raises(BenchError, match="has files that are not of a benchmark"), opened(foreign):
        pass
    ours = tmp_path / "ours"
    with opened(ours), pytest.raises(BenchError, match="another run is in it"), opened(ours):
        pass
    with opened(ours):
        pass
    close(ours)
    assert not ours.exists()


def test_an_engine_with_nothing_left_to_measure_does_not_start(tmp_path, capsys, monkeypatch):
    checked = job(tmp_path, batches=("4",), engine_args={"x": 1})
    prepare(checked)
    facts = Facts(pool_blocks=500, block_tokens=16, start_seconds=1.0)
    records = tmp_path / "work" / "bf16.jsonl"
    lines = (Line(facts=facts), Line(measured=measured(4, 100.0)))
    records.write_text("".join(f"{line.model_dump_json()}\n" for line in lines))
    monkeypatch.setattr(subprocess, "Popen", None)
    (found,) = (run._engine(one, tmp_path / "work", None, quiet=False) for one in checked.subjects)
    assert found.measured == (measured(4, 100.0),) and found.left_out is None
    assert "bf16: measured earlier" in capsys.readouterr().err


def test_the_reason_of_a_failure_is_the_first_cause_in_the_log(tmp_path):
    log = tmp_path / "a.log"
    log.write_text(
        "INFO fine\n(EngineCore pid=3) ERROR torch.OutOfMemoryError: CUDA out of memory.\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert process.reason(log, 1) == "torch.OutOfMemoryError: CUDA out of memory."
    log.write_text(
        "(Worker pid=4) ERROR AssertionError: num_heads (2) is not divisible by num_kv_heads (3)\n"
        "Exception: WorkerProc initialization failed. See stack trace for root cause.\n"
    )
    assert process.reason(log, 1).startswith("AssertionError: num_heads (2) is not divisible")
    log.write_text(
        "(APIServer pid=4) x.ValidationError: 1 validation error for ParallelConfig\n"
        "(APIServer pid=4) size\n(APIServer pid=4)   Input should be one [type=int, input_value=2]"
        "\n    For further information visit the page\n"
    )
    said = "x.ValidationError: 1 validation error for ParallelConfig size Input should be one"
    assert process.reason(log, 1) == said
    log.write_text("RuntimeError: Engine core initialization failed. See root cause above.\n")
    assert "initialization failed" in process.reason(log, 1)
    log.write_text("Killed\n")
    assert process.reason(log, -9).startswith("the process ended with -9")


def test_files_are_deleted_when_all_is_measured(tmp_path):
    checked = job(tmp_path, batches=("4", "999"))
    work = tmp_path / "work"
    prepare(checked)
    (work / "limits.json").write_text("{}")
    run.clean(checked, replace(made_up(), engines=(engine("bf16", left_out="no time"),)))
    assert {path.name for path in work.iterdir()} == {
        *("bf16", "bf16.json", "limits.json", "vllm-qoq-bench.lock")
    }
    (work / "mine.txt").write_text("")
    # That a batch does not fit is no reason to go on.
    done = replace(engine("bf16", measured(4, 1.0)), too_large="999")
    run.clean(checked, replace(made_up(), engines=(done,)))
    assert [path.name for path in work.iterdir()] == ["mine.txt"]


CHILD = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(f"{child.pid} ")
time.sleep(60)
"""
"""A program that starts another, and writes its number to a file."""


def number_in(file):
    while not (file.exists() and file.read_text().endswith(" ")):
        time.sleep(0.02)
    return int(file.read_text())


def wait_for_the_end_of(pid):
    child, deadline = Path(f"/proc/{pid}/stat"), time.monotonic() + 20
    while child.exists() and ") Z " not in child.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_a_process_started_ends_with_it(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path / "pid")]
    with (tmp_path / "log").open("w") as log, process.session(command, log) as running:
        child = number_in(tmp_path / "pid")
    assert running.returncode == -signal.SIGKILL
    wait_for_the_end_of(child)


def test_a_killed_benchmark_leaves_no_engine_behind(tmp_path):
    code = (
        "import sys, time\nfrom vllm_qoq.bench.serving import process\n"
        "with open(sys.argv[1], 'w') as log, process.session(sys.argv[2:], log):\n"
        "    time.sleep(60)"
    )
    command = [sys.executable, "-c", CHILD, str(tmp_path / "pid")]
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "log", *command]) as parent:
        child = number_in(tmp_path / "pid")
        parent.kill()
    wait_for_the_end_of(child)


@pytest.mark.parametrize(
    ("code", "expected"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_the_exit_code_of_a_process_is_kept(code, expected, tmp_path):
    command = [sys.executable, "-c", code]
    with (tmp_path / "log").open("w") as log, process.session(command, log) as running:
        assert running.wait(30) == expected


def test_an_engine_is_stopped_when_the_time_is_over(tmp_path, capsys):
    checked = job(tmp_path)
    prepare(checked)
    ends = time.monotonic() + 0.2
    (found,) = (run._engine(one, tmp_path / "work", ends, quiet=True) for one in checked.subjects)
    assert found.left_out == "the time was over (--minutes)" and not found.measured
    (found,) = (run._engine(one, tmp_path / "work", ends, quiet=True) for one in checked.subjects)
    assert found.left_out == "no time was left (--minutes)"


# Mistakes of users


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to measure; name a MODEL or a --checkpoint"),
        (["llama-9-8b"], "llama-9-8b: is neither a folder nor a shape; shapes are llama-3-8b"),
        (["llama-3-8b", "--formats", "w2a8"], "'w2a8' is not a format"),
        (["llama-3-8b", "--formats", "w4a8-kvfp8"], "with w4a8 the cache is of 16, 8 or 4 bits"),
        (["llama-3-8b", "--batches", "0"], "'0' is not a list of batch sizes"),
        (["llama-3-8b", "--batches", "4096"], "--batches 4096 is more than --max-batch 2048"),
        (["llama-3-8b", "--lengths", "1024"], "'1024' is not a list of tokens in / tokens out"),
        (["llama-2-7b", "--lengths", "4000/97"], "llama-2-7b has a context of 4096 tokens"),
        (["llama-3-8b", "--minutes", "0"], "'0' is not a number of minutes above 0"),
        (["llama-3-8b", "--minutes", "nan"], "'nan' is not a number of minutes above 0"),
        (["llama-3-8b", "--engine-args", "[1]"], "'[1]' is not a JSON object"),
        (
            ["llama-3-8b", "--engine-args", '{"max_model_len": 9}'],
            "max_model_len is what the bench",
        ),
        (["llama-3-8b", "--engine-args", '{"dtype": "auto"}'], "dtype is what the benchmark gives"),
        (["--formats", "bf16", "--checkpoint", "a=b"], "--formats: are formats of a MODEL"),
        (["--checkpoint", "limits=DIR"], "but not limits"),
        (["--checkpoint", "mine"], "'mine' is not NAME=DIR"),
        (["--checkpoint", "a/b=DIR"], "'a/b=DIR' is not NAME=DIR"),
        (["--checkpoint", "mine=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_before_an_engine_starts(arguments, said, command, tmp_path):
    code, _, err = command(*arguments, "--work-dir", tmp_path / "work")
    assert code == 2 and said in err
    assert not (tmp_path / "work").exists()


def test_a_quantized_model_and_a_name_that_is_there_twice_are_refused(command, tmp_path):
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    config = formats.parse("w8a8").config(SHAPES["llama-2-7b"].config())
    (quantized / "config.json").write_text(json.dumps(config))
    work = ("--work-dir", tmp_path / "work")
    code, _, err = command(quantized, *work)
    assert code == 2 and f"--checkpoint NAME={quantized}" in err
    code, _, err = command("llama-2-7b", "--checkpoint", f"fp8-kvfp8={quantized}", *work)
    assert code == 2 and "a name is there twice" in err


def test_results_need_a_place(command):
    code, _, err = command("llama-3-8b")
    assert code == 2 and "name a folder: -o OUT, or --work-dir DIR" in err
    code, _, err = command("llama-3-8b", "-o", "/")
    assert code == 2 and "-o /: is no folder to make" in err


@pytest.mark.parametrize("size", [None, "big", -3, 0, True, 1 << 40])
def test_a_vocabulary_that_is_no_number_is_refused(size, command, tmp_path):
    config = {**SHAPES["llama-2-7b"].config(), "vocab_size": size}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = command(tmp_path, "--work-dir", tmp_path / "work")
    assert code == 2 and "is not a number of tokens" in err
    assert f"error: {tmp_path / 'config.json'}: vocab_size: " in err


def test_two_checkpoints_of_one_name_are_refused(command, tmp_path):
    twice = ("--checkpoint", f"x={TINY}", "--checkpoint", f"x={TINY}")
    code, _, err = command(*twice, "--work-dir", tmp_path / "work")
    assert code == 2 and "a name is there twice" in err


def test_a_checkpoint_without_weights_gets_dummies(tmp_path):
    folder = tmp_path / "only-config"
    folder.mkdir()
    how = formats.parse("nested-kv4")
    (folder / "config.json").write_text(json.dumps(how.config(SHAPES["llama-2-7b"].config())))
    checked = check_job(
        Job(model=None, work_dir=tmp_path, checkpoints=(("mine", folder), ("tiny", TINY)))
    )
    mine, tiny = checked.subjects
    assert mine.is_ours and mine.request.engine_args["load_format"] == "dummy"
    assert not tiny.is_ours and "load_format" not in tiny.request.engine_args
    assert (mine.weights_in_words, tiny.weights_in_words) == (" with dummy weights", "")
    found = [identity(mine)]
    for content in (b"", b"more"):
        (folder / "model.safetensors").write_bytes(content)
        found.append(identity(mine))
    os.utime(folder / "model.safetensors", (1, 1))
    found.append(identity(mine))
    assert all(found.count(one) == 1 for one in found)


# Tables of several runs


def write_run(folder, found):
    folder.mkdir()
    (folder / "serving.json").write_text(json.dumps(result.to_json(found)))
    return folder


def test_runs_of_several_models_become_one_table(table_command, tmp_path):
    first = write_run(tmp_path / "a", made_up())
    second = write_run(tmp_path / "b", made_up("llama-2-7b", ours=20000.0, peer=10000.0))
    code, out, err = table_command(first, second / "serving.json", "-o", tmp_path / "out")
    assert code == 0, err
    assert "1.50x to 2.00x the tokens a second of vLLM's fp8-kvfp8, 2 models on one Some" in out
    row = next(line for line in out.splitlines() if line.startswith("| llama-2-7b"))
    assert [cell.strip() for cell in row.split("|")][-3] == "2.00"
    document = json.loads((tmp_path / "out" / "table.json").read_text())
    limits = [row["speedup_at_our_floor"] for row in document["models"]]
    shares = [row["ours"]["share"] for row in document["models"]]
    assert limits == pytest.approx([1.5 / shares[0], 2 / shares[1]])


def test_the_picture_of_a_table_has_two_bars_a_model(tmp_path):
    one = write_run(tmp_path / "a", made_up())
    drawn = table_plot.figure(table.read([one], "1024/512"))
    assert sorted(bar.get_width() for bar in drawn.axes[0].patches) == [12000.0, 18000.0]
    assert plots.title_of(drawn).startswith("1.50x the tokens a second")
    one = write_run(tmp_path / "b", made_up(peer=90000.0))
    drawn = table_plot.figure(table.read([one], "1024/512"))
    assert drawn.axes[0].get_xlim()[1] > 90000.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib says so where one model has too little room
        drawn.draw_without_rendering()


def test_runs_that_do_not_compare_are_refused(table_command, tmp_path):
    one = write_run(tmp_path / "a", made_up())
    other = write_run(tmp_path / "b", made_up(device="Another GPU"))
    half = write_run(tmp_path / "c", replace(made_up(), engines=made_up().engines[:1]))
    code, _, err = table_command(one, other)
    assert code == 2 and "was measured on Some GPU" in err and "Another GPU" in err
    code, _, err = table_command(one, half)
    assert code == 2 and f"{half}: has no format of ours with lengths 1024/512" in err
    code, _, err = table_command(one, "--lengths", "8/8")
    assert code == 2 and "has no format of ours with lengths 8/8" in err
    split = replace(made_up("llama-2-7b"), engine_args={"tensor_parallel_size": 2})
    code, _, err = table_command(one, write_run(tmp_path / "d", split))
    assert code == 2 and "with --engine-args {}" in err and "compare runs that are alike" in err
    old = replace(made_up("llama-2-7b"), environment={"packages": {"vllm": "0.5.0"}})
    code, _, err = table_command(one, write_run(tmp_path / "e", old))
    assert code == 2 and "with vLLM 0.26.0" in err and "with vLLM 0.5.0" in err
    code, _, err = table_command(one, one / "serving.json")
    assert code == 2 and "llama-3-8b: is there twice" in err
    code, _, err = table_command(tmp_path)
    assert code == 2 and "has no serving.json" in err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", 3),
        ("benchmark", "online"),
        ("tokens_per_second", "NaN"),
        ("tokens_per_second", 0),
        ("share_of_floor", -5),
    ],
)
def test_a_run_with_impossible_values_is_refused(key, value, table_command, tmp_path):
    one = write_run(tmp_path / "a", made_up()) / "serving.json"
    document = json.loads(one.read_text())
    place = document if key in document else document["engines"][0]["cases"][0]
    place[key] = float("nan") if value == "NaN" else value
    one.write_text(json.dumps(document))
    code, _, err = table_command(one)
    assert code == 2 and str(one) in err and key in err


def test_text_of_others_breaks_no_table_and_no_picture(table_command, tmp_path):
    one = write_run(tmp_path / "a", made_up()) / "serving.json"
    document = json.loads(one.read_text())
    document["model"] = "$\\foo$|\x1b[31mred"
    one.write_text(json.dumps(document))
    code, out, err = table_command(one, "-o", tmp_path / "out")
    assert code == 0, err
    assert "\x1b" not in out and "\\|" in out


def test_an_engine_on_several_cards_is_not_said_to_be_on_one(tmp_path):
    split = replace(made_up(), engine_args={"tensor_parallel_size": 2})
    found = table.read([write_run(tmp_path / "a", split)], "1024/512")
    assert "1 models" not in table.finding(found) and "on several Some GPU" in table.finding(found)
    assert "on several Some GPU" in " ".join(text.get_text() for text in plot.figure(split).texts)


def test_nothing_heavy_is_imported_for_help():
    code = (
        "import sys; from vllm_qoq.cli import main; sys.argv = ['vllm-qoq', 'bench', 'serving', "
        "'--help']\ntry: main.main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'vllm', 'pydantic', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


class Worker(RandomWeights):
    """A worker of vLLM with this model."""

    def __init__(self, model):
        self.model = model

    def get_model(self):
        return self.model


def test_dummy_weights_of_vllms_formats_become_random_and_ours_stay():
    dtypes = (torch.int8, torch.int32, torch.float8_e4m3fn, torch.bfloat16)
    layers = [torch.nn.Module() for _ in (*dtypes, "ours")]
    for layer, dtype in zip(layers, (*dtypes, torch.int8), strict=True):
        name = "weight_packed" if dtype == torch.int32 else "weight"
        # Some kernels of vLLM have a weight as a view that is not contiguous.
        zeros = torch.zeros(2000, 64, dtype=dtype).t().contiguous().t()
        layer.register_parameter(name, torch.nn.Parameter(zeros, requires_grad=False))
    layers[-1].quant_method = type("Ours", (), {"__module__": "vllm_qoq.serving"})()
    assert Worker(torch.nn.ModuleList(layers)).fill_random_weights() == 3
    int8, int32, fp8, *untouched = (next(layer.parameters()) for layer in layers)
    assert int8.min() == -127 and int8.max() == 127
    assert len(int32.unique()) > 100_000
    assert fp8.float().isfinite().all() and 90 < fp8.float().std() < 110
    assert not any(weight.any() for weight in untouched)

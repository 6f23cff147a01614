"""`vllm-qoq tune`: the choice, the files, mistakes of users, and one run through vLLM."""

import contextlib
import itertools
import json
import os
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import warm_process
from hypothesis import given
from hypothesis import strategies as st
from plugin_units import scheme

from vllm_qoq.checkpoint import writer
from vllm_qoq.checkpoint.format import Section
from vllm_qoq.cli import main as cli
from vllm_qoq.cli import measurement as command
from vllm_qoq.measuring.host import host_seconds
from vllm_qoq.routing.table import Phase, Routing, Step
from vllm_qoq.tuner import TuneError, device, job, memory
from vllm_qoq.tuner.accuracy import SetBits, accuracy_order, bits
from vllm_qoq.tuner.choose import choose, fastest
from vllm_qoq.tuner.engine import LayerGroup
from vllm_qoq.tuner.measure import check, checked_batches, measure
from vllm_qoq.tuner.measurements import (
    PREFILL_TOKENS,
    Estimates,
    Key,
    Measurements,
    decode_batches,
)
from vllm_qoq.tuner.preferences import SLOWER
from vllm_qoq.tuner.report import crossings

QOQ = {"quant_method": "qoq_linear", "group_size": 128}
SETS = {"w4a8": QOQ, "w8a8": scheme(8), "w4a16": scheme(4)}
ORDER = ("w8a8", "w4a16", "w4a8")
RULE = {"match": "*.0.mlp.*", "decode": "w4a16"}
KEY = Key(device="Some GPU", tensor_parallel_size=1, vllm_qoq="1", vllm="2", checkpoint="abc")


# The choice


def decode_step(batch):
    return Step(Phase.DECODE, batch)


@st.composite
def estimates(draw):
    """Of up to four sets named in the order of accuracy, often with ties and near-ties."""
    sets = ("a", "b", "c", "d")[: draw(st.integers(1, 4))]
    near = st.sampled_from([1.0, 1.01, 1.02, 1.03, 1.05, 1.06, 1.25, 1.3, 2.0])
    seconds = near | st.floats(1e-6, 1e3)

    def rows(sizes):
        return {size: {name: draw(seconds) for name in sets} for size in sizes}

    decode = draw(st.lists(st.integers(1, 2000), min_size=1, max_size=12, unique=True))
    prefill = draw(st.lists(st.integers(1, 9000), min_size=1, max_size=3, unique=True))
    return sets, Estimates(rows(decode), rows(prefill))


PREFERENCES = st.sampled_from(sorted(SLOWER))


@given(estimates(), PREFERENCES)
def test_every_batch_has_the_most_accurate_set_that_is_fast_enough(case, prefer):
    sets, measured = case
    routing = choose(measured, sets, prefer)
    assert Routing.parse(routing.to_json(), sets) == routing
    route = routing.route([])
    for batch, seconds in [*measured.decode.items(), (None, measured.prefill_per_token())]:
        chosen = routing.prefill if batch is None else route.choose(decode_step(batch))
        limit = min(seconds.values()) * (1 + SLOWER[prefer])
        assert seconds[chosen] <= limit
        assert all(seconds[name] > limit for name in sets[: sets.index(chosen)])
    largest = max(measured.decode)
    assert route.choose(decode_step(largest)) == route.choose(decode_step(10 * largest))


@given(estimates(), PREFERENCES, st.randoms())
def test_the_choice_does_not_depend_on_the_order_of_the_measurements(case, prefer, random):
    sets, measured = case

    def shuffled(table):
        keys = list(table)
        random.shuffle(keys)
        return {key: shuffled(table[key]) if isinstance(key, int) else table[key] for key in keys}

    other = Estimates(shuffled(measured.decode), shuffled(measured.prefill))
    assert choose(other, sets, prefer) == choose(measured, sets, prefer)


@given(estimates(), st.integers(1, 3000))
def test_more_preference_for_accuracy_never_takes_a_less_accurate_set(case, batch):
    sets, measured = case
    routings = [choose(measured, sets, prefer) for prefer in ("accuracy", "balanced", "speed")]
    ranks = [sets.index(routing.route([]).choose(decode_step(batch))) for routing in routings]
    assert ranks == sorted(ranks)
    assert (prefill := [sets.index(routing.prefill) for routing in routings]) == sorted(prefill)


@given(estimates(), PREFERENCES)
def test_neighbouring_rows_differ(case, prefer):
    sets, measured = case
    for rows in (choose(measured, sets, prefer).decode, fastest(measured, sets)):
        names = [row.set_name for row in rows]
        assert all(a != b for a, b in itertools.pairwise(names))
        assert {row.max_batch for row in rows[:-1]} <= set(measured.decode)


def two_sets(accurate, fast):
    """Decode times of two sets at batches 1, 2, 4, ..."""
    rows = {
        2**i: {"w8a8": a, "w4a8": b} for i, (a, b) in enumerate(zip(accurate, fast, strict=True))
    }
    return Estimates(rows, {512: {"w8a8": 1.0, "w4a8": 1.0}})


@pytest.mark.parametrize(
    "prefer, table",
    [
        ("speed", [(8, "w4a8"), (None, "w8a8")]),
        ("balanced", [(4, "w4a8"), (None, "w8a8")]),
        ("accuracy", [(1, "w4a8"), (None, "w8a8")]),
    ],
)
def test_preferences_move_the_crossing(prefer, table):
    measured = two_sets([2.0, 1.2, 1.06, 1.03, 1.015, 0.9], [1.0] * 6)
    routing = choose(measured, ("w8a8", "w4a8"), prefer)
    assert [(row.max_batch, row.set_name) for row in routing.decode] == table
    assert routing.prefill == "w8a8", "a tie goes to the more accurate set"


def test_layer_rules_are_kept_as_they_are():
    rules = Routing.parse({"prefill": "w8a8", "decode": "w8a8", "layers": [RULE]}, SETS).layers
    routing = choose(two_sets([1.0], [0.5]), ("w8a8", "w4a8"), "speed", rules)
    assert routing.to_json()["layers"][0]["match"] == RULE["match"]
    assert [row.set_name for row in routing.decode] == ["w4a8"]


def test_the_prefill_set_is_the_fastest_a_token_over_all_sizes():
    prefill = {512: {"w8a8": 2.0, "w4a8": 1.0}, 8192: {"w8a8": 1.0, "w4a8": 20.0}}
    per_token = Estimates({}, prefill).prefill_per_token()
    assert per_token["w8a8"] == pytest.approx((2 / 512 + 1 / 8192) / 2)
    measured = Estimates(two_sets([1.0], [1.0]).decode, prefill)
    assert choose(measured, ("w8a8", "w4a8"), "speed").prefill == "w8a8"


def test_crossings_name_the_measured_neighbours():
    measured = two_sets([3.0, 2.0, 1.0, 1.0], [1.0, 1.0, 2.0, 2.0])
    rows = fastest(measured, ("w8a8", "w4a8"))
    assert crossings(rows, list(measured.decode)) == "w4a8 up to 2, w8a8 from 4"
    assert crossings(rows[-1:], list(measured.decode)) == "w8a8 always"


# Accuracy and sizes


@pytest.mark.parametrize(
    "config, expected",
    [
        (QOQ, SetBits(4, 8)),
        (scheme(8), SetBits(8, 8)),
        (scheme(4), SetBits(4, 16)),
        ({"quant_method": "gptq", "bits": 8}, SetBits(8, 16)),
        ({"quant_method": "awq", "w_bit": 4}, SetBits(4, 16)),
        ({"quant_method": "fp8"}, SetBits(8, 8)),
    ],
)
def test_bits_are_read_from_the_config(config, expected):
    assert bits("one", config) == expected


def test_sets_with_more_bits_are_more_accurate():
    eight = {"quant_method": "gptq", "bits": 8}
    assert accuracy_order({**SETS, "g8": eight}) == ("g8", *ORDER)
    assert accuracy_order({"b": QOQ, "a": QOQ}) == ("b", "a"), "equal: the checkpoint's order"


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "magic\x1b"},
        {"quant_method": "gptq", "bits": "4"},
        {"quant_method": "gptq", "bits": True},
        {"quant_method": "awq"},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {"quant_method": "compressed-tensors", "config_groups": {"g": 3}},
    ],
)
def test_a_set_of_unknown_bits_is_refused(config):
    with pytest.raises(TuneError, match=r"set 'one' .*by hand") as refused:
        bits("one", config)
    assert str(refused.value).isprintable()


def test_measured_batches_end_at_the_largest():
    assert decode_batches(1) == (1,)
    assert decode_batches(100) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)


# Measuring, with an engine that makes up its times


class MadeUp:
    """Two shapes. w4a8 is fastest up to 16, w4a16 up to 64, w8a8 above and in prefill."""

    def __init__(self, steps=None, stop_at=None):
        self.calls, self.steps, self.stop_at = [], steps or {}, stop_at

    def layers(self):
        return [LayerGroup("m.0.qkv_proj", 96, 64, 2), LayerGroup("m.0.down_proj", 64, 128, 2)]

    def linear_seconds(self, layers, set_name, tokens):
        self.calls.append((layers.name, set_name, tokens))
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        base, slope = {"w4a8": (1, 0.1), "w4a16": (2, 0.04), "w8a8": (4, 0.01)}[set_name]
        return 1e-3 * (base + slope * tokens)

    def head_seconds(self, tokens):
        return 1e-4

    def step_seconds(self, routing, batch):
        used = routing.route([]).choose(decode_step(batch))
        is_routed = len(routing.decode) > 1
        return self.steps.get((batch, "routed" if is_routed else used), 1e-2)


def measured_by(engine, key=KEY, max_batch=128):
    return measure(engine, key, tuple(SETS), decode_batches(max_batch), PREFILL_TOKENS, quiet=True)


def test_a_step_is_the_sum_of_its_layers_and_the_head():
    engine = MadeUp()
    found = measured_by(engine).estimates()
    assert found.decode[8]["w4a8"] == pytest.approx(4 * 1e-3 * 1.8 + 1e-4)
    assert found.prefill[512]["w8a8"] == pytest.approx(4 * 1e-3 * 9.12)
    assert len(engine.calls) == len(set(engine.calls)), "nothing is measured twice"
    assert {m for _, _, m in engine.calls} == {*decode_batches(128), *PREFILL_TOKENS}


def test_the_check_covers_first_middle_and_last_rows():
    decode = decode_batches(256)
    table = [{"max_batch": 2 ** (i + 1), "set": ORDER[i % 2]} for i in range(5)]
    many = Routing.parse({"prefill": "w8a8", "decode": [*table, {"set": "w4a8"}]}, SETS)
    assert checked_batches(many, decode) == [2, 16, 256]
    assert checked_batches(Routing.forced("w8a8"), decode) == [1, 256]
    assert checked_batches(Routing.forced("w8a8"), [1]) == [1]


def test_batches_that_the_cache_does_not_hold_are_left_out_of_the_check():
    class Small(MadeUp):
        def step_seconds(self, routing, batch):
            return None if batch > 64 else super().step_seconds(routing, batch)

    found = check(Small(), Routing.forced("w8a8"), ORDER, (1, 128), quiet=True)
    assert set(found.routed) == {1} and set(found.step_seconds[1]) == set(ORDER)


def test_a_step_that_something_else_made_slow_is_measured_again():
    class Disturbed(MadeUp):
        count = 0

        def step_seconds(self, routing, batch):
            self.count += 1
            return super().step_seconds(routing, batch) * (3 if self.count == 1 else 1)

    engine = Disturbed()
    found = check(engine, Routing.forced("w4a8"), ORDER, (1,), quiet=True)
    assert found.slowdown(1) < 0.1 and engine.count == 2 * (1 + len(ORDER))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_cpu_writes_its_routing_only_when_asked():
    with pytest.raises(TuneError, match=r"no GPU.*--dry-run.*--on-cpu"):
        device.check_consent(writes=True, on_cpu=False)
    device.check_consent(writes=True, on_cpu=True)
    device.check_consent(writes=False, on_cpu=False)


def test_the_cpu_timer_calls_all_in_turn_and_takes_the_median(monkeypatch):
    order, clock = [], iter([0, 4, 10, 12, 20, 22])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("vllm_qoq.measuring.host._LONG_SECONDS", 100)
    assert host_seconds([lambda: order.append("a"), lambda: order.append("b")]) == 1
    assert order == ["a", *"ab" * 3]


# Files


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with config.json alone: all that `tune` reads itself."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    routing = {"prefill": "w4a8", "decode": [{"set": "w4a8"}], "layers": [RULE]}
    section = Section.parse({"sets": SETS, "routing": routing}).to_json()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "rms_norm_eps": 1e-05,
        "quantization_config": section,
        "name": "Zoë \ud83d",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def run(monkeypatch, capfd):
    """run(ENGINE, ARGUMENTS...): exit code, stdout, stderr. Without an engine, none may start."""
    monkeypatch.setattr(device, "check_sets", lambda methods: None)
    monkeypatch.setattr(device, "check_consent", lambda **asked: None)
    monkeypatch.setattr(device, "name", lambda: "Some GPU")
    monkeypatch.setattr(command, "stdout_for", lambda file: contextlib.nullcontext(sys.stdout))

    def call(engine, *arguments):
        def open_engine(folder, sets, max_batch, tensor_parallel_size):
            assert engine is not None, "an engine was started"
            assert sets == tuple(SETS) and tensor_parallel_size == 1
            return engine

        monkeypatch.setattr(job, "open_engine", open_engine)
        monkeypatch.setattr(sys, "argv", ["vllm-qoq", "tune", *map(str, arguments)])
        try:
            code = cli.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return call


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_only_the_routing_of_the_config_changes(checkpoint, run):
    before = config_of(checkpoint)
    (checkpoint / "config.json").chmod(0o640)
    code, out, _ = run(MadeUp(), checkpoint, "--max-batch", 128)
    assert code == 0
    after = config_of(checkpoint)
    routing = after["quantization_config"].pop("routing")
    old = before["quantization_config"].pop("routing")
    assert list(after) == list(before) and after == before
    assert routing["prefill"] == "w8a8" and routing["layers"] == old["layers"]
    assert [(row.get("max_batch"), row["set"]) for row in routing["decode"]] == [
        (8, "w4a8"),
        (48, "w4a16"),
        (None, "w8a8"),
    ]
    assert stat.S_IMODE((checkpoint / "config.json").stat().st_mode) == 0o640
    assert set(content(checkpoint)) == {"config.json", memory.FILE}, "nothing else is left behind"
    assert "Fastest: w4a8 up to 16, w4a16 from 24 up to 64, w8a8 from 96." in out
    assert "Chosen: w4a8 up to 8, w4a16 from 16 up to 48, w8a8 from 64." in out
    assert "1 layer rules of the old routing stay" in out


def test_sensitive_layers_are_kept_and_keeping_them_again_changes_nothing(checkpoint, run):
    rows = [
        {"layer": f"model.layers.{i}.mlp.up_proj", "set": name, "output_error": error}
        for i, errors in enumerate([(0.01, 0.1), (0.01, 0.3), (0.02, 0.2)])
        for name, error in zip(("w8a8", "w4a8"), errors, strict=True)
    ]
    (checkpoint / "quantization_report.json").write_text(json.dumps({"layers": rows}))
    code, out, _ = run(MadeUp(), checkpoint, "--keep-sensitive", "2")
    kept = [{"match": f"model.layers.{i}.*", "decode": [{"set": "w8a8"}]} for i in (1, 2)]
    layers = config_of(checkpoint)["quantization_config"]["routing"]["layers"]
    assert (
        code == 0 and layers[:2] == kept and [rule["match"] for rule in layers[2:]] == ["*.0.mlp.*"]
    )
    assert "2 decoder layers generate in the most accurate set" in out
    code, _, _ = run(None, checkpoint, "--keep-sensitive", "2")
    assert code == 0
    assert config_of(checkpoint)["quantization_config"]["routing"]["layers"] == layers


def test_layer_rules_go_when_asked(checkpoint, run):
    code, out, _ = run(MadeUp(), checkpoint, "--drop-layer-rules")
    assert code == 0 and "layer rules" not in out
    assert "layers" not in config_of(checkpoint)["quantization_config"]["routing"]


def test_a_load_is_kept_and_its_sets_count_as_reached(checkpoint, run):
    arguments = (checkpoint, "--max-batch", 8, "--drop-layer-rules", "--prefer", "speed")
    _, out, _ = run(MadeUp(), *arguments)
    assert "not reached, so not loaded when serving: w4a16" in out and "'load'" not in out
    config = config_of(checkpoint)
    load = {"enter": 8, "leave": 2, "prefill": "w4a16"}
    config["quantization_config"]["routing"]["load"] = load
    (checkpoint / "config.json").write_text(json.dumps(config))
    code, out, _ = run(MadeUp(), *arguments)
    assert code == 0 and "'load' of the old routing stays in force" in out
    assert config_of(checkpoint)["quantization_config"]["routing"]["load"] == load
    assert "not reached" not in out


def test_the_second_run_remembers_the_device(checkpoint, run):
    first = run(MadeUp(), checkpoint)[1]
    written = content(checkpoint)
    code, second, _ = run(None, checkpoint)
    assert code == 0 and content(checkpoint) == written
    assert first.replace("measured now", "measured before").split("\n- ")[0] in second
    assert "## Check" in second
    code, other, _ = run(None, checkpoint, "--prefer", "accuracy", "--max-batch", 64)
    assert code == 0 and "--again does it" in other and "## Check" not in other
    assert "| 96 " not in other


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--again"], ""),
        (["--max-batch", 512], "batches up to 256 of this device, but 512 is asked for"),
    ],
)
def test_what_is_not_remembered_is_measured(checkpoint, run, arguments, said):
    run(MadeUp(), checkpoint)
    engine = MadeUp()
    code, out, err = run(engine, checkpoint, *arguments)
    assert code == 0 and engine.calls and said in out and said in err


def test_another_device_is_measured_and_kept_beside(checkpoint, run, monkeypatch):
    run(MadeUp(), checkpoint)
    monkeypatch.setattr(device, "name", lambda: "Other GPU")
    engine = MadeUp()
    _, out, _ = run(engine, checkpoint)
    assert engine.calls and "on Other GPU" in out
    runs = memory.load(checkpoint)[0].runs
    assert [run.measured.key.device for run in runs] == ["Some GPU", "Other GPU"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"vllm": "1.0"}, "vLLM 1.0 instead of 2"),
        ({"vllm_qoq": "0"}, "vllm-qoq 0 instead of 1"),
        ({"tensor_parallel_size": 2}, "tensor-parallel size 2 instead of 1"),
        ({"checkpoint": "def"}, "another config.json"),
    ],
)
def test_stale_measurements_are_not_used(change, said):
    old = measured_by(MadeUp(), KEY.model_copy(update=change))
    found, reason = memory.recall(
        memory.Memory(runs=(memory.MeasuredRun(measured=old),)), KEY, SETS, 8
    )
    assert found is None and said in reason


def test_measurements_of_the_same_device_are_replaced():
    known = memory.Memory().with_run(memory.MeasuredRun(measured=measured_by(MadeUp())))
    again = known.with_run(memory.MeasuredRun(measured=measured_by(MadeUp(), max_batch=8)))
    assert len(again.runs) == 1 and again.runs[0].measured.decode[-1] == 8
    many = known
    for i in range(20):
        key = KEY.model_copy(update={"device": str(i)})
        many = many.with_run(memory.MeasuredRun(measured=measured_by(MadeUp(), key, 1)))
    assert [run.measured.key.device for run in many.runs] == [str(i) for i in range(4, 20)]


def spoil(change):
    """The text of a memory file of one run after `change` of its JSON."""
    run = memory.MeasuredRun(measured=measured_by(MadeUp(), max_batch=8))
    document = json.loads(memory.Memory().with_run(run).model_dump_json())
    change(document, document["runs"][0]["measured"])
    return json.dumps(document)


UNSOUND = {
    "no JSON": "{",
    "a list": "[]",
    "deep": "[" * 100_000,
    "a newer format": spoil(lambda d, m: d.update(format_version=2)),
    "an unknown key": spoil(lambda d, m: m.update(code="x")),
    "a negative time": spoil(lambda d, m: m["shapes"][0]["seconds"]["w8a8"].update({"1": -1})),
    "infinite": spoil(lambda d, m: m["shapes"][0]["seconds"]["w8a8"].update({"1": 1e999})),
    "a time missing": spoil(lambda d, m: m["shapes"][0]["seconds"]["w8a8"].pop("1")),
    "a set missing": spoil(lambda d, m: m["shapes"][0]["seconds"].pop("w8a8")),
    "a count that overflows": spoil(lambda d, m: m["shapes"][0].update(count=10**400)),
    "no shape": spoil(lambda d, m: m.update(shapes=[])),
    "no head at some size": spoil(lambda d, m: m["head_seconds"].pop("8")),
    "out of order": spoil(lambda d, m: m["decode"].reverse()),
    "a check of other sets": spoil(
        lambda d, m: d["runs"][0].update(
            check={"routing": {}, "routed": {"1": 1}, "step_seconds": {"1": {"x": 1}}}
        )
    ),
}


@pytest.mark.parametrize("text", UNSOUND.values(), ids=UNSOUND)
def test_an_unsound_memory_is_ignored_with_the_reason(tmp_path, text):
    (tmp_path / memory.FILE).write_text(text)
    found, reason = memory.load(tmp_path)
    assert found == memory.Memory() and reason.startswith("qoq_tune.json is of no use")


def test_a_sound_memory_survives_the_file(tmp_path):
    known = memory.Memory().with_run(memory.MeasuredRun(measured=measured_by(MadeUp())))
    memory.save(tmp_path, known)
    assert memory.load(tmp_path) == (known, None)
    wanted = memory.recall(known, KEY, SETS, 64)[0]
    assert wanted.measured.decode == decode_batches(64)
    Measurements.model_validate(wanted.measured.model_dump())


def test_measurements_of_other_sets_are_not_used():
    known = memory.Memory().with_run(memory.MeasuredRun(measured=measured_by(MadeUp())))
    found, reason = memory.recall(known, KEY, ["w8a8", "evil"], 64)
    assert found is None and "other sets" in reason


def test_an_unsound_memory_is_measured_anew_and_replaced(checkpoint, run):
    (checkpoint / memory.FILE).write_text("{")
    engine = MadeUp()
    code, out, err = run(engine, checkpoint)
    assert code == 0 and engine.calls
    assert "of no use" in out and "of no use" in err
    assert memory.load(checkpoint)[1] is None


def test_a_dry_run_leaves_the_checkpoint_as_it_is(checkpoint, run):
    before = content(checkpoint)
    code, out, _ = run(MadeUp(), checkpoint, "--dry-run")
    assert code == 0 and content(checkpoint) == before
    assert "would be written" in out


@pytest.mark.parametrize("where", ["linear_seconds", "step_seconds"])
@pytest.mark.parametrize("of", [torch.OutOfMemoryError, RuntimeError], ids=["here", "in a rank"])
def test_a_gpu_without_enough_memory_is_named_and_nothing_is_written(
    checkpoint, run, where, of, monkeypatch
):
    def run_out(*_):
        raise of(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 4 GiB"
        )

    engine, before = MadeUp(), content(checkpoint)
    monkeypatch.setattr(engine, where, run_out)
    code, _, err = run(engine, checkpoint)
    assert code == 2
    assert "Tried to allocate 2.00 GiB); stop what else runs on it" in err
    assert "Traceback" not in err
    assert content(checkpoint) == before


def test_an_interrupted_run_leaves_the_checkpoint_as_it_is(checkpoint, run):
    before = content(checkpoint)
    assert run(MadeUp(stop_at=7), checkpoint)[0] == 130
    assert content(checkpoint) == before


def test_a_failing_write_leaves_the_old_config(checkpoint, run, monkeypatch):
    before = content(checkpoint)

    def fail(source, target):
        assert Path(source).parent == checkpoint, "renaming is atomic within a folder only"
        raise OSError("disk on fire")

    monkeypatch.setattr(writer.os, "replace", fail)
    code, _, err = run(MadeUp(), checkpoint)
    assert code == 2 and "disk on fire" in err
    assert content(checkpoint) == before


def test_a_link_to_the_config_becomes_a_file(checkpoint, run, tmp_path):
    blob = tmp_path / "blob"
    (checkpoint / "config.json").rename(blob)
    (checkpoint / "config.json").symlink_to(blob)
    before = blob.read_bytes()
    assert run(MadeUp(), checkpoint)[0] == 0
    assert blob.read_bytes() == before and not (checkpoint / "config.json").is_symlink()


def test_a_config_whose_sets_changed_meanwhile_is_left_alone(checkpoint, run):
    class Slow(MadeUp):
        def step_seconds(self, routing, batch):
            config = config_of(checkpoint)
            config["quantization_config"]["sets"]["new"] = QOQ
            (checkpoint / "config.json").write_text(json.dumps(config))
            return 1.0

    code, _, err = run(Slow(), checkpoint)
    assert code == 2 and "changed in the meantime" in err
    assert config_of(checkpoint)["quantization_config"]["routing"]["prefill"] == "w4a8"


def test_a_routing_that_is_slower_in_whole_steps_is_called_so(checkpoint, run):
    steps = {(8, "routed"): 1.2e-2, (8, "w8a8"): 1e-2, (256, "routed"): 1.05e-2}
    code, out, _ = run(MadeUp(steps), checkpoint)
    assert code == 0
    assert "WARNING: at batch 8 a whole step with this routing is 20% slower than with" in out
    assert "at batch 256" not in out


def test_results_for_machines_and_files(checkpoint, run, tmp_path):
    code, out, _ = run(MadeUp(), checkpoint, "--json", "-o", tmp_path / "out")
    document = json.loads(out)
    assert code == 0 and document["is_written"] and not document["is_remembered"]
    assert document["accuracy_order"] == list(ORDER)
    assert document["routing"] == config_of(checkpoint)["quantization_config"]["routing"]
    assert document["previous_routing"]["prefill"] == "w4a8"
    layer = document["layers"][0]
    assert (layer["layer"], layer["count"]) == ("m.0.qkv_proj", 2)
    assert layer["microseconds"]["w4a8"]["8"] == pytest.approx(1800)
    files = content(tmp_path / "out")
    assert json.loads(files["tune.json"]) == document
    assert b"## Decode" in files["tune.md"] and files["tune.png"].startswith(b"\x89PNG")


# Mistakes


def section(**changes):
    routing = {"prefill": "w8a8", "decode": "w8a8"}
    return {"quant_method": "qoq", "sets": SETS, "routing": routing} | changes


@pytest.mark.parametrize(
    "found, said",
    [
        (None, "not a vllm-qoq checkpoint"),
        ({"quant_method": "fp8"}, "not a vllm-qoq checkpoint"),
        ({"quant_method": "qoq", "kv_cache": {"bits": 4}}, "only its KV cache is quantized"),
        (section(sets={"w8a8": scheme(8)}), "one set, 'w8a8', so there is nothing to choose"),
        (section(surprise=1), "config.json: quantization_config.surprise"),
        (section(sets={**SETS, "x": {"quant_method": "magic"}}), "set 'x' (magic)"),
    ],
)
def test_checkpoints_without_a_choice_are_refused(run, tmp_path, found, said):
    config = {} if found is None else {"quantization_config": found}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = run(None, tmp_path)
    assert (code, out) == (2, "") and said in err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--prefer", "luck"], "'luck'"),
        (["--max-batch", "0"], "'0' is not a positive number"),
        (["--keep-sensitive", "1"], "use --keep-first"),
        (["--max-batch", "5000"], "--max-batch 5000: is larger than 1024"),
        (["-o", "no/such/out"], "no such folder"),
    ],
)
def test_wrong_options_are_refused_with_their_value(checkpoint, run, arguments, said):
    before = content(checkpoint)
    code, _, err = run(None, checkpoint, *arguments)
    assert code == 2 and said in err and content(checkpoint) == before


def test_a_folder_that_cannot_be_written_is_refused_before_work_begins(
    checkpoint, run, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != checkpoint)
    code, _, err = run(None, checkpoint)
    assert code == 2 and "not writable" in err and "--dry-run" in err
    assert run(MadeUp(), checkpoint, "--dry-run")[0] == 0


def test_a_missing_folder_or_package_is_named(run, tmp_path, monkeypatch, checkpoint):
    assert "not a folder" in run(None, tmp_path / "absent")[2]
    monkeypatch.undo()
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    with pytest.raises(TuneError, match=r"vLLM is not installed.*pip install 'vllm-qoq\[vllm\]'"):
        device.check_sets({"w8a8": "compressed-tensors"})


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(TuneError, match=r"--tensor-parallel-size 4: torch finds 2 GPUs"):
        device.check_gpus(4)
    device.check_gpus(2)


@pytest.mark.parametrize(
    "size, said",
    [
        (3, "--tensor-parallel-size 3: is not one of 1, 2, 4, 8, 16"),
        (8, r"--tensor-parallel-size 8: 4 attention heads .* can be served with 1, 2, 4"),
    ],
)
def test_a_split_that_the_checkpoint_does_not_take_is_refused(nested_dir, size, said):
    with pytest.raises(TuneError, match=said):
        job.tune(nested_dir, tensor_parallel_size=size, dry_run=True)


def test_sets_that_this_gpu_cannot_run_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("vllm_qoq.ops.has_kernels", lambda device_type: False)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Some GPU")
    with pytest.raises(TuneError, match=r"set 'w4a8' .*no CUDA kernels.*VLLM_QOQ_CUDA=1 pip"):
        device.check_sets({"w8a8": "compressed-tensors", "w4a8": "qoq_linear"})
    device.check_sets({"w8a8": "compressed-tensors"})


# In vLLM


def test_a_model_that_vllm_does_not_take_is_one_line(checkpoint, monkeypatch, capfd):
    config = config_of(checkpoint) | {"architectures": ["NoSuchForCausalLM"], "model_type": "llama"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(command, "stdout_for", lambda file: contextlib.nullcontext(sys.stdout))
    monkeypatch.setattr(sys, "argv", ["vllm-qoq", "tune", str(checkpoint), "--dry-run"])
    assert cli.main() == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {checkpoint}: vLLM did not start: ") and "NoSuch" in said


class Ranks:
    """vLLM's LLM with workers that extend a made-up one; each runs in this process."""

    def __init__(self, model, **answers):
        from vllm_qoq.tuner.vllm_worker import TuneWorker

        cache, ranks = SimpleNamespace(num_gpu_blocks=9), SimpleNamespace(world_size=2)
        config = SimpleNamespace(cache_config=cache, parallel_config=ranks)
        self.llm_engine, self._answers = SimpleNamespace(vllm_config=config), answers
        self._worker = type("Worker", (TuneWorker,), {"get_model": lambda self: model})()

    def generate(self, *_, **__):
        pass

    def collective_rpc(self, name, args):
        return self._answers.get(name) or [getattr(self._worker, name)(*args)]


def test_a_model_without_routed_layers_is_refused():
    from torch import nn

    from vllm_qoq.errors import FormatError
    from vllm_qoq.tuner.vllm_engine import TuneEngine

    with pytest.raises(FormatError, match="no linear layer is quantized"):
        TuneEngine(Ranks(nn.Linear(2, 2)))


def test_a_layer_takes_as_long_as_its_slowest_rank_and_a_step_as_the_rank_that_begins_last():
    from vllm_qoq.tuner.vllm_engine import TuneEngine

    answers = {
        "tune_groups": [[LayerGroup("m.0.o_proj", 64, 32, 2)]] * 2,
        "tune_linear_seconds": [1.0, 3.0],
        "tune_head_seconds": [5.0, 4.0],
        "tune_begin_steps": [None, None],
        "tune_end_steps": [[7.0, 9.0, 5.0], [8.0, 6.0, 5.5]],
    }
    tuned = TuneEngine(Ranks(None, **answers))
    (group,) = tuned.layers()
    assert tuned.linear_seconds(group, "w8a8", 1) == 3 and tuned.head_seconds(1) == 5
    assert tuned.step_seconds(Routing.forced("w8a8"), 8) == 6
    assert tuned.step_seconds(Routing.forced("w8a8"), 9) is None, "a cache of 8 requests"
    answers |= {"tune_head_seconds": [None, None], "tune_end_steps": [[], []]}
    tuned = TuneEngine(Ranks(None, **answers))
    assert tuned.head_seconds(1) is None and tuned.step_seconds(Routing.forced("a"), 1) is None


def test_a_rank_that_ends_is_one_line():
    from vllm_qoq.tuner.vllm_engine import TuneEngine

    ranks = Ranks(None, tune_groups=[[]])
    tuned = TuneEngine(ranks)
    ranks.collective_rpc = Mock(side_effect=RuntimeError("cancelled"))
    with pytest.raises(TuneError, match="a rank failed or was ended: cancelled; the log above"):
        tuned.head_seconds(1)
    ranks.llm_engine.vllm_config.parallel_config.world_size = 1
    with pytest.raises(RuntimeError, match=r"^cancelled$"):
        tuned.head_seconds(1)


@pytest.mark.parametrize("sets", [("a", "b"), ("a", "b", "c", "d")])
def test_the_engine_loads_every_set(sets):
    from vllm_qoq.serving.methods.steering import reaching

    routing = Routing.parse(reaching(sets), sets)
    assert routing.route([]).reachable(len(sets)) == set(sets)


def test_a_checkpoint_is_tuned_in_vllm_and_serves_with_the_routing(
    two_sets_dir, tmp_path, monkeypatch, capfd
):
    from engines import engine, generate

    import vllm_qoq
    from vllm_qoq.tuner.vllm_worker import TuneWorker

    folder = tmp_path / "checkpoint"
    shutil.copytree(two_sets_dir, folder)
    config = config_of(folder)
    # With a rule both sets serve, whichever is faster here.
    config["quantization_config"]["routing"]["layers"] = [
        {"match": "*.0.mlp.*", "prefill": "w4a8", "decode": "w8a8"},
        {"match": "*.1.mlp.*", "prefill": "w8a8", "decode": "w4a8"},
    ]
    (folder / "config.json").write_text(json.dumps(config))

    opened = []
    open_engine = job.open_engine

    def keep(*arguments):
        opened.append(open_engine(*arguments))
        return opened[0]

    monkeypatch.setattr(job, "open_engine", keep)
    monkeypatch.setattr("vllm_qoq.tuner.job.PREFILL_TOKENS", (512,))
    monkeypatch.setattr(command, "stdout_for", lambda file: contextlib.nullcontext(sys.stdout))
    arguments = ["tune", str(folder), "--max-batch", "4", "--json", "--on-cpu"]
    monkeypatch.setattr(sys, "argv", ["vllm-qoq", *arguments])
    assert cli.main() == 0
    document = json.loads(capfd.readouterr().out.splitlines()[-1])

    shapes = {
        (layer["layer"].rpartition(".")[2], layer["out_features"], layer["in_features"])
        for layer in document["layers"]
    }
    assert shapes == {
        ("qkv_proj", 512, 256),
        ("o_proj", 256, 256),
        ("gate_up_proj", 1536, 256),
        ("down_proj", 256, 768),
    }
    assert all(layer["count"] == 2 for layer in document["layers"])
    assert set(document["lm_head_milliseconds"]) == {"1", "2", "4"}
    assert document["check"] and set(document["check"]) <= {"1", "2", "4"}

    # A switched engine computes what one that is started with the routing does.
    tuned = opened[0]
    routing = Routing.parse(document["routing"], SETS)
    assert config_of(folder)["quantization_config"]["routing"] == routing.to_json()
    switched = {}
    for name, table in [
        ("routing", routing),
        ("w8a8", Routing.forced("w8a8")),
        ("w4a8", Routing.forced("w4a8")),
    ]:
        tuned._ranks(TuneWorker.tune_begin_steps, table, 4)
        tuned._ranks(TuneWorker.tune_end_steps)
        switched[name] = generate(tuned._llm)
    served = engine(folder)
    assert generate(served) == switched["routing"]
    assert len({str(generation) for generation in switched.values()}) == 3
    decode_set = routing.route([]).choose(decode_step(4))
    assert vllm_qoq.step_counts(served)["decode", decode_set] == 11


TWO_RANKS = """
import sys
from vllm_qoq.cli import main
from vllm_qoq.tuner import job

if __name__ == "__main__":
    job.PREFILL_TOKENS = (64,)
    sys.exit(main.main())
"""


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="each rank needs a GPU")
def test_ranks_are_tuned_together_and_remembered_as_such(nested_dir, tmp_path):
    folder, script = tmp_path / "checkpoint", tmp_path / "script.py"
    shutil.copytree(nested_dir, folder)
    script.write_text(TWO_RANKS)
    split = ("--tensor-parallel-size", "2")
    options = (*split, "--max-batch", "2", "--json", "--on-cpu")
    done = warm_process.run(
        [sys.executable, script, "tune", folder, *options],
        timeout=300,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    document = json.loads(done.stdout.splitlines()[-1])
    shapes = {
        (layer["layer"].rpartition(".")[2], layer["out_features"], layer["in_features"])
        for layer in document["layers"]
    }
    assert shapes == {
        ("qkv_proj", 256, 256),
        ("o_proj", 256, 128),
        ("gate_up_proj", 768, 256),
        ("down_proj", 256, 384),
    }, "of one rank"
    assert document["tensor_parallel_size"] == 2 and document["check"]
    assert set(document["lm_head_milliseconds"]) == {"1", "2"}
    assert config_of(folder)["quantization_config"]["routing"] == document["routing"]
    (run,) = memory.load(folder)[0].runs
    key = run.measured.key
    assert key == device.key(key.checkpoint, 2) != device.key(key.checkpoint, 1)

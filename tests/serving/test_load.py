"""The load signal: who writes it, who reads it, and what a step and a layer make of it."""

import json
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from linear_layers import FUSED, SHAPES, Block, finish
from nested_layers import stored
from plugin_units import qoq_config, scheme, tensor_parallel, vllm_config
from prometheus_client import REGISTRY
from qoq_checkpoints import NESTED
from vllm.config import CUDAGraphMode, ParallelConfig
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.model_executor.models.utils import AutoWeightsLoader

from vllm_qoq.errors import FormatError
from vllm_qoq.numerics.reference import quantize_per_token
from vllm_qoq.ops import w4a8_layout
from vllm_qoq.routing.table import Load, Phase, RoutingError, Step
from vllm_qoq.serving.options import Options
from vllm_qoq.serving.plugin import metrics
from vllm_qoq.serving.plugin.config import QoQConfig
from vllm_qoq.serving.plugin.metrics import RoutingStatLogger
from vllm_qoq.serving.plugin.step_counts import read_step_counts
from vllm_qoq.serving.routing.policy import routing_in_force
from vllm_qoq.serving.routing.step import current_step
from vllm_qoq.serving.signals import queue
from vllm_qoq.serving.signals.counters import CounterReader, StepCounters, counter_file
from vllm_qoq.serving.signals.queue import LoadReader, LoadWriter, load_file
from vllm_qoq.serving.signals.trace import Trace

NONE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.FULL_AND_PIECEWISE
THRESHOLDS = {"enter": 4, "leave": 1}
LOAD = {**THRESHOLDS, "prefill": "w4a16"}
TWO_SETS = {"prefill": "w8a8", "decode": "w4a16", "load": LOAD}
# Calm in 8 bits, busy in 4.
NESTED_ROUTING = {
    "prefill": "w8a8",
    "decode": "w8a8",
    "load": {**THRESHOLDS, "prefill": "w4a8", "decode": "w4a8"},
}
DECODING = {"layer": SimpleNamespace(max_query_len=1)}
MIXED = {"layer": SimpleNamespace(max_query_len=7)}


# The signal


@pytest.fixture
def signal(tmp_path):
    """Two ranks and the front end of one engine."""
    path = load_file(str(tmp_path / "stem"), 0)
    readers = [LoadReader(path, torch.device("cpu")) for _ in range(2)]
    return LoadWriter(path, Load(prefill="x", **THRESHOLDS), "0"), readers


def test_every_rank_sees_each_switch_and_nothing_else(signal):
    writer, readers = signal
    seen = []
    for waiting in (0, 3, 4, 2, 9, 2, 1, 3, 0, 4):
        writer.update(waiting)
        seen.append([reader.read() for reader in readers])
    assert seen == [[busy] * 2 for busy in map(bool, (0, 0, 1, 1, 1, 1, 0, 0, 0, 1))]
    assert writer.switches == 3 and writer.is_busy


def test_the_device_has_the_state_of_the_last_copy(signal):
    writer, (reader, _) = signal

    def flags():
        return [reader.is_calm.tolist(), reader.is_busy.tolist()]

    assert flags() == [[1], [0]] and reader.is_calm.dtype == torch.int32
    writer.update(4)
    assert flags() == [[1], [0]], "a step keeps its state"
    reader.copy()
    assert flags() == [[0], [1]]
    writer.update(0)
    reader.copy()
    assert flags() == [[1], [0]]


def test_a_rank_that_comes_late_leaves_the_file_as_it_is(signal, tmp_path):
    writer, readers = signal
    writer.update(4)
    late = LoadReader(load_file(str(tmp_path / "stem"), 0), torch.device("cpu"))
    writer.update(0)
    assert not late.read() and not readers[0].read()
    writer.update(4)
    assert late.read() and readers[0].read()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_front_end_on_another_host_is_refused(tmp_path):
    with pytest.raises(RoutingError, match=r"engine 3 shares no memory.*one host.*force_load"):
        LoadWriter(tmp_path / "missing", Load(prefill="x", **THRESHOLDS), "3")


# The front end


def front_end(quant_config, model="m", extra=None):
    """What a stat logger reads of an engine's config."""
    return SimpleNamespace(
        quant_config=quant_config,
        model_config=SimpleNamespace(served_model_name=model),
        additional_config={"qoq": extra or {}},
    )


def stats(waiting, deferred=0):
    return SimpleNamespace(num_waiting_reqs=waiting, num_skipped_waiting_reqs=deferred)


def test_the_stat_logger_tells_the_engine_and_prometheus(tmp_path):
    config = qoq_config(routing=TWO_SETS)
    reader = LoadReader(load_file(config.counter_stem, 2), torch.device("cpu"))
    logger = RoutingStatLogger(front_end(config, model="told"), engine_index=2)

    def shown(name):
        return REGISTRY.get_sample_value(name, {"model_name": "told", "engine": "2"})

    def state():
        return shown("vllm:qoq_busy"), shown("vllm:qoq_load_switches_total"), reader.read()

    assert state() == (0, 0, False)
    for scheduler_stats in (None, stats(3), stats(0, deferred=9)):
        logger.record(scheduler_stats, None, mm_cache_stats=None, engine_idx=2)
    assert state() == (0, 0, False)
    logger.record(stats(4), None, mm_cache_stats=None, engine_idx=2)
    assert state() == (1, 1, True)
    logger.record(None, None, mm_cache_stats=None, engine_idx=2)
    logger.record(stats(2), None, mm_cache_stats=None, engine_idx=2)
    assert state() == (1, 1, True)
    logger.record(stats(1), None, mm_cache_stats=None, engine_idx=2)
    assert state() == (0, 2, False)


@pytest.mark.parametrize(
    ("routing", "extra"),
    [
        (TWO_SETS | {"load": None}, {}),
        (TWO_SETS, {"force_set": "w8a8"}),
        (TWO_SETS, {"force_load": "busy"}),
    ],
)
def test_without_a_load_in_force_nothing_is_told(routing, extra):
    routing = {key: value for key, value in routing.items() if value is not None}
    logger = RoutingStatLogger(front_end(qoq_config(routing=routing), "quiet", extra))
    logger.record(stats(100), None)
    labels = {"model_name": "quiet", "engine": "0"}
    assert logger.load is None
    assert REGISTRY.get_sample_value("vllm:qoq_busy", labels) is None


def test_steps_that_are_counted_on_another_host_are_said_to_be(monkeypatch):
    said = []
    monkeypatch.setattr(metrics.logger, "warning", lambda text, *_: said.append(text))
    config = qoq_config()
    here = front_end(config)
    here.parallel_config = ParallelConfig()
    RoutingStatLogger(here).log_engine_initialized()
    assert "counts its steps on another host" in said[0]
    with pytest.raises(ValueError, match="on another host"):
        read_step_counts(here)
    StepCounters(counter_file(config.counter_stem, 0), config.set_names, torch.device("cpu"))
    RoutingStatLogger(here).log_engine_initialized()
    assert len(said) == 1 and set(read_step_counts(here).values()) == {0}


def test_prometheus_is_told_the_bits_of_the_cache():
    rules = [{"match": "model.layers.0.*", "bits": 16}]
    for model, section, extra, bits in (
        ("kv4", {"kv_cache": {"bits": 4, "layers": rules}}, {}, "4,16"),
        ("kv8", {"kv_cache": {"bits": 4}}, {"kv_bits": 8}, "8"),
        ("k8v4", {"kv_cache": {"bits": "k8v4", "layers": rules}}, {}, "k8v4,16"),
        ("kv16", {"kv_cache": {"bits": 4}}, {"kv_bits": 16}, None),
    ):
        RoutingStatLogger(front_end(QoQConfig.from_config(section), model, extra))
        labels = {"model_name": model, "engine": "0", "hadamard": "false", "bits": bits or "16"}
        value = REGISTRY.get_sample_value("vllm:qoq_kv_cache_info", labels)
        assert value == (1 if bits else None)


# Who may not


@pytest.mark.parametrize(
    ("parallel", "has_writer", "message"),
    [
        ({"_api_process_count": 3}, True, "3 API processes.*--api-server-count 1"),
        ({"nnodes": 2}, True, "--nnodes 2.*several hosts"),
        ({"distributed_executor_backend": "ray"}, True, "Ray executor.*executor-backend mp"),
        ({}, False, r"LLM\(\)"),
    ],
)
def test_engines_that_nobody_could_tell_are_refused(parallel, has_writer, message, monkeypatch):
    monkeypatch.setattr(queue, "_is_writer_here", has_writer)
    config = vllm_config()
    for name, value in parallel.items():
        setattr(config.parallel_config, name, value)
    with (
        tensor_parallel(0, 1, config),
        pytest.raises(RoutingError, match=f"routing.load: .*{message}.*force_load"),
    ):
        qoq_config(routing=TWO_SETS).policy()
    # What pins the state, or has none, is served anywhere.
    config.additional_config = {"qoq": {"force_load": "busy"}}
    with tensor_parallel(0, 1, config):
        assert qoq_config(routing=TWO_SETS).policy().load is None


def test_the_engine_is_told_by_the_config_that_there_is_a_front_end(monkeypatch):
    monkeypatch.setattr(queue, "_is_writer_here", False)
    config = qoq_config(routing=TWO_SETS)
    offline = pickle.dumps(config)
    queue.announce_writer()
    online = pickle.dumps(config)
    monkeypatch.setattr(queue, "_is_writer_here", False)  # in the engine
    with tensor_parallel(0, 1, vllm_config()):
        with pytest.raises(RoutingError, match="front end"):
            pickle.loads(offline).policy()
        worker = pickle.loads(pickle.dumps(pickle.loads(online)))
        assert worker.policy().load is not None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"force_load": "idle"}, "force_load"),
        ({"force_load": "calm", "force_set": "w8a8"}, "either 'force_set' or 'force_load'"),
        (
            {"force_load": "busy", "routing": {"prefill": "w8a8", "decode": "w8a8"}},
            "'busy', but the routing has no 'load'",
        ),
    ],
)
def test_forcing_what_cannot_be(extra, message):
    config = vllm_config(additional_config={"qoq": extra})
    with tensor_parallel(0, 1, config), pytest.raises(RoutingError, match=message):
        qoq_config(routing=TWO_SETS).policy()


def test_forcing_a_state_leaves_its_table():
    config = qoq_config(routing=TWO_SETS)
    tables = [routing_in_force(config.section, Options(force_load=s)) for s in ("calm", "busy")]
    assert [(table.prefill, table.load) for table in tables] == [("w8a8", None), ("w4a16", None)]


# Steps


@pytest.fixture
def make_policy(monkeypatch):
    monkeypatch.setattr(queue, "_is_writer_here", True)

    def make(mode, **changes):
        config = vllm_config()
        config.compilation_config.cudagraph_mode = mode
        quant_config = qoq_config(**changes)
        with tensor_parallel(0, 1, config):
            policy = quant_config.policy()
        stem = quant_config.counter_stem
        reader = CounterReader(counter_file(stem, 0), quant_config.set_names)
        writer = LoadWriter(load_file(stem, 0), policy.routing.load, "0")

        def step(metadata, tokens=3):
            with set_forward_context(metadata, config, num_tokens=tokens):
                return current_step(get_forward_context(), tokens, policy)

        return policy, writer, reader, step

    return make


def test_on_the_host_a_step_follows_the_signal(make_policy):
    _, writer, reader, step = make_policy(NONE, routing=TWO_SETS)
    assert step(MIXED).is_busy is False
    writer.update(4)
    assert step(MIXED).is_busy is True and step(DECODING).is_busy is True
    assert step(MIXED).is_busy is True
    writer.update(1)
    assert step(MIXED).is_busy is False
    assert reader.read() == {
        ("prefill", "w8a8"): 2,
        ("prefill", "w4a16"): 2,
        ("decode", "w8a8"): 0,
        ("decode", "w4a16"): 1,
    }


def test_a_step_keeps_its_state_when_the_signal_changes_within_it(make_policy, monkeypatch):
    policy, writer, _, _ = make_policy(NONE, routing=TWO_SETS)
    config = vllm_config()
    with set_forward_context(MIXED, config, num_tokens=9):
        first = current_step(get_forward_context(), 9, policy)
        writer.update(4)
        assert current_step(get_forward_context(), 9, policy) is first and first.is_busy is False


def test_under_graphs_the_device_counts_the_set_that_it_uses(make_policy):
    policy, writer, reader, step = make_policy(
        FULL, sets=NESTED, routing=NESTED_ROUTING | {"decode": "w4a8"}
    )
    for waiting in (0, 4, 2, 1):
        writer.update(waiting)
        assert step(MIXED).is_busy is None
        assert step(DECODING).is_busy is None
    assert reader.read() == {
        ("prefill", "w8a8"): 2,
        ("prefill", "w4a8"): 2,
        ("decode", "w8a8"): 0,
        ("decode", "w4a8"): 4,
    }
    # A forward pass without metadata is not counted, but may be what a graph captures.
    writer.update(4)
    assert step(None).is_busy is None and policy.load.is_busy.tolist() == [1]
    assert sum(reader.read().values()) == 8
    # vLLM may lower the mode after the model was built.
    policy.compilation_config.cudagraph_mode = NONE
    assert step(MIXED).is_busy is True


def test_the_trace_tells_the_state_where_there_is_one(make_policy, tmp_path):
    trace = tmp_path / "trace.jsonl"
    for mode, routing in (
        (NONE, NESTED_ROUTING),
        (FULL, NESTED_ROUTING),
    ):
        policy, writer, _, step = make_policy(mode, sets=NESTED, routing=routing)
        policy._trace = Trace(str(trace), engine=3)
        step(MIXED)
        writer.update(4)
        step(MIXED)
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert {(line["engine"], line["pid"]) for line in lines} == {(3, os.getpid())}
    assert [(line["set"], line["busy"], line.get("set_if_busy")) for line in lines] == [
        ("w8a8", False, None),
        ("w4a8", True, None),
        ("w8a8", None, "w4a8"),
        ("w8a8", None, "w4a8"),
    ]


# Layers


def block(mode, tensors=None, sets=NESTED, routing=NESTED_ROUTING, **options):
    """A block whose layers follow a load, vLLM's config, and the file of the signal."""
    config = vllm_config()
    config.compilation_config.cudagraph_mode = mode
    quant_config = qoq_config(sets=sets, routing=routing)
    with tensor_parallel(0, 1, config):
        model = Block(quant_config, **options)
        if tensors is not None:
            mapper = quant_config.get_cache_scale_mapper()
            AutoWeightsLoader(model).load_weights(mapper.apply(tensors.items()), mapper=FUSED)
            finish(model)
    return model.block, config, load_file(quant_config.counter_stem, 0)


@pytest.fixture
def announced(monkeypatch):
    monkeypatch.setattr(queue, "_is_writer_here", True)


@pytest.mark.parametrize("routing", [NESTED_ROUTING, {"swapped": True}], ids=["calm8", "calm4"])
@pytest.mark.parametrize("reads_int8", [True, False])
def test_under_graphs_a_flag_chooses_between_nested_sets(announced, routing, reads_int8):
    if "swapped" in routing:
        routing = {"prefill": "w4a8", "decode": "w4a8"} | {
            "load": {**THRESHOLDS, "prefill": "w8a8", "decode": "w8a8"}
        }
    layers, config, signal_file = block(FULL, stored(), routing=routing)
    layer = layers.down_proj
    method, x = layer.quant_method, torch.randn(5, 512).bfloat16()
    expected = {name: getattr(layer, name).apply(x, False) for name in ("w8a8", "w4a8")}
    # As on a GPU: two planes instead of two int8 weights.
    tensors = {name.rpartition(".")[2]: t for name, t in stored().items() if ".down_proj." in name}
    groups = (tensors[leaf] for leaf in ("qweight", "group_scale", "group_offset"))
    layer.w4a8.weight = torch.nn.Parameter(w4a8_layout.pack(*groups), requires_grad=False)
    packed = w4a8_layout.pack(tensors["qresidual"])
    layer.w8a8.weight = torch.nn.Parameter(packed, requires_grad=False)
    writer = LoadWriter(signal_file, Load(prefill="x", **THRESHOLDS), "0")
    outputs = []
    for waiting in (0, 4, 1):
        writer.update(waiting)
        with set_forward_context(DECODING, config, num_tokens=5):
            context = get_forward_context()
            if reads_int8:
                y = method.run_int8(quantize_per_token(x), x.dtype, False, context)
            else:
                y = method.run(x, [], False, context)
        outputs.append(y)
    calm, busy = routing["decode"], routing["load"]["decode"]
    assert not torch.equal(expected[calm], expected[busy])
    assert torch.equal(outputs[0], expected[calm]) and torch.equal(outputs[2], expected[calm])
    assert torch.equal(outputs[1], expected[busy])


def test_sets_that_are_not_nested_are_refused_under_graphs_by_layer(announced):
    sets = {"w8a8": scheme(8), "w4a16": scheme(4)}
    message = r"prefill steps block\.qkv_proj goes from 'w8a8' to 'w4a16' .*nested.*--enforce-eager"
    with pytest.raises(RoutingError, match=message):
        block(FULL, sets=sets, routing=TWO_SETS)
    block(NONE, sets=sets, routing=TWO_SETS)
    # Nothing to choose: a rule keeps the layers, or no batch of this engine goes so far.
    rule = {"match": "*", "prefill": "w8a8"}
    block(FULL, sets=sets, routing=TWO_SETS | {"layers": [rule]})
    large = [{"max_batch": 10**6, "set": "w4a16"}, {"set": "w8a8"}]
    block(FULL, sets=sets, routing=TWO_SETS | {"load": {**THRESHOLDS, "decode": large}})


def test_biases_that_differ_are_refused_under_graphs(announced):
    tensors = stored()
    for part, (n, _) in SHAPES.items():
        for name in NESTED:
            tensors[f"{name}.block.{part}.bias"] = torch.ones(n)
    block(FULL, tensors, bias=True)
    tensors["w8a8.block.up_proj.bias"] = torch.zeros(SHAPES["up_proj"][0])
    block(NONE, tensors, bias=True)
    with pytest.raises(FormatError, match=r"block\.gate_up_proj: .*different bias.*enforce-eager"):
        block(FULL, tensors, bias=True)


def test_a_set_that_only_load_names_is_loaded(announced):
    layers, _, _ = block(NONE, stored())
    method = layers.down_proj.quant_method
    assert set(method.sets) == {"w8a8", "w4a8"}
    assert method.route.choose(Step(Phase.DECODE, 1, is_busy=True)) == "w4a8"
    assert method.route.choose(Step(Phase.DECODE, 1)) == "w8a8"

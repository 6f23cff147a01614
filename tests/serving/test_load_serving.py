"""Engines that follow their queue, on the CPU: in this process, offline, and over HTTP."""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import warm_process
from engine_process import run_engines
from engines import PROMPTS, engine, generate
from server import Server

import vllm_qoq
from vllm_qoq.bench.perplexity import text_perplexity
from vllm_qoq.serving.plugin.metrics import RoutingStatLogger

ENTER, LEAVE = 3, 0


def with_load(calm, busy, **more):
    """A table that serves everything in one set of each state."""
    load = {"enter": ENTER, "leave": LEAVE, "prefill": busy, "decode": busy}
    return {"prefill": calm, "decode": calm, "load": load, **more}


def wait(stat_logger, requests):
    """Tell the engine, as its front end does after a step, how many requests wait."""
    stat_logger.record(SimpleNamespace(num_waiting_reqs=requests), None)


def counted(llm, prompts=PROMPTS):
    before = vllm_qoq.step_counts(llm)
    generation = generate(llm, prompts, 6)
    new = {key: n - before[key] for key, n in vllm_qoq.step_counts(llm).items()}
    return generation, {key: n for key, n in new.items() if n}


@pytest.mark.parametrize(
    ("folder", "calm", "busy"),
    [("nested_dir", "w8a8", "w4a8"), ("two_sets_dir", "w8a8", "w4a8")],
)
def test_an_engine_runs_in_the_sets_of_its_state(request, folder, calm, busy):
    checkpoint = request.getfixturevalue(folder)
    # In this process, where the import of the stat logger announced it.
    llm = engine(checkpoint, {"routing": with_load(calm, busy)})
    stat_logger = RoutingStatLogger(llm.llm_engine.vllm_config)
    forced = {
        name: generate(engine(checkpoint, {"force_set": name}), max_tokens=6)
        for name in (calm, busy)
    }
    assert forced[calm] != forced[busy]
    for waiting, name in ((0, calm), (ENTER, busy), (LEAVE + 1, busy), (LEAVE, calm)):
        wait(stat_logger, waiting)
        generation, counts = counted(llm)
        assert generation == forced[name]
        assert counts == {("prefill", name): 1, ("decode", name): 5}
    assert stat_logger.load.switches == 2


def test_a_layer_rule_stands_above_the_load(nested_dir):
    rule = {"match": "*", "prefill": "w8a8", "decode": "w8a8"}
    ruled = engine(nested_dir, {"routing": with_load("w8a8", "w4a8", layers=[rule])})
    wait(RoutingStatLogger(ruled.llm_engine.vllm_config), ENTER)
    assert generate(ruled) == generate(engine(nested_dir, {"force_set": "w8a8"}))


@pytest.mark.parametrize(("state", "name"), [("calm", "w8a8"), ("busy", "w4a8")])
def test_a_forced_state_is_its_set(nested_dir, state, name):
    options = {"routing": with_load("w8a8", "w4a8"), "force_load": state}
    assert generate(engine(nested_dir, options)) == generate(
        engine(nested_dir, {"force_set": name})
    )


def test_every_rank_follows(nested_dir, tmp_path):
    options = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 32 << 20}
    specs = [
        {"qoq": {"force_set": "w8a8"}},
        {"qoq": {"force_set": "w4a8"}},
        {"qoq": {"routing": with_load("w8a8", "w4a8")}, "waiting": [ENTER, LEAVE]},
    ]
    eight, four, followed = run_engines(
        tmp_path,
        [spec | {"checkpoint": str(nested_dir), "options": options} for spec in specs],
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    assert eight["generation"] != four["generation"]
    busy, calm = followed["loads"]
    assert followed["generation"] == calm["generation"] == eight["generation"]
    assert busy["generation"] == four["generation"]
    assert busy["counts"] == {
        "prefill w8a8": 0,
        "prefill w4a8": 1,
        "decode w8a8": 0,
        "decode w4a8": 11,
    }


OFFLINE = """
import sys
from vllm import LLM
LLM(sys.argv[1], enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_model_len=512)
"""


@pytest.fixture
def with_load_dir(nested_dir, tmp_path):
    """The nested checkpoint with a load in its own routing."""
    for file in nested_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((nested_dir / "config.json").read_text())
    config["quantization_config"]["routing"] = with_load("w8a8", "w4a8")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_offline_engines_are_refused_with_the_remedy(with_load_dir):
    """By the front end, before it starts or forks an engine."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    script = with_load_dir / "offline.py"
    script.write_text('if __name__ == "__main__":\n    ' + OFFLINE.strip().replace("\n", "\n    "))
    command = [sys.executable, script, with_load_dir]
    done = warm_process.run(command, timeout=240, env=environment)
    assert done.returncode != 0
    assert "routing.load: only the Python front end of `vllm serve`" in done.stdout + done.stderr
    assert '{"qoq": {"force_load": "calm"}}' in done.stdout + done.stderr


def test_the_perplexity_command_measures_a_calm_engine(with_load_dir, nested_dir, heldout_text):
    text = with_load_dir / "text.txt"
    text.write_text(heldout_text.read_text()[:4000])
    command = [
        sys.executable,
        "-m",
        "vllm_qoq.cli",
        "perplexity",
        with_load_dir,
        "--text",
        text,
    ]
    command += ["--seqlen", 128, "--enforce-eager", "--json"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = warm_process.run(command, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    calm, busy = (
        text_perplexity(engine(nested_dir, {"force_set": name}), text.read_text(), 128)[
            "perplexity"
        ]
        for name in ("w8a8", "w4a8")
    )
    assert json.loads(done.stdout)["perplexity"] == pytest.approx(calm, rel=1e-4)
    assert busy != pytest.approx(calm, rel=1e-3)


def busy_and_switches(server):
    metrics = server.get("/metrics")
    values = {}
    for line in metrics.splitlines():
        name, _, rest = line.partition("{")
        if name in ("vllm:qoq_busy", "vllm:qoq_load_switches_total"):
            values[name] = float(rest.rpartition(" ")[2])
    return values["vllm:qoq_busy"], values["vllm:qoq_load_switches_total"]


# Without vLLM's own statistics, too: for a plugin's logger vLLM makes them nevertheless.
@pytest.mark.parametrize("more", [(), ("--disable-log-stats",)], ids=["stats", "no-stats"])
def test_a_burst_makes_a_server_busy_and_its_end_calm(with_load_dir, tmp_path, more):
    options = ("--max-num-seqs", "2", *more)
    with Server(with_load_dir, tmp_path / "log", *options, is_warm=True) as server:
        server.text("def alone():\n", max_tokens=4)
        alone = server.steps()
        assert alone["prefill", "w8a8"] == 1 and alone["decode", "w8a8"] == 3
        assert alone["prefill", "w4a8"] == alone["decode", "w4a8"] == 0
        assert busy_and_switches(server) == (0, 0)
        # Long enough that a front end which gets little of a processor tells the engine of it.
        prompts = [f"class Number{i}:\n    " for i in range(24)]
        with ThreadPoolExecutor(24) as pool:
            texts = list(pool.map(lambda prompt: server.text(prompt, max_tokens=40), prompts))
        assert all(texts)
        deadline = time.monotonic() + 10
        while busy_and_switches(server)[0] and time.monotonic() < deadline:
            time.sleep(0.1)
        busy, switches = busy_and_switches(server)
        assert busy == 0 and switches >= 2 and switches % 2 == 0
        after = server.steps()
        assert after["prefill", "w4a8"] > 0 and after["decode", "w4a8"] > 0
        server.text("def alone():\n", max_tokens=4)
        again = server.steps()
        assert again["prefill", "w8a8"] == after["prefill", "w8a8"] + 1
        assert again["decode", "w4a8"] == after["decode", "w4a8"]
        log = (tmp_path / "log").read_text()
        assert log.count(" is busy now: ") == log.count(" is calm now: ") == switches / 2

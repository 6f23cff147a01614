"""Engines in several processes, on top of a routed checkpoint with a 4-bit KV cache."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from engine_process import run_engines
from engines import engine, generate, largest_gap
from server import Server

from vllm_qoq.bench.perplexity import text_perplexity

ROUTED = {"routing": {"prefill": "w8a8", "decode": "w4a8"}, "kv_bits": 4}


def test_stages_of_a_pipeline(nested_dir, heldout_text, tmp_path):
    """Compiled: on a CPU vLLM's stages pass nothing on where an engine is eager."""
    options = {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "kv_cache_memory_bytes": 32 << 20,
    }
    text = heldout_text.read_text()[:3000]
    spec = {"checkpoint": str(nested_dir), "qoq": ROUTED, "options": options, "text": text}
    (stages,) = run_engines(tmp_path, [spec], VLLM_CPU_OMP_THREADS_BIND="0|1")
    llm = engine(nested_dir, ROUTED)
    whole = text_perplexity(llm, text, 256)["perplexity"]
    assert stages["perplexity"] == pytest.approx(whole, rel=0.005)
    # What rounds otherwise when it is compiled is rounded to 4 bits then.
    assert largest_gap(stages["generation"], generate(llm)) < 1
    # The first stage counts.
    steps = {key: n for key, n in stages["counts"].items() if n}
    assert steps == {"prefill w8a8": 1, "decode w4a8": 11}


def test_data_parallel_engines_count_for_themselves(nested_dir, tmp_path):
    options = (
        *("--data-parallel-size", "2", "--api-server-count", "1"),
        *("--additional-config", json.dumps({"qoq": ROUTED})),
    )
    with Server(nested_dir, tmp_path / "server.log", *options, is_warm=True) as server:
        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda i: server.text(f"def f{i}():\n"), range(8)))
        metrics = server.get("/metrics")
    assert all(texts)
    line = r'vllm:qoq_steps_total\{engine="(\d)",.*phase="(\w+)",set="(\w+)"\} ([\d.]+)'
    steps = {(e, phase, name): float(n) for e, phase, name, n in re.findall(line, metrics)}
    for rank in "01":
        assert steps[rank, "prefill", "w8a8"] > 0 and steps[rank, "decode", "w4a8"] > 0
        assert steps[rank, "prefill", "w4a8"] == steps[rank, "decode", "w8a8"] == 0

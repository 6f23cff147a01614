"""Runs engines in a process of their own, for settings that belong to a whole process.

Tensor parallelism, another model runner, CUDA graphs. `run_engines` is for
tests; the file itself is the child: `python tests/support/engine_process.py SPECS OUT`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import warm_process
from engines import PROMPTS, engine, generate
from vllm import SamplingParams

import vllm_qoq
from vllm_qoq.bench.perplexity import text_perplexity
from vllm_qoq.ops import linear_ops
from vllm_qoq.serving.plugin.metrics import RoutingStatLogger

# Options of an engine that compiles and captures graphs.
DEFAULT = {
    "enforce_eager": False,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]},
}
# Eager and captured steps run the same kernels in these two, so their results can be compared
# bit by bit; Inductor's fusions round differently.
SAME_OPS = {"custom_ops": ["all"]}
EAGER = {"enforce_eager": True, "compilation_config": SAME_OPS}
GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {
        **SAME_OPS,
        "backend": "eager",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
    },
}


def run_engines(
    folder: Path, specs: list[dict[str, Any]], **environment: str
) -> list[dict[str, Any]]:
    """Run the engines that `specs` describe, one after the other, and return what each did.

    A spec is {"checkpoint": PATH, "qoq": {...}, "options": {...}, "prompts": [...], "max_tokens":
    N, "adapters": [PATH, ...], "text": T, "waiting": [N, ...]}; a result has the `generation`, the
    `counts` of steps in it ("decode w4a16": n), how many routing decisions were `traced` during it,
    if the spec asks for a trace, how many `cache_tokens` the KV cache holds, the `preemptions` so
    far and how many speculated tokens were `accepted`, if the options ask for statistics, and the
    `perplexity` of the text, if there is one. After the generation come the `loads`, one for each
    number of waiting requests that the engine is told: another `generation`, its `counts` and what
    was `traced`.
    "sleep": [LEVEL, ...] lets the engine sleep and wake; each time adds its generation to `awake`,
    and in the end `counters` is how many integers of the GEMMs' workspace are not zero.
    "forget": true empties the KV cache, whose prompts a KV connector has kept, and generates again:
    `pages` are the digests of all pages that are not empty, before and after, and `kept` is how
    many tokens of each prompt were not read anew.
    """
    (folder / "specs.json").write_text(json.dumps(specs))
    command = [sys.executable, __file__, str(folder / "specs.json"), str(folder / "results.json")]
    environment = {**os.environ, **environment}
    done = warm_process.run(command, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text(), object_hook=_with_tokens)


def main(specs_file: str, results_file: str) -> None:
    """Run every spec and write the results."""
    specs = json.loads(Path(specs_file).read_text())
    Path(results_file).write_text(json.dumps([_run(spec) for spec in specs]))


def _run(spec: dict[str, Any]) -> dict[str, Any]:
    qoq = spec.get("qoq", {})
    llm = engine(Path(spec["checkpoint"]), qoq, **spec.get("options", {}))

    def run() -> dict[str, Any]:
        counts, traced = _counts(llm), _lines(qoq.get("trace"))
        prompts = tuple(spec.get("prompts", PROMPTS))
        return {
            "generation": generate(llm, prompts, spec.get("max_tokens", 12), spec.get("adapters")),
            "counts": {key: n - counts[key] for key, n in _counts(llm).items()},
            "traced": _lines(qoq.get("trace")) - traced,
        }

    result = run() | {"cache_tokens": _cache_tokens(llm)}
    if "waiting" in spec:
        stat_logger = RoutingStatLogger(llm.llm_engine.vllm_config)
        result["loads"] = []
        for waiting in spec["waiting"]:
            stat_logger.record(SimpleNamespace(num_waiting_reqs=waiting), None)
            result["loads"].append(run())
    if spec.get("forget"):
        before = llm.collective_rpc(_pages)[0]
        llm.reset_prefix_cache()
        llm.collective_rpc(_empty)
        outputs = llm.generate(spec["prompts"], SamplingParams(max_tokens=2), use_tqdm=False)
        result["kept"] = [output.num_cached_tokens for output in outputs]
        result["pages"] = [before, llm.collective_rpc(_pages)[0]]
    if "sleep" in spec:
        result["awake"] = [_awake(llm, level, run) for level in spec["sleep"]]
        workspace = linear_ops.workspace(torch.device("cuda", 0))
        result["counters"] = int(workspace.count_nonzero())
    if spec.get("options", {}).get("disable_log_stats") is False:
        found = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
        result["preemptions"] = found["vllm:num_preemptions"]
        result["accepted"] = found.get("vllm:spec_decode_num_accepted_tokens")
    if "text" in spec:
        result["perplexity"] = text_perplexity(llm, spec["text"], 256)["perplexity"]
    if spec.get("options", {}).get("tensor_parallel_size", 1) > 1:
        llm.llm_engine.engine_core.shutdown()  # its workers would spin beside the next engine's
    return result


def _awake(llm: Any, level: int, run: Callable[[], dict[str, Any]]) -> Any:
    """What is generated after sleeping at `level`; the second drops the weights."""
    llm.sleep(level)
    llm.wake_up()
    if level == 2:
        llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    return run()["generation"]


def _pages(worker: Any) -> list[str]:
    """The digest of each page that is not empty, of all layers."""
    found = []
    for layer, cache in enumerate(worker.model_runner.kv_caches):
        pages = cache.cpu().flatten(1)
        for page in pages[pages.any(1)]:
            found.append(f"{layer} {hashlib.sha256(page.numpy().tobytes()).hexdigest()}")
    return found


def _empty(worker: Any) -> None:
    for cache in worker.model_runner.kv_caches:
        cache.zero_()


def _cache_tokens(llm: Any) -> int:
    config = llm.llm_engine.vllm_config.cache_config
    return config.num_gpu_blocks * config.block_size


def _with_tokens(entry: dict[str, Any]) -> dict[Any, Any]:
    """JSON has only strings as keys; those of log-probabilities are tokens."""
    return {int(key) if key.isdecimal() else key: value for key, value in entry.items()}


def _counts(llm: Any) -> dict[str, int]:
    try:
        return {" ".join(key): n for key, n in vllm_qoq.step_counts(llm).items()}
    except ValueError:  # a checkpoint of another method
        return {}


def _lines(trace: str | None) -> int:
    return len(Path(trace).read_text().splitlines()) if trace else 0


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A process in which vLLM lacks one name after the other.

    python tests/support/unknown_vllm.py OUT

Writes JSON: what `register()` brought into a process of a sound vLLM, and for every name that
the plugin imports from vLLM what happened without it, each in a fork of this process.
"""

from __future__ import annotations

import ast
import gc
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "vllm_qoq"
# Without it vLLM itself finds no method, ours neither.
OF_VLLM_ITSELF = ("vllm.model_executor.layers.quantization", "QUANTIZATION_METHODS")
SECTION = {"quant_method": "qoq", "kv_cache": {"bits": 4}}


def imported_names() -> set[tuple[str, str]]:
    """(module, name) of everything that the serving code takes from vLLM when it is imported."""
    found = set()
    for file in (PACKAGE / "serving").rglob("*.py"):
        # Not imported to serve a model, by the front end alone, and only where there is a GPU.
        if file.name in ("metrics.py", "step_counts.py", "cuda.py"):
            continue
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {(str(node.module), alias.name) for alias in node.names}
    return found - {OF_VLLM_ITSELF}


def remove(module: str, name: str) -> None:
    """Make `from module import name` fail."""
    owner = importlib.import_module(module)
    if name in vars(owner):
        delattr(owner, name)
    # A module may find its names only when they are asked for.
    vars(owner)["__getattr__"] = lambda key: (_ for _ in ()).throw(AttributeError(key))


def in_fork(work: Callable[[], Any]) -> Any:
    """What `work` returns in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        gc.disable()  # it would go through, and copy, all that vLLM has made
        try:
            result = work()
        except BaseException as error:
            result = {"raised": repr(error)}
        os.write(writing, json.dumps(result).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text)


def without(module: str, name: str, config_class: Callable[[str], Any]) -> dict[str, Any]:
    """What `register()` logs without `name`, and what a model that asks for qoq is told."""
    remove(module, name)
    lines = registered()
    try:
        config_class("qoq").from_config(dict(SECTION))
    except Exception as error:
        return {"logged": lines, "refusal": f"{type(error).__name__}: {error}"}
    return {"logged": lines, "refusal": None}


def registered() -> list[str]:
    """Calls `register()`; the lines that it logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm").addHandler(handler)
    import vllm_qoq

    vllm_qoq.register()
    vllm_qoq.register()
    return lines


def footprint() -> dict[str, Any]:
    """What `register()` brings into a process that serves another model."""
    importlib.import_module("vllm.model_executor.models.registry")  # vLLM needs it for every model
    before, finders = set(sys.modules), list(sys.meta_path)
    lines = registered()
    return {
        "logged": lines,
        "modules": sorted(set(sys.modules) - before),
        "finders": len(sys.meta_path) - len(finders),
    }


def main(out: str) -> None:
    """Run everything."""
    import vllm.engine.arg_utils

    vllm.__version__ = "9.9.9"
    results: dict[str, Any] = {"footprint": in_fork(footprint), "without": {}}
    names = imported_names()
    for module in {module for module, _ in names}:
        importlib.import_module(module)  # once, for all forks
    for module in ("ops", "numerics.reference_attention", "checkpoint.format", "environment"):
        importlib.import_module(f"vllm_qoq.{module}")
    from vllm.model_executor.layers.quantization import get_quantization_config

    get_quantization_config("fp8")  # what vLLM itself imports late, is imported by now
    gc.freeze()
    for module, name in sorted(names):
        if f"{module}.{name}" in sys.modules:  # vLLM itself does not work without this module
            continue
        results["without"][f"{module}.{name}"] = in_fork(
            lambda m=module, n=name: without(m, n, get_quantization_config)
        )
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])

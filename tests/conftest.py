"""Fixtures that all tests share: real checkpoints, made once, and the GPU marker."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import half_products
import pytest
import warm_process
from gpu_record import not_run_since
from qoq_checkpoints import PER_CHANNEL, write_checkpoint, write_nested, write_plain

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
QUANTIZE = ROOT / "examples" / "quantize_llmcompressor.py"
SERVER_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.update({k: os.environ.get(k, v) for k, v in SERVER_ENVIRONMENT.items()})


# Minutes each. Begun last, one of them would leave all workers but its own idle.
LONGEST_FIRST = (
    "test_kernel_sources.py",
    "test_load_serving.py",
    "test_install.py",
    "test_quantize_run.py",
    "test_vllm_sources.py",
    "test_serving.py",
    "test_quantize_degenerate.py",
    "test_biases.py",
    "test_server.py",
    "test_kv_serving.py",
    "test_qoq_linear.py",
    "test_nested.py",
    "test_register.py",
)


half_products.hasten()

# torch, transformers and vLLM are a million objects that live to the end. Looking through them for
# garbage, again and again, takes 9 of the 22 s of processor time that collecting all tests takes.
gc.disable()


def pytest_collection_finish() -> None:
    """Leave what has been imported out of all collections of garbage."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Let libraries that look for leaks at the end find none.

    Python looks for garbage there in any case, and once more where it may.
    """
    gc.unfreeze()
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; skip GPU tests, with the reason, where they cannot run."""
    rank = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    reason = _why_no_gpu_tests()
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what has not run on a GPU since it was changed; CI has none."""
    if _why_no_gpu_tests():
        terminalreporter.section("GPU tests (make test-gpu)")
        for line in not_run_since():
            terminalreporter.write_line(line)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Undo what an engine of an earlier test in this process left as PyTorch's default dtype.

    It is a hook, which comes before the fixtures of a module, too.
    """
    if torch := sys.modules.get("torch"):
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A trained Llama of 2.1 M parameters in bf16 (tests/data/README.md)."""
    return DATA / "tiny-llama"


@pytest.fixture(scope="session")
def heldout_text() -> Path:
    """Text that the model was not trained on."""
    return DATA / "heldout.txt"


@pytest.fixture(scope="session")
def w8a8_dir(tiny_model: Path) -> Path:
    """llmcompressor's W8A8 of the model: SmoothQuant and GPTQ."""
    return _quantized(tiny_model, "w8a8")


@pytest.fixture(scope="session")
def w4a16_dir(tiny_model: Path) -> Path:
    """llmcompressor's W4A16 of the model: GPTQ in groups of 128."""
    return _quantized(tiny_model, "w4a16")


@pytest.fixture(scope="session")
def merged_dir(w8a8_dir: Path, w4a16_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both in one checkpoint: prompts in W8A8, generation in W4A16 up to a batch of 4."""
    out = tmp_path_factory.mktemp("merged") / "checkpoint"
    return merge(out, f"w8a8={w8a8_dir}", f"w4a16={w4a16_dir}", "--decode", "4:w4a16,w8a8")


@pytest.fixture(scope="session")
def merged_for_w4a16_dir(
    w8a8_dir: Path, w4a16_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same with the roles exchanged: it keeps W4A16's norms, so W4A16 is exact."""
    out = tmp_path_factory.mktemp("merged-w4a16") / "checkpoint"
    return merge(out, f"w8a8={w8a8_dir}", f"w4a16={w4a16_dir}", "--prefill", "w4a16")


@pytest.fixture(scope="session")
def w4a8_dir(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One QoQ set in groups of 128, by rounding."""
    return write_checkpoint(tiny_model, tmp_path_factory.mktemp("w4a8") / "checkpoint")


@pytest.fixture(scope="session")
def nested_dir(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`w4a8`, and `w8a8` as a residual on it."""
    return write_nested(tiny_model, tmp_path_factory.mktemp("nested") / "nested")


@pytest.fixture(scope="session")
def w4a8_per_channel_dir(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same per channel."""
    out = tmp_path_factory.mktemp("w4a8-channel") / "checkpoint"
    return write_checkpoint(tiny_model, out, PER_CHANNEL)


@pytest.fixture(scope="session")
def two_sets_dir(
    tiny_model: Path, w8a8_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """llmcompressor's W8A8 for prompts, QoQ for generation up to a batch of 4."""
    folder = tmp_path_factory.mktemp("two-sets")
    plain = write_plain(tiny_model, folder / "w4a8")
    arguments = (f"w8a8={w8a8_dir}", f"w4a8={plain}", "--decode", "4:w4a8,w8a8")
    return merge(folder / "checkpoint", *arguments)


@pytest.fixture(params=["0", "1"], ids=["runner-v1", "runner-v2"])
def runner(request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment that selects one of vLLM's model runners."""
    return {"VLLM_USE_V2_MODEL_RUNNER": request.param}


@pytest.fixture
def vllm_log() -> Iterator[list[str]]:
    """The messages that go to vLLM's log during the test."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def merge(out: Path, *arguments: str) -> Path:
    """Run the merge command, in this process."""
    from merge_tools.__main__ import main

    command = ["merge_tools", "merge", *arguments, "-o", str(out), "--quiet"]
    with patch.object(sys, "argv", command):
        assert main() == 0
    return out


def _quantized(model: Path, scheme: str) -> Path:
    """Quantize in a process of its own, once for as long as nothing that matters changes."""
    text = DATA / "calibration.txt"
    options = ["--scheme", scheme, "--text", str(text), "--samples", "16", "--seqlen", "256"]
    digest = hashlib.sha256(" ".join(options[4:]).encode())
    for file in (QUANTIZE, text, model / "model.safetensors", model / "tokenizer.json"):
        digest.update(file.read_bytes())
    out = ROOT / ".cache" / "test-checkpoints" / f"{scheme}-{digest.hexdigest()[:16]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.parent / f"{scheme}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if out.exists():
            return out
        partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
        command = [sys.executable, str(QUANTIZE), str(model), str(partial), *options]
        done = warm_process.run(command, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        partial.rename(out)
    return out


def _why_no_gpu_tests() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "no NVIDIA GPU on this machine"
    from vllm_qoq import cards

    if torch.cuda.get_device_capability() < cards.OLDEST:
        return f"needs a GPU of {cards.needed()}"
    return None

"""The device that this machine measures on: its name, and checks that it can serve."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from vllm_qoq import environment
from vllm_qoq.checkpoint.format import QOQ_LINEAR
from vllm_qoq.tuner import TuneError
from vllm_qoq.tuner.measurements import PREFILL_TOKENS, Key
from vllm_qoq.version import __version__

# What torch says in the words of its error, all that a rank in another process passes on.
_OUT_OF_MEMORY = "CUDA out of memory"


def key(checkpoint_digest: str, tensor_parallel_size: int) -> Key:
    """Make the key under which measurements of this checkpoint on this machine are kept."""
    return Key(
        device=name(),
        tensor_parallel_size=tensor_parallel_size,
        vllm_qoq=__version__,
        vllm=environment.describe()["packages"]["vllm"] or "unknown",
        checkpoint=checkpoint_digest,
    )


def name() -> str:
    """Name the GPU's model, or the CPU's and how many of its threads this process may use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {len(os.sched_getaffinity(0))} threads"


def check_sets(methods: Mapping[str, str]) -> None:
    """Raise TuneError where an engine with these sets (name -> quant_method) cannot start."""
    if find_spec("vllm") is None:
        raise TuneError("vLLM is not installed; install it: pip install 'vllm-qoq[vllm]'")
    import torch

    from vllm_qoq import ops

    of_ours = [set_name for set_name, method in methods.items() if method == QOQ_LINEAR]
    if of_ours and torch.cuda.is_available() and not ops.has_kernels("cuda"):
        raise TuneError(
            f"set {of_ours[0]!r} is measured, too, and {ops.missing_kernels()}; or tune where the "
            "checkpoint will be served, or write the routing into config.json by hand"
        )


def check_gpus(tensor_parallel_size: int) -> None:
    """Raise TuneError where there are GPUs, but fewer than the ranks that each need one."""
    import torch

    count = torch.cuda.device_count()
    if torch.cuda.is_available() and count < tensor_parallel_size:
        raise TuneError(
            f"--tensor-parallel-size {tensor_parallel_size}: torch finds {count} GPUs on this "
            "machine, and each rank needs one; give as many as there are, or tune on the machine "
            "that will serve"
        )


def check_consent(*, writes: bool, on_cpu: bool) -> None:
    """Raise TuneError where the routing of a CPU would be written and nobody asked for one."""
    import torch

    if writes and not on_cpu and not torch.cuda.is_available():
        raise TuneError(
            f"this machine has no GPU that torch {torch.__version__} can use, so the routing would "
            f"be that of its CPU ({name()}); tune on the GPU that will serve, look without writing "
            "with --dry-run, or write the CPU's routing with --on-cpu"
        )


@contextmanager
def within_memory(folder: Path) -> Iterator[None]:
    """Raise TuneError with a remedy where the GPU's memory does not hold what is measured."""
    import torch

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and _OUT_OF_MEMORY not in str(error):
            raise
        said = str(error).partition(". GPU")[0]
        raise TuneError(
            f"{folder}: all sets of the checkpoint together, and a prompt of {PREFILL_TOKENS[-1]} "
            f"tokens, need more memory than this GPU has free ({said}); stop what else runs on it, "
            "or tune on a larger one and copy the routing"
        ) from error


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())

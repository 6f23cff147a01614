"""What can be known and refused before the weights are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_tools import preflight
from vllm_qoq.checkpoint import Checkpoint
from vllm_qoq.quantize import QuantizeError, size
from vllm_qoq.quantize.architectures import Architecture, Shape, architecture
from vllm_qoq.quantize.options import Options
from vllm_qoq.quantize.text import pieces
from vllm_qoq.quantize.workdir import Resume, stored_bytes
from vllm_qoq.reference import GROUP_SIZE

_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Job:
    """Where a quantization reads and writes and what it shows, besides its `Options`.

    eval_text     text to measure the perplexity on, before and after
    sanity_check  whether to let every version continue a few words
    max_clipped   share of a layer's residuals that may be clipped in a nested set
    """

    model: Path
    out: Path
    text: Path
    work_dir: Path
    eval_text: Path | None = None
    sanity_check: bool = False
    max_clipped: float = 1.0
    resume: Resume = "auto"
    overwrite: bool = False
    max_shard_bytes: int = 5 * 10**9
    quiet: bool = False


@dataclass(frozen=True)
class Plan:
    """A checked job.

    linears  (outputs, inputs) of every layer to quantize
    samples  token ids of the calibration text
    windows  token ids of the evaluation text, none without one
    """

    arch: Architecture
    shape: Shape
    tokenizer: Any
    samples: list[list[int]]
    windows: list[list[int]]
    linears: list[tuple[int, int]]
    parameters: int
    sizes: size.Sizes


def make_plan(job: Job, options: Options) -> Plan:
    """Check everything that headers, texts and options tell.

    Raises QuantizeError, FormatError or MergeError with what is wrong and the remedy.
    """
    from transformers import AutoTokenizer

    checkpoint = Checkpoint.open(job.model)
    arch, shape = architecture(checkpoint.config), Shape.of(checkpoint.config)
    linears = _linears(checkpoint, arch, shape)
    preflight.check_output(job.out, [job.model], job.overwrite)
    for option, text in (("--text", job.text), ("--eval-text", job.eval_text)):
        if text is not None and not text.is_file():
            raise QuantizeError(f"{option} {text}: no such file")
    parameters = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    stored = stored_bytes(job.work_dir)
    size.check_apart(job.work_dir, job.out, job.model)
    needed = size.sizes(checkpoint, arch, shape, linears, options)
    # Both exist until the output is complete; the pieces of a stopped run do so already.
    to_come = max(needed.work - stored, 0)
    size.check_disks([(job.out, needed.output), (job.work_dir, to_come)])

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    windows = []
    if job.eval_text is not None:
        windows = pieces(job.eval_text, tokenizer, options.seqlen, None)
    return Plan(
        arch,
        shape,
        tokenizer,
        samples=pieces(job.text, tokenizer, options.seqlen, options.samples),
        windows=windows,
        linears=linears,
        parameters=parameters,
        sizes=needed,
    )


def _linears(checkpoint: Checkpoint, arch: Architecture, shape: Shape) -> list[tuple[int, int]]:
    sizes = []
    for index in range(shape.layers):
        for name in arch.linears:
            tensor = f"{arch.blocks}.{index}.{name}.weight"
            if tensor not in checkpoint.tensors:
                raise QuantizeError(f"{checkpoint.path}: {tensor} is missing; download it again")
            info = checkpoint.tensors[tensor]
            if info.dtype not in _FLOATS or len(info.shape) != 2:
                raise QuantizeError(
                    f"{info.file}: {tensor}: {info.dtype} {list(info.shape)} is not a matrix of "
                    "floats; give the model in bf16 or fp16"
                )
            n, k = info.shape
            if k % GROUP_SIZE or n % 8:
                raise QuantizeError(
                    f"{tensor}: [{n}, {k}] cannot be quantized: the kernels need inputs that are "
                    f"a multiple of {GROUP_SIZE} and outputs that are one of 8"
                )
            sizes.append((n, k))
    return sizes

"""What can be known and refused before the weights are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_tools import preflight
from merge_tools.progress import Progress
from vllm_qoq.quantize import QuantizeError
from vllm_qoq.quantize.architectures import Architecture, Shape
from vllm_qoq.quantize.inputs import Inputs, check_inputs
from vllm_qoq.quantize.options import Options
from vllm_qoq.quantize.text import pieces

if TYPE_CHECKING:
    from vllm_qoq.quantize.workdir import Resume

_BYTES_16_BIT = 2


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
    """A checked job. Bytes; the memory is the CPU's.

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
    output_bytes: int
    work_bytes: int
    memory_bytes: int


def make_plan(job: Job, options: Options) -> Plan:
    """Check everything that can be known before work begins, the weights' numbers at last.

    Raises QuantizeError, FormatError, TextError or MergeError with what is wrong and the remedy.
    """
    inputs = check_inputs(job)
    _check_divisible(inputs)
    checkpoint, arch, shape = inputs.checkpoint, inputs.arch, inputs.shape
    linears = inputs.linears
    parameters = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    quantized = sum(n * k for n, k in linears)
    shared = _BYTES_16_BIT * (parameters - quantized)
    if options.lm_head_bits == 8:
        # Where the embedding was the lm_head, the int8 one is new.
        vocabulary, hidden = checkpoint.tensors[f"{arch.embedding}.weight"].shape
        is_stored = f"{arch.head}.weight" in checkpoint.tensors
        shared += vocabulary * hidden * (1 - _BYTES_16_BIT if is_stored else 1)
    if options.rotate:
        shared += shape.hidden**2  # what turns hidden states back
    output = shared + sum(int(quantized * kind.bits / 8) for kind in options.kinds)
    work = output + _BYTES_16_BIT * quantized  # the weights that make the next block's inputs
    preflight.check_space(job.out, output)
    preflight.check_space(job.work_dir, work)

    from vllm_qoq.quantize import load

    load.check_model(checkpoint)
    tokenizer = load.load_tokenizer(checkpoint)
    windows = []
    if job.eval_text is not None:
        windows = pieces(job.eval_text, tokenizer, options.seqlen, None)
    samples = pieces(job.text, tokenizer, options.seqlen, options.samples)
    load.check_values(checkpoint, Progress(job.quiet))
    hessians = 4 * sum(k * k for _, k in linears) // shape.layers
    return Plan(
        arch,
        shape,
        tokenizer,
        samples=samples,
        windows=windows,
        linears=linears,
        parameters=parameters,
        output_bytes=output,
        work_bytes=work,
        memory_bytes=checkpoint.total_bytes + 2 * hessians,
    )


def _check_divisible(inputs: Inputs) -> None:
    from vllm_qoq.reference import GROUP_SIZE

    for name, (n, k) in zip(inputs.arch.linears, inputs.linears, strict=False):  # all blocks alike
        if k % GROUP_SIZE or n % 8:
            raise QuantizeError(
                f"{inputs.arch.blocks}.0.{name}.weight: [{n}, {k}] cannot be quantized: the "
                f"kernels need inputs that are a multiple of {GROUP_SIZE} and outputs that are "
                "one of 8"
            )

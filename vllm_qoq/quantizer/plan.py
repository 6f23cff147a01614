"""The plan of a quantization: what can be known and refused before its work begins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_qoq.checkpoint.language import stored_name
from vllm_qoq.checkpoint.shards import MAX_SHARD_BYTES
from vllm_qoq.models.names import split_expert
from vllm_qoq.models.table import LayerNames
from vllm_qoq.models.tensors import EMBEDDING
from vllm_qoq.numerics import EXPERT_GROUP_SIZES, EXPERT_MULTIPLE
from vllm_qoq.progress import Progress
from vllm_qoq.quantizer import QuantizeError, size
from vllm_qoq.quantizer.inputs import Inputs, check_inputs
from vllm_qoq.quantizer.model import Dimensions
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.text import check_tokens, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vllm_qoq.quantizer.workdir import Resume

# vLLM's int8 GEMM on GPUs reads 16 inputs at a time, ours writes 8 outputs.
_INPUTS_MULTIPLE, _OUTPUTS_MULTIPLE = 16, 8


@dataclass(frozen=True)
class Job:
    """A quantization as it is asked for: what it reads, writes and shows, besides its options.

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
    max_shard_bytes: int = MAX_SHARD_BYTES
    quiet: bool = False


@dataclass(frozen=True)
class CheckedJob:
    """A job that can be done, with all that was found out for it.

    options  with what depends on the model decided
    linears  (outputs, inputs) of every layer to quantize, by its name and block by block
    samples  token ids of the calibration text
    windows  token ids of the evaluation text, none without one
    """

    job: Job
    options: QuantizeOptions
    names: LayerNames
    dimensions: Dimensions
    tokenizer: PreTrainedTokenizerBase
    samples: list[list[int]]
    windows: list[list[int]]
    linears: dict[str, tuple[int, int]]
    parameters: int
    sizes: size.Sizes

    @property
    def stacks(self) -> list[size.Stack]:
        """The layers that read one input, taken together, of all blocks."""
        blocks = size.stacks(self.names, self.dimensions.layers, self.linears)
        return [stack for block in blocks for stack in block]


def default_work_dir(out: Path) -> Path:
    """The folder for finished layers, unless the user says otherwise: OUT with .work behind."""
    resolved = out.resolve()  # "." has no name
    return resolved.parent / f"{resolved.name}.work"


def check_job(job: Job, options: QuantizeOptions) -> CheckedJob:
    """Check everything that can be known before work begins, and the weights' numbers last.

    Raises QuantizeError, FormatError, TextError or OutputError with what is wrong and the remedy.
    """
    inputs = check_inputs(job)
    _check_divisible(inputs, options)
    options = options.of_model(inputs.names).of_heads(inputs.dimensions.head_dim)

    import torch

    from vllm_qoq.quantizer import load, rounding
    from vllm_qoq.quantizer.workdir import stored_bytes

    checkpoint, names, dimensions = inputs.checkpoint, inputs.names, inputs.dimensions
    linears = inputs.linears
    parameters = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    stored = stored_bytes(job.work_dir)
    size.check_apart(job.work_dir, job.out, job.model)
    needed = size.sizes(checkpoint, names, dimensions, linears=linears, options=options)
    # Output and pieces exist together in the end; those of a stopped run are there already.
    to_come = max(needed.work - stored, 0)
    size.check_disks([(job.out, needed.output), (job.work_dir, to_come)])

    load.check_model(checkpoint)
    load.check_towers(checkpoint)
    tokenizer = load.load_tokenizer(checkpoint)
    rows, _ = checkpoint.tensors[EMBEDDING].shape
    windows = []
    if job.eval_text is not None:
        windows = pieces(job.eval_text, tokenizer, options.seqlen, None)
        check_tokens(job.eval_text, windows, tokenizer, rows)
    samples = pieces(job.text, tokenizer, options.seqlen, options.samples)
    check_tokens(job.text, samples, tokenizer, rows)
    if torch.cuda.is_available():
        rounding.require(torch.device("cuda"))
    load.check_values(checkpoint, Progress(job.quiet))
    return CheckedJob(
        job=job,
        options=options,
        names=names,
        dimensions=dimensions,
        tokenizer=tokenizer,
        samples=samples,
        windows=windows,
        linears=linears,
        parameters=parameters,
        sizes=needed.with_samples(len(samples), options.samples),
    )


def _check_divisible(inputs: Inputs, options: QuantizeOptions) -> None:
    has_whole_groups = "w4a16" in options.sets and options.group_size != -1
    for name, (n, k) in inputs.linears.items():
        place = f"{stored_name(f'{name}.weight', inputs.checkpoint.tensors)}: [{n}, {k}]"
        if k % _INPUTS_MULTIPLE or n % _OUTPUTS_MULTIPLE:
            raise QuantizeError(
                f"{place} cannot be quantized: the kernels need inputs that are a multiple of "
                f"{_INPUTS_MULTIPLE} and outputs that are one of {_OUTPUTS_MULTIPLE}; give another "
                "model"
            )
        if split_expert(name) is not None:
            _check_expert(place, (n, k), options)
        if has_whole_groups and k % options.group_size:
            is_expert = split_expert(name) is not None
            other = ", or --sets w8a8,w4a8, whose last group may be smaller"
            raise QuantizeError(
                f"{place} cannot be quantized to w4a16 in groups: vLLM's kernels for it need "
                f"inputs that are a multiple of {options.group_size}; give --group-size -1"
                f"{'' if is_expert else other}"
            )


def _check_expert(place: str, size: tuple[int, int], options: QuantizeOptions) -> None:
    """Raise QuantizeError for an expert in w4a8 that no kernel computes."""
    if "w4a8" not in options.sets:
        return
    if options.group_size not in EXPERT_GROUP_SIZES:
        raise QuantizeError(
            f"{place} cannot be quantized to w4a8 in groups of {options.group_size}: the kernels "
            f"for experts have {' and '.join(map(str, EXPERT_GROUP_SIZES))}; give --group-size 128"
            f"{'' if options.nested else ' or -1'}"
        )
    if any(one % EXPERT_MULTIPLE for one in size):
        raise QuantizeError(
            f"{place} cannot be quantized to w4a8: the kernels for experts need hidden and "
            f"intermediate sizes that are multiples of {EXPERT_MULTIPLE}; give --sets w8a8, or "
            "--sets w8a8,w4a16 --group-size -1"
        )

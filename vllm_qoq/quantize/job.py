"""A quantization from start to end: check, transform, two passes, write."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merge_tools import preflight
from vllm_qoq.checkpoint import CONFIG, Checkpoint
from vllm_qoq.quantize import QuantizeError, rotate
from vllm_qoq.quantize.architectures import Architecture, Shape, architecture, blocks
from vllm_qoq.quantize.assemble import SHARED, write_checkpoint
from vllm_qoq.quantize.modifiers import MagnitudePass, QuantizePass, apply_saved, piece
from vllm_qoq.quantize.options import Options
from vllm_qoq.quantize.report import LayerError, summary
from vllm_qoq.quantize.smooth import SmoothOptions
from vllm_qoq.quantize.text import pieces
from vllm_qoq.quantize.workdir import Resume, WorkDir
from vllm_qoq.reference import GROUP_SIZE

_SMOOTHING = "smoothing"


@dataclass(frozen=True)
class Job:
    """Where a quantization reads and writes, besides its `Options`."""

    model: Path
    out: Path
    text: Path
    work_dir: Path
    resume: Resume
    overwrite: bool
    max_shard_bytes: int
    quiet: bool


@dataclass(frozen=True)
class Plan:
    """What is known before the weights are read. Bytes."""

    parameters: int
    quantized_parameters: int
    output_bytes: int
    work_bytes: int
    memory_bytes: int


def plan(job: Job, options: Options) -> Plan:
    """Check everything that headers and options tell; QuantizeError or FormatError says what."""
    checkpoint = Checkpoint.open(job.model)
    arch = architecture(checkpoint.config)
    shape = Shape.of(checkpoint.config)
    preflight.check_output(job.out, [job.model], job.overwrite)
    if not job.text.is_file():
        raise QuantizeError(f"--text {job.text}: no such file")
    quantized = 0
    largest = 0
    for index in range(shape.layers):
        for name in arch.linears:
            tensor = f"{arch.blocks}.{index}.{name}.weight"
            if tensor not in checkpoint.tensors:
                raise QuantizeError(f"{job.model}: {tensor} is missing")
            n, k = checkpoint.tensors[tensor].shape
            if k % GROUP_SIZE or n % 8:
                raise QuantizeError(
                    f"{tensor}: [{n}, {k}] cannot be quantized: inputs must be a multiple of "
                    f"{GROUP_SIZE} and outputs of 8"
                )
            quantized += n * k
            largest = max(largest, k)
    parameters = sum(info.nbytes for info in checkpoint.tensors.values()) // 2
    rest = 2 * (parameters - quantized)
    sets = sum(int(quantized * kind.bits / 8) for kind in options.kinds)
    found = Plan(
        parameters=parameters,
        quantized_parameters=quantized,
        output_bytes=rest + sets,
        work_bytes=rest + sets + 2 * quantized,
        memory_bytes=2 * parameters + 16 * largest * largest,
    )
    preflight.check_space(job.out, found.output_bytes + found.work_bytes)
    return found


def run(job: Job, options: Options) -> dict[str, Any]:
    """Quantize; returns the report. A stopped run leaves only its work folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.monotonic()
    plan(job, options)
    content = json.loads((job.model / CONFIG).read_text(encoding="utf-8"))
    arch, shape = architecture(content), Shape.of(content)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    samples = pieces(job.text, tokenizer, options.seqlen, options.samples)
    work = WorkDir(job.work_dir, fingerprint(job, options), job.resume)

    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    rotate.untie(model, arch)
    if options.rotate:
        rotate.fold_norms(model, arch)
        rotate.rotate_stream(model, arch, shape)
        rotate.rotate_values(model, arch, shape)
    _smooth(model, arch, shape, options, samples, work, job.quiet)
    if not work.has(SHARED):
        work.save(SHARED, _shared(model, arch), {})
    if not all(work.has(piece(i)) for i in range(shape.layers)):
        _quantize(model, arch, shape, options, samples, work, job.quiet)

    errors: list[LayerError] = [row for i in range(shape.layers) for row in work.load(piece(i))[1]]
    report = {
        "model": job.model.name,
        "options": options.model_dump(mode="json"),
        **summary(errors, time.monotonic() - started),
    }
    write_checkpoint(
        job.out,
        job.model,
        work,
        arch,
        shape.layers,
        options,
        report,
        job.max_shard_bytes,
        job.overwrite,
    )
    work.remove()
    return report


def fingerprint(job: Job, options: Options) -> dict[str, Any]:
    """What the pieces in a work folder depend on."""
    checkpoint = Checkpoint.open(job.model)
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        stat = (checkpoint.path / file).stat()
        digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode())
    return {
        "model": digest.hexdigest(),
        "text": hashlib.sha256(job.text.read_bytes()).hexdigest(),
        **options.model_dump(mode="json", exclude={"kv_bits"}),
    }


def _smooth(
    model: Any,
    arch: Architecture,
    shape: Shape,
    options: Options,
    samples: list[list[int]],
    work: WorkDir,
    quiet: bool,
) -> None:
    wanted = SmoothOptions(options.smooth_attention, options.smooth_output, options.reorder)
    if not (wanted.attention or wanted.output or wanted.reorder):
        return
    if work.has(_SMOOTHING):
        found, _ = work.load(_SMOOTHING)
        apply_saved(model, found, arch, shape)
        return
    step = MagnitudePass(
        arch=arch, shape=shape, options=wanted, done=_Clock("smoothed", shape.layers, quiet)
    )
    _pipeline(model, step, samples)
    work.save(_SMOOTHING, step.found, {})


def _quantize(
    model: Any,
    arch: Architecture,
    shape: Shape,
    options: Options,
    samples: list[list[int]],
    work: WorkDir,
    quiet: bool,
) -> None:
    step = QuantizePass(
        arch=arch,
        shape=shape,
        sets=options.kinds,
        use_gptq=options.gptq,
        clip=options.clip,
        work=work,
        done=_Clock("quantized", shape.layers, quiet),
    )
    _pipeline(model, step, samples)


def _pipeline(model: Any, step: Any, samples: list[list[int]]) -> None:
    from llmcompressor import oneshot

    batches: Any = [
        {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens)).long()}
        for tokens in samples
    ]
    # In this order always: a resumed run must see the same.
    data: Any = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False)
    oneshot(model=model, recipe=[step], dataset=data, pipeline="sequential")


def _shared(model: Any, arch: Architecture) -> dict[str, torch.Tensor]:
    """Everything but the quantized layers."""
    mine = {
        f"{arch.blocks}.{i}.{name}."
        for i in range(len(blocks(model, arch)))
        for name in arch.linears
    }
    state = model.state_dict()
    return {k: v for k, v in state.items() if k.rpartition(".")[0] + "." not in mine}


class _Clock:
    """Says on stderr how far the run is, and how long the rest will take."""

    def __init__(self, verb: str, total: int, quiet: bool) -> None:
        self._verb, self._total, self._quiet = verb, total, quiet
        self._started, self._done = time.monotonic(), 0

    def __call__(self, index: int) -> None:
        self._done += 1
        left = (time.monotonic() - self._started) / self._done * (self._total - self._done)
        if not self._quiet:
            print(
                f"{self._verb} block {index + 1} of {self._total}, about {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

"""A quantization from start to end: check, transform, two passes, write."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_qoq.checkpoint import hub
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.checkpoint.format import STREAM
from vllm_qoq.checkpoint.kv_config import UNQUANTIZED, Bits
from vllm_qoq.checkpoint.language import LanguagePart, language_part, unused
from vllm_qoq.checkpoint.shards import MAX_SHARD_BYTES, write_checkpoint
from vllm_qoq.models.config import CONFIG
from vllm_qoq.models.table import LayerNames
from vllm_qoq.numerics import GROUP_SIZES, MAX_CLIPPED
from vllm_qoq.progress import Clock, Progress
from vllm_qoq.quantizer import changes, head, keys, noise, pipeline, rotate, smooth, towers, workdir
from vllm_qoq.quantizer.assemble import SHARED, content, in_output
from vllm_qoq.quantizer.attention import fused_attention
from vllm_qoq.quantizer.check import PROMPT_TOKENS, SetCheck
from vllm_qoq.quantizer.gguf_source.convert import source_of
from vllm_qoq.quantizer.inputs import check_inputs, is_tied, stays_tied, with_local_model
from vllm_qoq.quantizer.load import load_model
from vllm_qoq.quantizer.model import Module, blocks
from vllm_qoq.quantizer.modifiers import QuantizePass, SmoothPass, apply_saved, piece
from vllm_qoq.quantizer.observe import SMOOTHING_TOKENS
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.plan import CheckedJob, Job, check_job, default_work_dir
from vllm_qoq.quantizer.products import fast_products
from vllm_qoq.quantizer.report import (
    LayerError,
    Steps,
    left_out,
    refuse_clipped,
    starved,
    starved_warning,
    steps_that_ran,
    summary,
)
from vllm_qoq.quantizer.smooth import SmoothOptions
from vllm_qoq.quantizer.text import spread
from vllm_qoq.quantizer.workdir import Resume, WorkDir
from vllm_qoq.quantizer.worst import worst_layers
from vllm_qoq.version import __version__

_SMOOTHING = "smoothing"
_PROMPTS = 2
_TOKENIZER_FILES = ("tokenizer", "vocab", "merges.txt", "special_tokens_map", "added_tokens")
# The pieces depend on these: on the code of the model, the rotations and their signs.
_LIBRARIES = ("torch", "transformers", "compressed-tensors", "llmcompressor")


@dataclass(frozen=True)
class Quantized:
    """The result of a quantization.

    output  the folder of the checkpoint
    report  the content of its quantization_report.json
    """

    output: Path
    report: Mapping[str, Any]


def quantize(
    model: str | Path,
    output: str | Path,
    text: str | Path,
    options: QuantizeOptions | None = None,
    *,
    work_dir: str | Path | None = None,
    eval_text: str | Path | None = None,
    sanity_check: bool = False,
    max_clipped: float = MAX_CLIPPED,
    resume: Resume = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    quiet: bool = True,
) -> Quantized:
    """Make a checkpoint with all sets from a model in floating point.

    model            folder of a Hugging Face model in bf16 or fp16, or its id on the Hub, which
                     is downloaded first: ORG/NAME or ORG/NAME@REVISION
    output           the folder to make
    text             file with calibration text in UTF-8
    options          which sets, and how they are made; by default w8a8 for prompts and w4a8 for
                     generation
    work_dir         for finished layers, by default OUTPUT with .work behind; a run that was
                     stopped goes on there
    eval_text        text to measure the perplexity on, before and after
    sanity_check     whether to let every version continue a few words
    max_clipped      share of a layer's residuals that may be clipped in a nested set
    resume           whether to go on with what `work_dir` holds: "auto", "required" or "never"
    max_shard_bytes  size of a file with weights, at most
    overwrite        replace an older output, if it is ours
    quiet            print no progress

    Raises UserError with what is wrong and what to do, before work begins; an output is complete or
    absent.
    """
    out = Path(output)
    job = Job(
        model=Path(model),
        out=out,
        text=Path(text),
        work_dir=Path(work_dir) if work_dir is not None else default_work_dir(out),
        eval_text=Path(eval_text) if eval_text is not None else None,
        sanity_check=sanity_check,
        max_clipped=max_clipped,
        resume=resume,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
        quiet=quiet,
    )
    job = with_local_model(job, model)
    check_inputs(job)
    noise.hide_bars()
    noise.import_llmcompressor()
    return Quantized(out, run(job, options or QuantizeOptions()))


def prepare(job: Job, options: QuantizeOptions) -> CheckedJob:
    """Check everything that can be refused before the work begins; returns the checked job."""
    plan = check_job(job, options)
    rotate.require_sizes(
        [plan.dimensions.hidden] * plan.options.turns_stream
        + [plan.dimensions.head_dim] * _turns_values(plan)
    )
    workdir.check(job.work_dir, fingerprint(job, plan), job.resume)
    return plan


def run(job: Job, options: QuantizeOptions) -> dict[str, Any]:
    """Quantize and write the checkpoint; returns the report.

    A stopped run leaves only its work folder.
    """
    steps = Steps()
    plan = prepare(job, options)
    steps.done("checks")
    names, dimensions, options = plan.names, plan.dimensions, plan.options
    check = _check(job, options, plan)
    if not (job.quiet or torch.cuda.is_available()):
        print("no GPU here: quantizing on the CPU", file=sys.stderr, flush=True)

    with (
        WorkDir.open(job.work_dir, fingerprint(job, plan), job.resume) as work,
        fast_products(),
        fused_attention(),
    ):
        model, folded = _load(job.model, names), {}
        steps.done("loading")
        before = check.measure(model, "the model")
        steps.done("measuring the model")
        if options.turns_stream:
            if not work.has(STREAM):
                work.save(STREAM, rotate.way_back(model, names, dimensions), {})
            folded = changes.folded_norms(model, names)
            rotate.rotate_stream(model, names, dimensions)
        steps.done("rotating")
        k_means = _smooth(model, plan, options, work, quiet=job.quiet)
        steps.done("smoothing")
        if _turns_values(plan):
            rotate.rotate_values(model, names, dimensions)  # after the channels have been smoothed
        biased = keys.large_biases(model, names, dimensions, options)
        biased = [in_output(job.model, layer) for layer in biased]
        if biased:
            print(f"warning: {keys.warning(biased, options)}", file=sys.stderr, flush=True)
        if not work.has(SHARED):
            original = language_part(Checkpoint.open(job.model))
            is_one = stays_tied(is_tied(original.config), options)
            shared = _shared(model, names, options, is_one)
            shared |= {name: original.get(name) for name in shared if names.keeps(name)}
            shared |= smooth.named_means(k_means or {}, names)
            if options.turns_stream and isinstance(original, LanguagePart):
                shared |= towers.rotated(original, rotate.hadamard(dimensions.hidden))
            work.save(SHARED, shared, {})
        if not all(work.has(piece(i)) for i in range(dimensions.layers)):
            _quantize(model, plan, options, work, quiet=job.quiet)
        steps.done("rounding")

        errors: list[LayerError] = [
            row for index in range(dimensions.layers) for row in work.facts(piece(index))
        ]
        for row in errors:
            row["layer"] = in_output(job.model, row["layer"])
        few = starved(errors)
        if few:
            print(f"warning: {starved_warning(few, options)}", file=sys.stderr, flush=True)
        refuse_clipped(errors, job.max_clipped)
        if options.lm_head_bits == 8:
            head.round_weight(model, names)
        after = {
            kind.name: check.measure_set(
                model, names, kind, _results(work, dimensions.layers), k_means
            )
            for kind in options.kinds
        }
        steps.done("measuring the sets")
        report = {
            "model": hub.name_of(job.model),
            **({"source": source} if (source := source_of(job.model)) is not None else {}),
            "options": options.model_dump(mode="json"),
            "effort": options.effort,
            "steps": steps_that_ran(options, len(plan.samples)),
            **left_out(names, options, unused(Checkpoint.open(job.model))),
            **worst_layers(errors, options.sets),
            **summary(errors, steps.seconds),
            **({"starved_experts": few} if few else {}),
            **({"large_key_biases": biased} if biased else {}),
            **({"before": before, "after": after} if before else {}),
        }
        write_checkpoint(
            job.out,
            content(
                job,
                work,
                names,
                layers=dimensions.layers,
                options=options,
                report=report,
                changes=changes.stored(
                    names,
                    folded,
                    work.load(_SMOOTHING) if work.has(_SMOOTHING) else {},
                    rotate.hadamard(dimensions.head_dim) if _turns_values(plan) else None,
                ),
            ),
            job.overwrite,
            Progress(quiet=True),
        )
        work.remove()
    return report


def _turns_values(plan: CheckedJob) -> bool:
    return bool(plan.options.rotate) and plan.names.fixed_values is None


def _results(work: WorkDir, layers: int) -> Iterator[dict[str, torch.Tensor]]:
    return (work.load(piece(index)) for index in range(layers))


def _check(job: Job, options: QuantizeOptions, plan: CheckedJob) -> SetCheck:
    prompts = plan.samples[:_PROMPTS] if job.sanity_check else []
    prompts = [sample[:PROMPT_TOKENS] for sample in prompts]
    kv_bits: tuple[Bits, ...] = (UNQUANTIZED,)
    if options.is_cache_quantized:
        kv_bits += (options.kv_bits,)
    return SetCheck(
        tokenizer=plan.tokenizer,
        windows=plan.windows,
        prompts=prompts,
        kv_bits=kv_bits,
        kv_hadamard=bool(options.kv_hadamard),
        has_int8_head=options.lm_head_bits == 8,
        quiet=job.quiet,
    )


def _load(folder: Path, names: LayerNames) -> Module:
    """Load the model into the CPU's memory; layers are brought to a GPU when they are used."""
    model = load_model(language_part(Checkpoint.open(folder)))
    rotate.untie(model, names)
    pipeline.bring_to_gpu_when_used(model)
    return model


def fingerprint(job: Job, plan: CheckedJob) -> dict[str, Any]:
    """Describe all that the pieces in a work folder depend on."""
    checkpoint = Checkpoint.open(job.model)
    weights = {
        file: f"{(checkpoint.path / file).stat().st_size} bytes, {_sampled(checkpoint, file)}"
        for file in sorted({info.file for info in checkpoint.tensors.values()})
    }
    tokenizer = {
        file.name: _sha256(file.read_bytes())
        for file in sorted(checkpoint.path.iterdir())
        if file.name.startswith(_TOKENIZER_FILES) and file.is_file()
    }
    return {
        f"the model's {CONFIG}": _sha256(json.dumps(checkpoint.config, sort_keys=True).encode()),
        "the model's weights": weights,
        "the tokenizer": tokenizer,
        "the text": _sha256(job.text.read_bytes()),
        # Options come first: the first difference is named, and they decide on the tokens.
        **plan.options.model_dump(mode="json"),
        "the text's tokens": _sha256(json.dumps(plan.samples).encode()),
        "the version of vllm-qoq": __version__,
        **{f"the version of {name}": version(name) for name in _LIBRARIES},
    }


def _sampled(checkpoint: Checkpoint, file: str) -> str:
    """Digest a few rows of every tensor of a file: a copy is the same, and little is read."""
    digest = hashlib.sha256()
    with safe_open(checkpoint.path / file, "pt") as opened:
        for name in sorted(opened.keys()):
            rows = opened.get_slice(name)
            shape = rows.get_shape()
            digest.update(f"{name} {rows.get_dtype()} {shape}".encode())
            for row in sorted({0, shape[0] // 2, shape[0] - 1}) if shape and all(shape) else ():
                value = rows[row : row + 1].contiguous()
                digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return f"sha256 {digest.hexdigest()[:16]} of some rows"


def _sha256(content: bytes) -> str:
    return f"sha256 {hashlib.sha256(content).hexdigest()[:16]}"


def _smooth(
    model: Module, plan: CheckedJob, options: QuantizeOptions, work: WorkDir, quiet: bool
) -> dict[int, torch.Tensor] | None:
    """Smooth the model; returns the means of K, float32 [kv_heads, head_dim], by block."""
    wanted = SmoothOptions(
        k_mean=options.has_k_mean,
        # A 16-bit cache rounds nothing that a scale could help.
        attention=options.smooth_attention and options.is_cache_quantized,
        outputs=options.smooth_outputs,
        reorder=options.reorder,
        key_bits=options.key_bits,
        weight_bits=min(int(kind.bits) for kind in options.kinds),
        # Rows whose scale is one are smoothed as if they had the largest groups.
        group_size=GROUP_SIZES[0] if options.group_size == -1 else options.group_size,
        kv_hadamard=bool(options.kv_hadamard),
    )
    if not (wanted.k_mean or wanted.attention or wanted.outputs or wanted.reorder):
        return None
    if work.has(_SMOOTHING):
        found = work.load(_SMOOTHING)
        apply_saved(model, found, plan.names, plan.dimensions)
        return smooth.k_means(found) if wanted.k_mean else None
    samples = spread(plan.samples, -(-SMOOTHING_TOKENS // options.seqlen))
    step = SmoothPass(
        names=plan.names,
        dimensions=plan.dimensions,
        options=wanted,
        samples=len(samples),
        done=Clock("smoothing, block", plan.dimensions.layers, quiet),
    )
    # Smoothing keeps the function of a block, so its outputs from before serve the next one.
    pipeline.run(model, step, samples, plan.tokenizer, propagate=False)
    apply_saved(model, step.found, plan.names, plan.dimensions)
    work.save(_SMOOTHING, step.found, {})
    return smooth.k_means(step.found) if wanted.k_mean else None


def _quantize(
    model: Module, plan: CheckedJob, options: QuantizeOptions, work: WorkDir, quiet: bool
) -> None:
    step = QuantizePass(
        names=plan.names,
        dimensions=plan.dimensions,
        sets=options.kinds,
        use_gptq=options.gptq,
        clip=options.clip,
        passes=options.passes,
        min_expert_tokens=options.min_expert_tokens,
        work=work,
        done=Clock("quantizing, block", plan.dimensions.layers, quiet),
    )
    try:
        pipeline.run(model, step, plan.samples, plan.tokenizer, propagate=True)
    finally:
        step.close()


def _shared(
    model: Module, names: LayerNames, options: QuantizeOptions, is_tied: bool
) -> dict[str, torch.Tensor]:
    """The tensors that all sets share, by name; without lm_head where the embedding `is_tied`."""
    mine = {
        f"{names.blocks}.{i}.{name}."
        for i in range(len(blocks(model, names)))
        for name in names.of_block(i).linears
    }
    state = model.state_dict()
    shared = {k: v for k, v in state.items() if k.rpartition(".")[0] + "." not in mine}
    if is_tied:
        del shared[f"{names.head}.weight"]
    return shared | (head.int8_tensors(model, names) if options.lm_head_bits == 8 else {})

"""The command `quantize`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vllm_qoq.cli import arguments
from vllm_qoq.cli.output import stdout_for
from vllm_qoq.cli.parser import Commands, Parser
from vllm_qoq.quantizer.effort import EFFORTS

if TYPE_CHECKING:
    from vllm_qoq.quantizer.options import QuantizeOptions
    from vllm_qoq.quantizer.plan import CheckedJob, Job


def add_parser(commands: Commands[Parser]) -> None:
    """Add the command to those of the program.

    Options that a recipe may set have no default here, so that what is not given is the recipe's.
    """
    parser = commands.add_parser("quantize", help="make all sets from a Hugging Face model")
    what = "folder of a model in bf16, fp16 or fp32, or GGUF"
    arguments.add_checkpoint(parser, "model", "MODEL", what)
    arguments.add_output(parser)
    parser.add_argument("--text", type=Path, required=True, help="calibration text, UTF-8")
    parser.add_argument(
        "--sets",
        metavar="NAME,...",
        help="of w8a8, w4a8, w4a16; prompts run in the first, generation in the last "
        "(default: w8a8,w4a8)",
    )
    parser.add_argument(
        "--nested",
        action="store_true",
        default=None,
        help="store w8a8 as 4 bits on top of w4a8's, which stay the same",
    )
    arguments.add_max_clipped(parser)
    parser.add_argument("--group-size", type=int, choices=(128, 64, 32, -1), help="default: 128")
    parser.add_argument(
        "--kv-bits",
        type=arguments.kv_bits,
        choices=arguments.KV_BITS,
        help="KV cache to prepare for (default: 4)",
    )
    parser.add_argument(
        "--kv-hadamard",
        action=argparse.BooleanOptionalAction,
        help="rotate K in the KV cache (default: where heads have a power of two of channels)",
    )
    parser.add_argument(
        "--lm-head-bits", type=int, choices=(8, 16), help="8 for an int8 lm_head (default: 16)"
    )
    parser.add_argument(
        "--effort",
        choices=tuple(EFFORTS),
        help="how much time it may take: a name for several options, of which those that are given "
        "win (default: default)",
    )
    parser.add_argument("--samples", type=int, help="pieces of text (default: 128)")
    parser.add_argument("--seqlen", type=int, help="tokens a piece (default: 1024)")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="JSON object of these options")
    parser.add_argument(
        "--passes", type=int, metavar="N", help="of descent after GPTQ (default: 3)"
    )
    parser.add_argument(
        "--min-expert-tokens",
        type=int,
        metavar="N",
        help="an expert that fewer tokens of the text go through is rounded to the nearest "
        "(default: 128)",
    )
    _add_steps(parser.add_argument_group("steps to leave out, for ablations"))
    parser.add_argument("--eval-text", type=Path, help="measure perplexity before and after")
    parser.add_argument(
        "--sanity-check", action="store_true", help="show a few generated words before and after"
    )
    parser.add_argument(
        "--work-dir", type=Path, help="for finished layers (default: OUT with .work behind)"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="required",
        default="auto",
        choices=("auto", "required", "never"),
        help="whether to go on with what --work-dir holds (default: auto)",
    )
    arguments.add_max_shard_size(parser)
    arguments.add_dry_run(parser)
    arguments.add_reporting(parser, _quantize)


_STEPS = {
    "rotate": "Hadamard rotations of the residual stream and of V",
    "k_mean": "the mean of K, which the KV cache leaves out",
    "smooth_attention": "scales that make K even",
    "smooth_outputs": "scales that make the inputs of o_proj and down_proj even",
    "reorder": "order of down_proj's inputs",
    "clip": "search of scales that clip",
    "gptq": "passing rounding errors on",
}


def _add_steps(group: argparse._ArgumentGroup) -> None:
    for name, text in _STEPS.items():
        option = "--no-" + name.replace("_", "-")
        group.add_argument(option, dest=name, action="store_false", default=None, help=text)


_OPTIONS = (
    *("nested", "group_size", "kv_bits", "kv_hadamard", "lm_head_bits", "effort"),
    *("samples", "seqlen", "passes", "min_expert_tokens", *_STEPS),
)


def _quantize(args: argparse.Namespace) -> int:
    from vllm_qoq.quantizer.inputs import check_inputs, with_local_model

    job, options = _job(args)
    job = with_local_model(job, args.model)
    check_inputs(job)  # before the imports, which take seconds
    with stdout_for(sys.stderr.fileno()) as out:  # llmcompressor logs there
        return _run(args, job, options, out)


def _job(args: argparse.Namespace) -> tuple[Job, QuantizeOptions]:
    from vllm_qoq.quantizer.options import QuantizeOptions
    from vllm_qoq.quantizer.plan import Job, default_work_dir

    given = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    if args.sets is not None:
        given["sets"] = args.sets.split(",")
    job = Job(
        model=Path(args.model),
        out=args.output,
        text=args.text,
        work_dir=args.work_dir or default_work_dir(args.output),
        eval_text=args.eval_text,
        sanity_check=args.sanity_check,
        max_clipped=args.max_clipped,
        resume=args.resume,
        overwrite=args.overwrite,
        max_shard_bytes=args.max_shard_size,
        quiet=args.quiet or args.json,
    )
    return job, QuantizeOptions.read(args.recipe, given)


def _run(args: argparse.Namespace, job: Job, options: QuantizeOptions, out: TextIO) -> int:
    from vllm_qoq.quantizer import noise

    noise.hide_bars(owns_process=True)
    noise.import_llmcompressor()
    from vllm_qoq.quantizer.job import prepare, run

    try:
        if args.dry_run:
            plan = prepare(job, options)
            text = _plan_document(plan) if args.json else _plan_text(plan)
        else:
            report = run(job, options)
            text = _document(job.out, report) if args.json else _text(job.out, report)
    except KeyboardInterrupt:
        work = job.work_dir
        kept = f"{work} has what is done, the same command goes on there"
        # A run removes its work folder if no piece in it is finished.
        print(f"interrupted; {kept if work.exists() else 'nothing is left'}", file=sys.stderr)
        return 130
    print(text, file=out)
    return 0


def _plan_document(plan: CheckedJob) -> str:
    from vllm_qoq.quantizer import estimate

    sizes = plan.sizes
    return json.dumps(
        {
            "output": str(plan.job.out),
            "dry_run": True,
            "options": plan.options.model_dump(mode="json"),
            "parameters": plan.parameters,
            "quantized_layers": len(plan.linears),
            "samples": len(plan.samples),
            "output_bytes": sizes.output,
            "lm_head_bytes": sizes.head,
            "work_bytes": sizes.work,
            "disk_bytes": sizes.output + sizes.work,
            "memory_bytes": sum(sizes.memory.values()),
            "memory": sizes.memory,
            "seconds": round(estimate.seconds(plan.stacks, plan.options, len(plan.samples))),
        }
    )


def _plan_text(plan: CheckedJob) -> str:
    import torch

    from vllm_qoq.progress import duration, human_bytes
    from vllm_qoq.quantizer import estimate

    seconds = estimate.seconds(plan.stacks, plan.options, len(plan.samples))
    out, memory = plan.job.out, plan.sizes.memory
    parts = ", ".join(f"{name} {human_bytes(count)}" for name, count in memory.items())
    head = "the embedding"
    if plan.sizes.head:
        kind = "int8" if plan.options.lm_head_bits == 8 else "the model's dtype"
        head = f"{human_bytes(plan.sizes.head)} of it, in {kind}"
    on_gpu = sum(memory[name] for name in plan.sizes.gpu)
    gpu = f", {human_bytes(on_gpu)} of it on the GPU" if torch.cuda.is_available() else ""
    return (
        f"would write {out}: {human_bytes(plan.sizes.output)}, sets "
        f"{', '.join(plan.options.sets)} of {len(plan.linears)} layers\n"
        f"lm_head: {head}\n"
        f"calibration: {len(plan.samples)} pieces of {plan.options.seqlen} tokens\n"
        f"disk: {human_bytes(plan.sizes.output)} for {out} and, until it is complete, "
        f"{human_bytes(plan.sizes.work)} in {plan.job.work_dir}\n"
        f"memory: about {human_bytes(sum(memory.values()))}{gpu} ({parts})\n"
        f"time: about {duration(seconds)}, estimated from a second of the same work here"
    )


def _document(out: Path, report: dict[str, Any]) -> str:
    return json.dumps({"output": str(out), "dry_run": False, **report})


def _text(out: Path, report: dict[str, Any]) -> str:
    from vllm_qoq.quantizer.report import table
    from vllm_qoq.quantizer.worst import advice

    parts = [table(report), advice(report, out), f"wrote {out}"]
    return "\n".join(filter(None, parts))

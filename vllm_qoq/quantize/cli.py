"""The command `quantize`: arguments and output. Handlers import torch, `--help` does not."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from merge_tools.cli import MAX_CLIPPED, MAX_CLIPPED_HELP, share, size
from vllm_qoq.output import stdout_for
from vllm_qoq.quantize import noise

if TYPE_CHECKING:
    from vllm_qoq.quantize.options import Options
    from vllm_qoq.quantize.plan import Job


def add_parser(commands: Any) -> None:
    """Add the command to the result of `ArgumentParser.add_subparsers`.

    Options that a recipe may set have no default here: what is not given is the recipe's.
    """
    parser = commands.add_parser("quantize", help="make all sets from a Hugging Face model")
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder, bf16 or fp16")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder to make"
    )
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
    parser.add_argument(
        "--max-clipped", type=share, default=MAX_CLIPPED, metavar="SHARE", help=MAX_CLIPPED_HELP
    )
    parser.add_argument("--group-size", type=int, choices=(128, -1), help="default: 128")
    parser.add_argument(
        "--kv-bits", type=int, choices=(4, 8, 16), help="KV cache to prepare for (default: 4)"
    )
    parser.add_argument(
        "--kv-hadamard",
        action="store_true",
        default=None,
        help="rotate K in the KV cache: for a model whose K has channels of very different size",
    )
    parser.add_argument(
        "--lm-head-bits", type=int, choices=(8, 16), help="8 for an int8 lm_head (default: 16)"
    )
    parser.add_argument("--samples", type=int, help="pieces of text (default: 128)")
    parser.add_argument("--seqlen", type=int, help="tokens a piece (default: 1024)")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="JSON object of these options")
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
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        type=size,
        metavar="SIZE",
        help="of a file with weights, for example 500MB (default: 5GB)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and show the plan, then stop")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT once done")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=_quantize)


_STEPS = {
    "rotate": "Hadamard rotations of the residual stream and of V",
    "smooth_attention": "scales that make K even",
    "smooth_outputs": "scales that make the inputs of o_proj and down_proj even",
    "reorder": "order of down_proj's inputs",
    "clip": "search of scales that clip",
    "gptq": "passing rounding errors on",
}


def _add_steps(group: Any) -> None:
    for name, text in _STEPS.items():
        option = "--no-" + name.replace("_", "-")
        group.add_argument(option, dest=name, action="store_false", default=None, help=text)


_OPTIONS = (
    *("nested", "group_size", "kv_bits", "kv_hadamard", "lm_head_bits", "samples", "seqlen"),
    *_STEPS,
)


def _quantize(args: argparse.Namespace) -> int:
    from vllm_qoq.quantize import QuantizeError
    from vllm_qoq.quantize.inputs import check_inputs

    job, options = _job(args)
    check_inputs(job)  # what needs no import, before the imports
    if args.json:
        args.quiet = True
    noise.hide_bars()
    with stdout_for(sys.stderr.fileno()) as out:  # llmcompressor logs there
        try:
            noise.import_llmcompressor()
        except ImportError as error:
            raise QuantizeError(f"{error}; install it: pip install 'vllm-qoq[quantize]'") from None
        try:
            return _run(args, job, options, out)
        except KeyboardInterrupt:
            work = _work_dir(args)
            done = f"{work} has what is done, the same command goes on there"
            # A folder without a finished piece does not stay.
            print(f"interrupted; {done if work.exists() else 'nothing is left'}", file=sys.stderr)
            return 130


def _job(args: argparse.Namespace) -> tuple[Job, Options]:
    from vllm_qoq.quantize.options import Options
    from vllm_qoq.quantize.plan import Job

    given = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    if args.sets is not None:
        given["sets"] = args.sets.split(",")
    job = Job(
        model=args.model,
        out=args.output,
        text=args.text,
        work_dir=_work_dir(args),
        eval_text=args.eval_text,
        sanity_check=args.sanity_check,
        max_clipped=args.max_clipped,
        resume=args.resume,
        overwrite=args.overwrite,
        max_shard_bytes=args.max_shard_size,
        quiet=args.quiet or args.json,
    )
    return job, Options.read(args.recipe, given)


def _run(args: argparse.Namespace, job: Job, options: Options, out: TextIO) -> int:
    from vllm_qoq.quantize.job import prepare, run

    if args.dry_run:
        _show_plan(args, prepare(job, options), options, out)
    else:
        _show_report(args, run(job, options), out)
    return 0


def _show_plan(args: argparse.Namespace, plan: Any, options: Any, out: TextIO) -> None:
    import torch

    from merge_tools.progress import human_bytes
    from vllm_qoq.quantize import estimate
    from vllm_qoq.quantize.clock import duration

    seconds = estimate.seconds(plan.linears, options, len(plan.samples), torch.bfloat16)
    memory = plan.sizes.memory
    parts = ", ".join(f"{name} {human_bytes(count)}" for name, count in memory.items())
    on_gpu = sum(memory[name] for name in plan.sizes.gpu)
    gpu = f", {human_bytes(on_gpu)} of it on the GPU" if torch.cuda.is_available() else ""
    if args.json:
        report = {
            "output": str(args.output),
            "dry_run": True,
            "options": options.model_dump(mode="json"),
            "parameters": plan.parameters,
            "quantized_layers": len(plan.linears),
            "samples": len(plan.samples),
            "output_bytes": plan.sizes.output,
            "work_bytes": plan.sizes.work,
            "disk_bytes": plan.sizes.output + plan.sizes.work,
            "memory_bytes": sum(memory.values()),
            "memory": memory,
            "seconds": round(seconds),
        }
        print(json.dumps(report), file=out)
        return
    print(
        f"would write {args.output}: {human_bytes(plan.sizes.output)}, sets "
        f"{', '.join(options.sets)} of {len(plan.linears)} layers\n"
        f"calibration: {len(plan.samples)} pieces of {options.seqlen} tokens\n"
        f"disk: {human_bytes(plan.sizes.output)} for {args.output} and, until it is complete, "
        f"{human_bytes(plan.sizes.work)} in {_work_dir(args)}\n"
        f"memory: about {human_bytes(sum(memory.values()))}{gpu} ({parts})\n"
        f"time: about {duration(seconds)}, estimated from a second of the same work here",
        file=out,
    )


def _show_report(args: argparse.Namespace, report: dict[str, Any], out: TextIO) -> None:
    from vllm_qoq.quantize.report import table

    if args.json:
        print(json.dumps({"output": str(args.output), "dry_run": False, **report}), file=out)
        return
    print(f"{table(report)}\nwrote {args.output}", file=out)


def _work_dir(args: argparse.Namespace) -> Path:
    out: Path = args.output.resolve()  # "." has no name
    return args.work_dir or out.parent / f"{out.name}.work"

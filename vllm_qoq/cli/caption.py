"""The command `caption`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from vllm_qoq.caption import MAX_TOKENS, PROMPT
from vllm_qoq.cli import arguments
from vllm_qoq.cli.output import stdout_for
from vllm_qoq.cli.parser import Commands, Parser


def add_parser(commands: Commands[Parser]) -> None:
    """Add the command to those of the program."""
    parser = commands.add_parser(
        "caption", help="write captions for the images of WebDataset shards"
    )
    parser.add_argument(
        "shards",
        metavar="SHARDS",
        help="folder with tar files, a tar file, a pattern such as 'data/{000..099}.tar', or a "
        "list of shards in JSON",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="folder for captions; what it has already is not done again",
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="CKPT", help="folder of a checkpoint"
    )
    parser.add_argument(
        "--model-name",
        type=not_empty,
        metavar="NAME",
        help="of the model in the output (default: the name of its folder)",
    )
    parser.add_argument(
        "--prompt",
        type=not_empty,
        default=PROMPT,
        metavar="TEXT",
        help=f"for each image (default: {PROMPT!r})",
    )
    parser.add_argument("--system-prompt", metavar="TEXT", help="default: none")
    parser.add_argument(
        "--max-tokens",
        type=arguments.positive,
        default=MAX_TOKENS,
        metavar="N",
        help=f"of a caption (default: {MAX_TOKENS})",
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="of sampling (default: 0, the likeliest token)",
    )
    parser.add_argument(
        "--engine-args",
        type=arguments.json_object,
        default={},
        metavar="JSON",
        help="arguments of LLM(), such as '{\"max_model_len\": 4096}'",
    )
    parser.add_argument(
        "--engines",
        type=arguments.positive,
        metavar="N",
        help="processes with an engine (default: as many as there are GPUs for; 1 on a CPU)",
    )
    parser.add_argument(
        "--job-id",
        type=arguments.count,
        default=0,
        metavar="I",
        help="which of --num-jobs this is, from 0 (default: 0)",
    )
    parser.add_argument(
        "--num-jobs",
        type=arguments.positive,
        default=1,
        metavar="N",
        help="jobs among which the shards are divided (default: 1)",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="try samples again that got no caption in an earlier run",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and show the plan, then stop")
    arguments.add_reporting(parser, _caption)


def not_empty(text: str) -> str:
    """Parse a text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def temperature(text: str) -> float:
    """Parse a temperature from 0 to 100."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature from 0 on")
    return found


def _caption(args: argparse.Namespace) -> int:
    from vllm_qoq.caption.sigterm import terminable

    with terminable():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from vllm_qoq.caption.job import Job, check

    job = Job(
        shards=args.shards,
        out=args.output,
        model=args.model,
        name=args.model_name,
        prompt=args.prompt,
        system_prompt=args.system_prompt,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        engine_args=args.engine_args,
        engines=args.engines,
        job_id=args.job_id,
        num_jobs=args.num_jobs,
        retry_failed=args.retry_failed,
        quiet=args.quiet or args.json,
    )
    with stdout_for(sys.stderr.fileno()) as out:  # libraries print
        checked = check(job)
        from vllm_qoq.caption import report

        if args.dry_run:
            plan = report.plan(checked)
            print(json.dumps(plan) if args.json else report.plan_text(plan), file=out)
            return 0
        from vllm_qoq.caption.run import caption

        result = caption(checked)
        found = report.summary(result)
        print(json.dumps(found) if args.json else report.summary_text(found), file=out)
    return 0 if result.is_complete else 1

"""The command `perplexity`."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_qoq.cli import arguments
from vllm_qoq.cli.output import stdout_for
from vllm_qoq.cli.parser import Commands, Parser
from vllm_qoq.errors import UserError

_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")


def add_parser(commands: Commands[Parser]) -> None:
    """Add the command to those of the program."""
    parser = commands.add_parser("perplexity", help="perplexity of a checkpoint through vLLM")
    what = "folder of any checkpoint that vLLM serves"
    arguments.add_checkpoint(parser, "checkpoint", what=what)
    parser.add_argument("--text", type=Path, required=True, help="text to score, UTF-8")
    parser.add_argument("--force-set", metavar="NAME", help="run everything in one set")
    parser.add_argument(
        "--seqlen",
        type=arguments.at_least_two,
        default=2048,
        help="tokens a window (default: 2048)",
    )
    parser.add_argument(
        "--chunk",
        type=arguments.positive,
        metavar="N",
        help="run each window N tokens a step, so that it reads the rest from the KV cache",
    )
    parser.add_argument(
        "--kv-bits",
        type=arguments.kv_bits,
        choices=arguments.KV_BITS,
        help="KV cache (default: the checkpoint's)",
    )
    parser.add_argument(
        "--dtype", default="auto", choices=_DTYPES, help="vLLM's --dtype (default: auto)"
    )
    parser.add_argument("--enforce-eager", action="store_true", help="start faster, run slower")
    parser.add_argument(
        "--gpu-memory-utilization",
        type=arguments.share_above_zero,
        metavar="SHARE",
        help="of the memory that vLLM may take (default: vLLM's)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=_perplexity)


def _perplexity(args: argparse.Namespace) -> int:
    if find_spec("vllm") is None:
        raise UserError("vLLM is not installed; install it: pip install 'vllm-qoq[vllm]'")
    _check(args)
    with stdout_for(sys.stderr.fileno()) as out:
        from vllm_qoq.bench.perplexity import perplexity

        result = perplexity(
            args.checkpoint,
            args.text,
            force_set=args.force_set,
            seqlen=args.seqlen,
            chunk=args.chunk,
            kv_bits=args.kv_bits,
            dtype=args.dtype,
            enforce_eager=args.enforce_eager,
            gpu_memory_utilization=args.gpu_memory_utilization,
        )
        print(json.dumps(result) if args.json else _text(result), file=out)
    return 0


def _text(result: dict[str, Any]) -> str:
    return (
        f"perplexity {result['perplexity']:.4f}  ({result['scored_tokens']} tokens in "
        f"{result['windows']} windows of {result['seqlen']}, "
        f"set {result['set'] or 'as routed'}, KV cache {result['kv_cache']})"
    )


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for what can be refused before vLLM is imported and an engine started."""
    from vllm_qoq.bench.foreign import refuse_cache
    from vllm_qoq.checkpoint import hub
    from vllm_qoq.checkpoint.folder import read_config, require_folder
    from vllm_qoq.checkpoint.format import QUANT_METHOD, SECTION, KVSection, Section
    from vllm_qoq.errors import FormatError
    from vllm_qoq.models.config import CONFIG
    from vllm_qoq.text_file import check_text

    check_text("--text", args.text)
    size = args.text.stat().st_size
    if size + 1 < args.seqlen:  # no token is shorter than a byte; some have a space before it
        raise FormatError(
            f"--text {args.text}: {size} bytes, fewer than one window of {args.seqlen} tokens; "
            "give a longer text or a smaller --seqlen"
        )
    folder = Path(args.checkpoint)
    if not folder.is_dir():
        if not hub.is_to_download(args.checkpoint) or folder.parent.exists():
            require_folder(folder)
        return
    config = read_config(folder)
    if args.kv_bits is not None:
        asked = f"--kv-bits {args.kv_bits}"
        refuse_cache(folder, config, asked, "leave --kv-bits out")
    section = config.get(SECTION)
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        sets: tuple[str, ...] = ()
    elif "sets" in section:
        sets = tuple(Section.parse(section).sets)
    else:
        KVSection.parse(section)
        sets = ()
    if args.force_set is not None and args.force_set not in sets:
        raise FormatError(
            f"--force-set {args.force_set}: {folder / CONFIG} has "
            f"{', '.join(sets) if sets else 'no sets'}; give one of its sets, or leave it out"
        )

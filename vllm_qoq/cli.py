"""The command `vllm-qoq`. `--help` and `--version` import neither torch nor vLLM."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merge_tools import cli as merge_cli
from merge_tools.parser import Parser
from merge_tools.spelling import kebab_case
from vllm_qoq import __version__, output
from vllm_qoq.bench import cli as bench_cli
from vllm_qoq.bench.cli import positive
from vllm_qoq.errors import UserError
from vllm_qoq.importer import cli as import_cli
from vllm_qoq.quantize import cli as quantize_cli
from vllm_qoq.tune import cli as tune_cli

_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")


def main() -> int:
    """Parse the command line and run the command; the result is the exit code."""
    return output.guarded(lambda: merge_cli.run(_parser().parse_args(kebab_case(sys.argv[1:]))))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="vllm-qoq", description="One checkpoint, several precisions, served by vLLM."
    )
    parser.add_argument("--version", action="version", version=f"vllm-qoq {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    quantize_cli.add_parser(commands)
    merge_cli.add_parsers(commands)
    import_cli.add_parser(commands)
    _add_perplexity(commands)
    tune_cli.add_parser(commands, _open_tune_engine)
    bench_cli.add_parser(commands)
    _add_env(commands)
    return parser


def _add_perplexity(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("perplexity", help="perplexity of a checkpoint through vLLM")
    parser.add_argument("checkpoint", help="folder or Hub name; any checkpoint that vLLM serves")
    parser.add_argument("--text", type=Path, required=True, help="text to score, UTF-8")
    parser.add_argument("--force-set", metavar="NAME", help="run everything in one set")
    parser.add_argument(
        "--seqlen", type=_at_least_two, default=2048, help="tokens a window (default: 2048)"
    )
    parser.add_argument(
        "--chunk",
        type=positive,
        metavar="N",
        help="run each window N tokens a step, so that it reads the rest from the KV cache",
    )
    parser.add_argument(
        "--kv-bits", type=int, choices=(4, 8, 16), help="KV cache (default: the checkpoint's)"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=_DTYPES, help="vLLM's --dtype (default: auto)"
    )
    parser.add_argument("--enforce-eager", action="store_true", help="start faster, run slower")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=_perplexity)


def _at_least_two(text: str) -> int:
    """A window's tokens; for `argparse`."""
    if (found := positive(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: a window scores all tokens but its first")
    return found


def _perplexity(args: argparse.Namespace) -> int:
    if find_spec("vllm") is None:
        raise UserError("vLLM is not installed; install it: pip install 'vllm-qoq[vllm]'")
    _check_perplexity(args)
    with output.stdout_for(sys.stderr.fileno()) as out:
        from vllm_qoq.integration.perplexity import run

        return run(args, out)


def _check_perplexity(args: argparse.Namespace) -> None:
    """What can be refused before vLLM is imported and an engine started."""
    from vllm_qoq.checkpoint import CONFIG, read_config, require_folder
    from vllm_qoq.format import QUANT_METHOD, SECTION, FormatError, KVSection, Section
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
        if args.checkpoint.count("/") != 1 or folder.exists() or folder.parent.exists():
            require_folder(folder)  # else the name of a model on the Hub
        return
    section = read_config(folder).get(SECTION)
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


def _open_tune_engine(folder: Path, sets: tuple[str, ...], max_batch: int) -> Any:
    from vllm_qoq.integration.tune import open_engine

    return open_engine(folder, sets, max_batch)


def _add_env(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("env", help="versions, GPUs and plugin, for a bug report")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=_env, debug=False)


def _env(args: argparse.Namespace) -> int:
    from vllm_qoq.environment import describe, table

    report = describe()
    print(json.dumps(report) if args.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

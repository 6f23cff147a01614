"""The command `verify`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from vllm_qoq.cli import arguments
from vllm_qoq.cli.parser import Commands, Parser
from vllm_qoq.errors import printable

if TYPE_CHECKING:
    from vllm_qoq.checkpoint.verify import Verified

# A lost file brings thousands of findings: so many are printed, and so many are in the JSON.
_SHOWN, _MOST = 20, 1000


def add_parser(commands: Commands[Parser]) -> None:
    """Add the command to those of the program."""
    parser = commands.add_parser("verify", help="check that a checkpoint is whole and sane")
    arguments.add_checkpoint(parser, "checkpoint")
    arguments.add_reporting(parser, _verify)


def _verify(args: argparse.Namespace) -> int:
    from vllm_qoq.checkpoint.verify import verify

    verified = verify(args.checkpoint, quiet=args.quiet or args.json)
    print(_document(args, verified) if args.json else _text(args, verified))
    return 1 if verified.findings else 0


def _document(args: argparse.Namespace, verified: Verified) -> str:
    findings = verified.findings
    report: dict[str, Any] = {
        "checkpoint": str(args.checkpoint),
        "findings": list(findings[:_MOST]),
    }
    if len(findings) > _MOST:
        report["more_findings"] = len(findings) - _MOST
    report |= {"limit_shares": verified.limit_shares} if verified.limit_shares else {}
    report |= {"notes": list(verified.notes)} if verified.notes else {}
    return json.dumps(report)


def _text(args: argparse.Namespace, verified: Verified) -> str:
    findings = verified.findings
    lines = [printable(finding) for finding in findings[:_SHOWN]]
    if len(findings) > _SHOWN:
        lines.append(f"and {len(findings) - _SHOWN} more")
    for name, share in verified.limit_shares.items():
        lines.append(
            f"set {name}: {share:.2%} of the residuals are at their limits, and some of these "
            "clipped (quantization_report.json)"
        )
    lines += [f"note: {printable(note)}" for note in verified.notes]
    verdict = f"{len(findings)} findings" if findings else "verified"
    lines.append(f"{printable(str(args.checkpoint))}: {verdict}")
    return "\n".join(lines)

"""Tables in Markdown, for the reports of commands."""

from __future__ import annotations


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """Lay out a table in Markdown whose columns, all but the first, are aligned to the right."""
    widths = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = (
        " | ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])))
        for row in (head, rule, *rows)
    )
    return "\n".join(f"| {line} |" for line in lines) + "\n"

"""What the tests of the `bench` commands share: a made-up GPU, and reading the tables."""

import contextlib
import sys

import torch

from vllm_qoq.cli import main as cli
from vllm_qoq.cli import measurement as command


def bench_command(name, monkeypatch, capfd):
    """run(ARGUMENTS): exit code, stdout and stderr of `vllm-qoq bench NAME`, on a made-up GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(command, "stdout_for", lambda file: contextlib.nullcontext(sys.stdout))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vllm-qoq", "bench", name, *map(str, arguments)])
        try:
            code = cli.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


def cells(text, heading, label):
    """The cells of a row in the table below a heading."""
    table = text.split(f"## {heading}")[1].split("\n## ")[0]
    row = next(line for line in table.splitlines() if line.startswith(f"| {label} "))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]

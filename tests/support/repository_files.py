"""The files of the repository, and what its modules import."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from conftest import ROOT


@dataclass(frozen=True)
class Import:
    """One imported name, `vllm.config.VllmConfig`, and whether it waits for a call."""

    name: str
    is_lazy: bool

    def is_in(self, package: str) -> bool:
        return self.name == package or self.name.startswith(f"{package}.")


def imports(tree: ast.AST, is_lazy: bool = False) -> Iterator[Import]:
    """All imports below `tree`, but not those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, is_lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "write imports in full"
            yield from (Import(f"{node.module}.{alias.name}", is_lazy) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        else:
            in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, is_lazy or in_function)


def tracked() -> list[str]:
    """The files that git tracks and that are still there."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git repository")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def python_files(*folders: str) -> dict[str, list[Import]]:
    """Tracked file -> its imports."""
    files = [name for name in tracked() if name.endswith(".py") and name.startswith(folders)]
    return {name: list(imports(ast.parse((ROOT / name).read_text()))) for name in files}

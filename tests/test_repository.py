"""The rules that the repository keeps: who imports whom, what is tracked, what the README says."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import LONGEST_FIRST

from vllm_qoq import cli, ops

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PAGES = ["README.md", "csrc/README.md"]
PAGES += [
    f"{name}/{page.name}" for name in ("docs", "examples") for page in (ROOT / name).glob("*.md")
]

# The only two that may reach into the adapter, and only inside a function.
HAND_OVER = ("vllm_qoq/__init__.py", "vllm_qoq/cli.py")
PACKAGES = ("vllm_qoq/", "merge_tools/")
# Within the packages, vLLM and llmcompressor are imported only there.
VLLM_AT = "vllm_qoq/integration/"
# The benchmark times vLLM's kernels, and imports them when it runs.
VLLM_PEERS = "vllm_qoq/bench/peers.py"
LLMCOMPRESSOR_AT = "vllm_qoq/quantize/"

# A developer's folders. Examples such as a file directly in /tmp are fine.
MACHINE_PATH = re.compile(rb"(?<![\w.~])/(?:work|root|home/\w+|Users/\w+|tmp/[\w.-]+)/[\w.-]*")


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


def test_imports_are_found_with_their_time():
    source = """
import a.b
from c import d
try:
    import e
except ImportError:
    pass
if TYPE_CHECKING:
    import f
class G:
    def method(self):
        from h import i
"""
    assert [(found.name, found.is_lazy) for found in imports(ast.parse(source))] == [
        ("a.b", False),
        ("c.d", False),
        ("e", False),
        ("h.i", True),
    ]


def test_only_the_adapter_imports_vllm_and_only_the_quantizer_llmcompressor():
    files = python_files(*PACKAGES)
    assert any(one.is_in("vllm") for name in files for one in files[name])
    for name, found in files.items():
        for one in found:
            may_import = name.startswith(VLLM_AT) or (name == VLLM_PEERS and one.is_lazy)
            assert not one.is_in("vllm") or may_import, (name, one)
            assert not one.is_in("llmcompressor") or name.startswith(LLMCOMPRESSOR_AT), (name, one)


def test_nothing_but_the_entry_points_imports_the_adapter_and_they_do_it_late():
    files = python_files(*PACKAGES)
    reached = set()
    for name, found in files.items():
        for one in found:
            if one.is_in("vllm_qoq.integration") and not name.startswith(VLLM_AT):
                assert name in HAND_OVER and one.is_lazy, (name, one)
                reached.add(name)
    assert reached == set(HAND_OVER)


def test_nothing_imports_examples_and_only_tests_import_tests():
    modules = {
        folder: {folder, *(path.stem for path in (ROOT / folder).glob("*.py"))}
        for folder in ("tests", "examples")
    }
    for name, found in python_files("").items():
        forbidden = modules["examples"] | (set() if name.startswith("tests/") else modules["tests"])
        for one in found:
            assert one.name.partition(".")[0] not in forbidden, (name, one)


def test_no_tracked_file_names_a_folder_of_a_developer():
    assert MACHINE_PATH.search(b"/home" + b"/me/x") and not MACHINE_PATH.search(b"/tmp/a.jsonl")
    for name in tracked():
        if not name.startswith("tests/data/"):
            found = MACHINE_PATH.search((ROOT / name).read_bytes())
            assert found is None, (name, found)


def test_tracked_files_are_small():
    sizes = {name: (ROOT / name).stat().st_size for name in tracked()}
    large = [name for name, size in sizes.items() if size > MIB]
    assert all(name.startswith("tests/data/") for name in large), large
    assert sum(sizes.values()) < 12 * MIB


def test_the_longest_test_files_are_there():
    assert not [name for name in LONGEST_FIRST if not (ROOT / "tests" / name).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_documented_extras_exist(page):
    extras = set(re.findall(r"^(\w+) = \[", PYPROJECT.partition("optional-dependencies]")[2], re.M))
    commands = [code for code in code_of(page) if "pip install" in code]
    named = {
        extra
        for code in commands
        for names in re.findall(r"\.\[([\w,]+)\]|vllm-qoq\[([\w,]+)\]", code)
        for extra in "".join(names).split(",")
    }
    assert named <= extras
    assert page != "README.md" or named == {"vllm", "quantize"}


def test_the_readme_builds_kernels_as_the_refusals_say():
    assert ops.BUILD in set(code_of("README.md"))


def code_of(page: str) -> Iterator[str]:
    """The pieces of code in a page: lines of indented and fenced blocks, and `inline` code."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    is_fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            yield line.strip()
        else:
            yield from re.findall(r"`([^`]+)`", line)


COMMANDS = [
    (page, code)
    for page in PAGES
    for code in code_of(page)
    if re.match(r"(vllm-qoq|python -m merge_tools) [a-z]", code)
]


@pytest.mark.parametrize("page, command", COMMANDS)
def test_documented_commands_parse(page, command, monkeypatch):
    # [OPTIONAL] is given, of one|other the first, and "..." means nothing.
    plain = re.sub(r"\|[\w.-]+|\.\.\.|[\[\]]", "", command)
    arguments = shlex.split(plain.split(" #")[0])[1:]
    if arguments[0] == "-m":
        arguments = arguments[2:]
    is_only_named = len(arguments) == 1
    monkeypatch.setattr(sys, "argv", ["vllm-qoq", *arguments, *(["--help"] * is_only_named)])
    parse_args = argparse.ArgumentParser.parse_args

    def stop_after(*args):
        raise SystemExit(f"parsed {parse_args(*args)}")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0 or str(stopped.value.code).startswith("parsed"), page


def test_the_readme_has_commands_to_check():
    assert {command.split()[1] for page, command in COMMANDS if page == "README.md"} >= {
        "merge",
        "verify",
        "inspect",
        "perplexity",
    }


@pytest.mark.parametrize("page", PAGES)
def test_documented_make_targets_exist(page):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {name for code in code_of(page) for name in re.findall(r"\bmake ([a-z]+)", code)}
    assert named <= set(targets)
    assert page != "README.md" or "test" in named


@pytest.mark.parametrize("page", PAGES)
def test_documented_files_exist(page):
    text = (ROOT / page).read_text()
    links = {
        (ROOT / page).parent / link.partition("#")[0]
        for link in re.findall(r"\]\((?!\w+:|#)([^)]+)\)", text)
    }
    folders = "vllm_qoq|merge_tools|tests|docs|examples|csrc|\\.ci"
    named = {
        ROOT / name.rstrip(".") for name in re.findall(rf"(?<![\w/-])(?:{folders})/[\w./-]*", text)
    }
    assert named or page != "README.md"
    assert not [str(path) for path in links | named if not path.exists()]


@pytest.mark.parametrize(
    "example",
    sorted(path.name for path in (ROOT / "examples").glob("*.py")),
)
def test_examples_answer_help(example):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example, "--help"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr

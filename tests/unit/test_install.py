"""The README's installations, made from nothing: what pip finds, builds and puts into a venv."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from email.parser import HeaderParser
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import ROOT
from qoq_checkpoints import write_nested, write_plain
from qserve_checkpoints import CONFIG, g128, model
from repository_files import tracked
from safetensors.torch import save_file

UV = Path(sys.executable).with_name("uv")
TORCH = f"torch=={version('torch')}"  # the one that is here already; alone, pip takes CUDA's
PACKAGES = ("vllm_qoq/", "merge_tools/")
# This checkout would count as installed.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command, environment=ENVIRONMENT, cwd=None):
    """What a command prints; AssertionError with its output where it fails."""
    done = start(*command, environment=environment, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def start(*command, environment=ENVIRONMENT, cwd=None):
    line = [str(part) for part in command]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=cwd)


@pytest.fixture(scope="module")
def uv_environment():
    """uv's environment with pip's indexes, as `make setup` uses it."""
    spec = importlib.util.spec_from_file_location("ci_setup", ROOT / ".ci" / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    setup.PYTHON = Path(sys.executable)
    return {name: text for name, text in setup.uv_environment().items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The tracked files, as git would give them to a stranger."""
    folder = tmp_path_factory.mktemp("clone") / "vllm-qoq"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(clone, uv_environment, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    run(UV, "build", "--quiet", "--sdist", "--out-dir", out, clone, environment=uv_environment)
    (file,) = out.glob("*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    """`pip wheel` of the clone: an isolated build, which sees no torch."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", out, clone)
    (file,) = out.glob("*.whl")
    return file


def content(file):
    """Name -> bytes of a wheel."""
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def install(folder, environment, *requirements, without=()):
    """A new environment with what pip chooses for `requirements`; its `bin`, and the choice.

    pip chooses and uv puts its choice in place: to unpack it takes pip as long as all else here.
    """
    venv.create(folder / "venv")
    bin_folder, report = folder / "venv" / "bin", folder / "report.json"
    pip = (sys.executable, "-m", "pip", "--python", bin_folder / "python")
    run(*pip, "install", "--quiet", "--dry-run", "--report", report, *requirements)
    chosen = {
        entry["metadata"]["name"].lower().replace("_", "-"): entry["metadata"]["version"]
        for entry in json.loads(report.read_text())["install"]
    }
    local = [requirement for requirement in requirements if "/" in str(requirement)]
    pins = [
        f"{name}=={number}"
        for name, number in chosen.items()
        if name not in ("vllm-qoq", "vllm", *without)
    ]
    place = (UV, "pip", "install", "--quiet", "--no-deps", "--python", bin_folder / "python")
    run(*place, *pins, *local, environment=environment)
    share_bytecode(bin_folder)
    return bin_folder, chosen


def share_bytecode(bin_folder):
    """Give an environment what Python compiled here of the same files, 40 s of work for vLLM.

    Python itself compares size and time of a source with what its bytecode was made of.
    """
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    theirs = Path(run(bin_folder / "python", "-c", code).strip())
    ours = Path(sysconfig.get_path("purelib"))
    for package in ("vllm", "torch", "transformers", "sympy", "numpy", "pydantic", "openai"):
        for file in (ours / package).rglob("__pycache__/*.pyc"):
            folder = theirs / file.relative_to(ours).parent
            if folder.parent.exists():
                folder.mkdir(exist_ok=True)
                if not (folder / file.name).exists():
                    shutil.copy2(file, folder)


# What is built


def test_the_wheel_has_the_packages_and_nothing_else(wheel):
    assert wheel.name.endswith("-py3-none-any.whl"), "kernels of this machine in a pure wheel"
    found = {name for name in content(wheel) if ".dist-info/" not in name}
    assert found == {name for name in tracked() if name.startswith(PACKAGES)}


def test_the_metadata_names_every_extra_and_entry_point(wheel):
    files = content(wheel)
    (metadata,) = (text for name, text in files.items() if name.endswith("dist-info/METADATA"))
    (points,) = (text for name, text in files.items() if name.endswith("entry_points.txt"))
    said = HeaderParser().parsestr(metadata.decode())
    assert (said["Name"], said["Version"]) == ("vllm-qoq", version("vllm-qoq"))
    assert said["Requires-Python"] == ">=3.10"
    assert said["License-Expression"] == "Apache-2.0"
    assert {"vllm", "quantize", "plots"} <= set(said.get_all("Provides-Extra"))
    assert said.get_payload().startswith("# vllm-qoq")
    assert b"[vllm.general_plugins]\nqoq = vllm_qoq:register" in points
    assert b"vllm-qoq = vllm_qoq.cli.main:main" in points


def test_the_sdist_has_what_a_build_needs_and_builds_the_same_wheel(
    sdist, wheel, uv_environment, tmp_path
):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ("csrc/", *PACKAGES, "pyproject.toml", "setup.py", "README.md", "LICENSE")
    assert not {name for name in tracked() if name.startswith(needed)} - names
    assert not [name for name in names if name.startswith(("tests", "examples", ".ci"))]
    run(UV, "build", "--quiet", "--wheel", "-o", tmp_path, sdist, environment=uv_environment)
    (again,) = tmp_path.glob("*.whl")
    assert content(again) == content(wheel)


@pytest.mark.parametrize(
    ("choice", "said"),
    [("1", "VLLM_QOQ_CUDA=1, but torch is not installed here"), ("2", "expected auto, 0 or 1")],
)
def test_kernels_that_cannot_be_built_as_asked_stop_the_build(
    clone, uv_environment, tmp_path, choice, said
):
    environment = {**uv_environment, "VLLM_QOQ_CUDA": choice}
    done = start(UV, "build", "--wheel", "-o", tmp_path, clone, environment=environment)
    assert done.returncode != 0 and said in done.stderr
    assert not list(tmp_path.glob("*.whl"))


# What is installed


@pytest.fixture(scope="module")
def core(wheel, uv_environment, tmp_path_factory):
    """`bin` of an environment after `pip install .`, on this machine's build of torch."""
    bin_folder, _ = install(tmp_path_factory.mktemp("core"), uv_environment, wheel, TORCH)
    return bin_folder


@pytest.fixture(scope="module")
def inputs(tiny_model, tmp_path_factory):
    """`float` and `w4a8` of a model, both `nested`; `src` in QServe's layout, and its `base`."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny_model, folder / "float")
    write_plain(tiny_model, folder / "w4a8")
    write_nested(tiny_model, folder / "nested")
    for name in ("src", "base"):
        (folder / name).mkdir()
    save_file(model(g128)[0], folder / "src" / "model.safetensors")
    (folder / "base" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "base" / "tokenizer.json").write_text("{}")
    return folder


def test_the_core_commands_run_without_extras(core, inputs):
    def command(*arguments):
        return run(core / "vllm-qoq", *arguments, cwd=inputs)

    doctor = start(core / "vllm-qoq", "doctor", "--json", cwd=inputs)
    report = json.loads(doctor.stdout)
    assert report["packages"]["vllm"] is report["packages"]["llmcompressor"] is None
    assert report["plugin_visible"] and report["kernels"] is None
    (problem,) = report["problems"]
    assert doctor.returncode == 1 and "vllm-qoq[vllm]" in problem["remedy"]
    command("merge", "w8a8=float", "w4a8=w4a8", "--nest", "-o", "merged")
    command("import", "src", "--base", "base", "-o", "imported")
    for checkpoint in ("merged", "imported"):
        assert "w4a8" in command("inspect", checkpoint)
        command("verify", checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        *("quantize", "merge", "inspect", "verify", "import", "perplexity", "caption", "tune"),
        *("bench", "doctor"),
    ],
)
def test_every_command_answers_help_without_extras(core, name):
    assert run(core / "vllm-qoq", name, "--help").startswith(f"usage: vllm-qoq {name}")


@pytest.mark.parametrize(
    ("extra", "command"),
    [
        ("quantize", "quantize float -o out --text float/config.json"),
        ("vllm", "perplexity float --text float/config.json"),
        ("vllm", "tune nested"),
        ("plots", "bench gemm -o out"),
        ("caption", "caption float -o out --model float"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(core, inputs, extra, command):
    done = start(core / "vllm-qoq", *command.split(), cwd=inputs)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert f"pip install 'vllm-qoq[{extra}]'" in done.stderr


def test_pip_alone_makes_an_environment_that_serves(wheel, uv_environment, tmp_path):
    """vLLM's CPU distribution stands for `vllm`."""
    alias = tmp_path / "alias"
    shutil.copytree(ROOT / ".ci" / "vllm-alias", alias)
    bin_folder, chosen = install(
        *(tmp_path, uv_environment, f"{wheel}[vllm]", alias),
        # PyPI's builds of these are not for the CPU build of torch; vLLM does without them.
        without=("torchvision", "torchaudio", "torchcodec"),
    )
    assert chosen["compressed-tensors"] == "0.17.0", "vLLM's own"
    code = (
        "from vllm import LLM\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "from vllm.model_executor.layers.quantization import get_quantization_config\n"
        "section = {'quant_method': 'qoq', 'kv_cache': {'bits': 4}}\n"
        "config = get_quantization_config('qoq').from_config(section)\n"
        "print(type(config).__module__)"
    )
    said = run(bin_folder / "python", "-c", code, cwd=tmp_path)
    assert said.split()[-1] == "vllm_qoq.serving.plugin.config"


# What can be resolved with vLLM for GPUs, whose distributions are too large to install here


def resolve(environment, folder, extras, pins, overrides):
    """Name -> version of what `extras` and `pins` need together, or the reason against it."""
    folder.mkdir(parents=True)
    (folder / "pins.txt").write_text("\n".join(pins))
    command = [UV, "pip", "compile", "--quiet", "--no-annotate", "--no-header"]
    command += ["--python-version", "3.11", "--python-platform", "x86_64-unknown-linux-gnu"]
    command += [f"--extra={extra}" for extra in extras]
    command += ["--constraints", folder / "pins.txt", "-o", folder / "out.txt"]
    command += ["--overrides", overrides] if overrides else []
    done = start(*command, "pyproject.toml", environment=environment, cwd=ROOT)
    if done.returncode:
        return done.stderr
    lines = (folder / "out.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_extras_resolve_with_the_newest_and_the_oldest_vllm(uv_environment, tmp_path):
    newest, oldest, llmcompressor = "vllm==0.33.0", "vllm==0.26.0", "llmcompressor<0.15"
    both = ("vllm", "quantize")
    overrides = ROOT / ".ci" / "overrides-gpu.txt"
    with ThreadPoolExecutor(4) as pool:
        cases = [
            (("vllm",), (newest,), None),
            (("vllm",), (oldest,), None),
            (("quantize",), (llmcompressor,), None),
            (both, (newest, llmcompressor), overrides),
            (both, (oldest, llmcompressor), overrides),
            (both, ("vllm<0.34", llmcompressor), None),
        ]
        jobs = [
            pool.submit(resolve, uv_environment, tmp_path / str(i), *case)
            for i, case in enumerate(cases)
        ]
        found = [job.result() for job in jobs]
    assert found[0]["vllm"] == "0.33.0" and found[1]["vllm"] == "0.26.0", found[:2]
    assert {found[0]["compressed-tensors"], found[1]["compressed-tensors"]} == {"0.17.0"}
    assert found[2]["llmcompressor"].startswith("0.14"), found[2]
    assert (found[3]["vllm"], found[4]["vllm"]) == ("0.33.0", "0.26.0"), found[3:5]
    assert found[3]["llmcompressor"] == found[4]["llmcompressor"]
    # Why the README has two environments: it may say so only while it is true.
    assert "compressed-tensors" in found[5] and "unsatisfiable" in found[5], found[5]

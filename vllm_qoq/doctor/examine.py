"""Find the facts and judge them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

from vllm_qoq import cards, kernel_library
from vllm_qoq.doctor import judge
from vllm_qoq.doctor.probe import MARK, broken
from vllm_qoq.environment import describe

_PROBE = (sys.executable, "-m", "vllm_qoq.doctor.probe")
# PTX is compiled by the driver when a kernel is first run, and all of them are.
_SECONDS = 600.0


def examine() -> dict[str, Any]:
    """Describe this machine and what it lacks, as one JSON object.

    It has what `environment.describe` has, and

        probe     the result of `doctor.probe`, or that it did not load, and the fault
        chosen    of each GPU for vLLM, the code of our kernels there, the path of the GEMM, and
                  how many kernels were compared with their reference, and all agreed
        problems  [{what, remedy}], empty where all that this environment is for is there
        advice    lines to know that are no problems
    """
    facts = describe()
    found = _probe()
    return {
        **facts,
        "probe": found,
        "chosen": [_chosen(gpu, facts["kernels"]) for gpu in judge.gpus(facts, found)],
        "problems": [problem._asdict() for problem in judge.problems(facts, found)],
        "advice": list(judge.advice(facts, found)),
    }


def _probe() -> dict[str, Any]:
    try:
        done = subprocess.run(_PROBE, capture_output=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return broken(f"torch did not answer within {_SECONDS:.0f} s")
    if done.returncode < 0:
        died = signal.strsignal(-done.returncode) or f"signal {-done.returncode}"
        return broken(f"{died}: the library may be damaged, or not for this machine")
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return broken(said[-1] if said else f"the process ended with status {done.returncode}")
    for line in done.stdout.decode(errors="replace").splitlines():
        if line.startswith(MARK):
            try:
                return dict(json.loads(line.removeprefix(MARK)))
            except ValueError as error:
                return broken(f"what the probe of torch printed cannot be read: {error}")
    return broken("the probe of torch ended without a result")


def _chosen(gpu: judge.Gpu, codes: list[str] | None) -> dict[str, str | int | None]:
    choice = kernel_library.choice(gpu.capability, codes or ())
    return {
        "gpu": gpu.name,
        "compute_capability": cards.name(gpu.capability),
        "code": choice and choice.code,
        "w4a8_gemm": choice and choice.gemm,
        "right": 0 if gpu.wrong else gpu.tried,
    }

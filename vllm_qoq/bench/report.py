"""The report of `bench gemm`: Markdown that is readable in a terminal, too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vllm_qoq.bench.cases import KERNELS, OURS, Case
from vllm_qoq.bench.result import NESTED, SUBJECT, LeftOut, Result, speedups
from vllm_qoq.bench.roofline import bytes_moved, operations
from vllm_qoq.markdown import markdown_table

MISSING = "-"


def markdown(result: Result) -> str:
    """Write the whole of gemm.md: how it was measured, a table per layer, the summary."""
    return "\n".join(
        (*_head(result), *_layers(result), *_summary(result), *left_out(result.left_out))
    )


def command(result: Result) -> str:
    """Write the command line that measures the same again."""
    line = f"vllm-qoq bench gemm --model {result.model} --tokens {commas(result.tokens)}"
    return line if result.kernels == KERNELS else f"{line} --kernels {commas(result.kernels)}"


def _head(result: Result) -> Iterator[str]:
    yield f"# W4A8 GEMM, {result.model}, {result.device}\n"
    yield f"    {command(result)}\n"
    yield (
        "Microseconds of a call, the median of CUDA-graph replays over weights larger than the\n"
        "L2; random numbers, 16-bit output, inputs quantized beforehand. TB/s: weights, inputs\n"
        "and outputs. Floor: the longer of those bytes at the speed of a 2 GiB copy,\n"
        f"{result.copy_rate / 1e12:.2f} TB/s in this run, and the operations at "
        f"{result.int8_rate.operations / 1e12:.0f} TOPS, the int8 rate\n"
        f"({result.int8_rate.source}, random operands).\n"
    )
    yield versions(result.environment)


def versions(environment: Mapping[str, Any]) -> str:
    """Write the line that names the packages which a run used."""
    packages = environment["packages"]
    named = ", ".join(f"{name} {packages[name]}" for name in packages if packages[name])
    return f"{named}, CUDA {environment['cuda']}.\n"


def _layers(result: Result) -> Iterator[str]:
    for cases in zip(*map(result.cases, result.tokens), strict=True):
        layer, n, k, _ = cases[0]
        yield f"## {layer}, N={n} K={k}\n"
        lines = [
            [name, *(_microseconds(result, name, case) for case in cases)]
            for name in result.kernels
        ]
        for name in result.kernels:
            if name in OURS:
                lines += _ours(result, name, cases)
        yield markdown_table(["microseconds at M =", *map(str, result.tokens)], lines)


def _ours(result: Result, name: str, cases: Sequence[Case]) -> Iterator[list[str]]:
    times = [result.seconds[case].get(name) for case in cases]
    pairs = list(zip(cases, times, strict=True))
    moved = [t and bytes_moved(case, OURS[name]) / t / 1e12 for case, t in pairs]
    done = [t and operations(case) / t / 1e12 for case, t in pairs]
    shares = [result.share_of_floor(name, case) for case in cases]
    yield [f"{name}, TB/s", *(number(value, ".2f") for value in moved)]
    yield [f"{name}, TOPS", *(number(value, ".0f") for value in done)]
    yield [f"{name}, share of the floor", *(number(value, ".0%") for value in shares)]


def _summary(result: Result) -> Iterator[str]:
    yield f"## {SUBJECT} against its peers\n"
    yield "Time of the peer / time of ours, geometric mean of the layers; above 1 ours is faster.\n"
    if NESTED in result.kernels:
        yield f"{NESTED} computes W8A8, from the 4 bits and the plane of what they lack.\n"
    rows = [
        [label, *(number(value, ".2f") for value in values)]
        for label, values in speedups(result).items()
    ]
    yield markdown_table(["at M =", *map(str, result.tokens)], rows)


def left_out(missing: Iterable[LeftOut]) -> Iterator[str]:
    """List what was left out, a line for each kernel and reason."""
    places: dict[tuple[str, str], list[str]] = {}
    for one in missing:
        places.setdefault((one.kernel, one.reason), []).append(one.where)
    if places:
        yield "Left out:\n"
        yield from (f"- {name}, {'; '.join(found)}: {why}" for (name, why), found in places.items())
        yield ""


def _microseconds(result: Result, kernel: str, case: Case) -> str:
    measured = result.seconds[case].get(kernel)
    return number(measured and 1e6 * measured, ".1f")


def number(value: float | None, form: str) -> str:
    """Format a number, or a dash for a missing one."""
    return MISSING if value is None else format(value, form)


def commas(values: Sequence[object]) -> str:
    """Join values by commas, as the command line takes them."""
    return ",".join(map(str, values))

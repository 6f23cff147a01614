"""The report of `bench attention`: Markdown that is readable in a terminal, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vllm_qoq.bench.attention_cases import (
    DECODES,
    KERNELS,
    PREFILL_TOKENS,
    WRITTEN_TOKENS,
    Decode,
    Heads,
    token_bytes,
)
from vllm_qoq.bench.attention_result import AttentionResult, speedups
from vllm_qoq.bench.report import commas, left_out, number, versions
from vllm_qoq.markdown import markdown_table


def markdown(result: AttentionResult) -> str:
    """Write the whole of attention.md: how it was measured, the tables, what is missing."""
    return "\n".join(
        (
            *_head(result),
            *_times(result),
            *_speedups(result),
            *_writes(result),
            *_prefills(result),
            *left_out(result.left_out),
        )
    )


def command(result: AttentionResult) -> str:
    """Write the command line that measures the same again."""
    options = ("--heads", "--kv-heads", "--head-size", "--block-size")
    values = zip(options, result.heads, Heads(), strict=True)
    parts = [f"{option} {value}" for option, value, default in values if value != default]
    if result.cases != DECODES:
        parts.append(f"--cases {commas(result.cases)}")
    if result.kernels != KERNELS:
        parts.append(f"--kernels {commas(result.kernels)}")
    return " ".join(("vllm-qoq bench attention", *parts))


def _head(result: AttentionResult) -> Iterator[str]:
    heads = result.heads
    yield (
        f"# Decode attention, {heads.query} query and {heads.kv} KV heads of {heads.size}, "
        f"{result.device}\n"
    )
    yield f"    {command(result)}\n"
    sizes = ", ".join(f"{name} {token_bytes(name, heads)}" for name in result.kernels)
    yield (
        "One query token a sequence, or as many as a third number of a case says, which are its\n"
        "last. Microseconds of a call, the median of CUDA-graph replays;\n"
        f"random numbers in a cache of random blocks of {heads.block_tokens} tokens, small cases\n"
        "going round 1 GB of it or 128 calls. FlashAttention 3 with the scheduler's metadata of\n"
        "vLLM's CUDA graphs; it and a query's conversion to fp8 are not timed. The int4 of vLLM\n"
        "rotates the query and the output, its TurboQuant the query, which is.\n"
    )
    yield (
        f"TB/s: bytes of the cache, each once. Bytes of a token:\n{sizes}.\n"
        "Floor: those bytes at the speed of a 2 GiB copy, read plus written, "
        f"{result.copy_rate / 1e12:.2f} TB/s in\nthis run.\n"
    )
    yield versions(result.environment)


def _times(result: AttentionResult) -> Iterator[str]:
    times: dict[str, tuple[Callable[[str, Decode], float | None], str]] = {
        "microseconds": (lambda name, case: _micro(result.seconds[case].get(name)), ".1f"),
        "TB/s of the cache": (lambda name, case: _tera(result.rate(name, case)), ".2f"),
        "share of the floor": (result.share_of_floor, ".0%"),
    }
    for title, (value, form) in times.items():
        yield f"## {title[0].upper()}{title[1:]}\n"
        rows = [
            [name, *(number(value(name, case), form) for case in result.cases)]
            for name in result.kernels
        ]
        yield markdown_table(["sequences x tokens", *map(str, result.cases)], rows)


def _speedups(result: AttentionResult) -> Iterator[str]:
    rows = [
        [label, *(number(value, ".2f") for value in values)]
        for label, values in speedups(result).items()
    ]
    if rows:
        yield "## Our kernels against their peers\n"
        yield "Time of the peer / time of ours; above 1 ours is faster.\n"
        yield markdown_table(["sequences x tokens", *map(str, result.cases)], rows)


def _writes(result: AttentionResult) -> Iterator[str]:
    yield f"## Write of {WRITTEN_TOKENS} tokens\n"
    rows = [
        [f"{name} write", number(_micro(result.write_seconds.get(name)), ".1f")]
        for name in result.kernels
    ]
    yield ("K and V of new tokens into random places; fa3 is vLLM's reshape_and_cache_flash.\n")
    yield markdown_table(["kernel", "microseconds"], rows)


def _prefills(result: AttentionResult) -> Iterator[str]:
    yield f"## Prompt of {PREFILL_TOKENS} tokens\n"
    rows = [
        [f"{name} prompt", number(_micro(result.prefill_seconds.get(name)), ".0f")]
        for name in result.kernels
    ]
    yield "Written into the cache and attended to; ours unquantized, in FlashAttention 3.\n"
    yield markdown_table(["kernel", "microseconds"], rows)


def _micro(seconds: float | None) -> float | None:
    return seconds and 1e6 * seconds


def _tera(rate: float | None) -> float | None:
    return rate and rate / 1e12

"""The command `bench`, with `bench gemm` and `bench attention`."""

from __future__ import annotations

import argparse
from functools import partial

from vllm_qoq.bench import BenchError, attention_cases, cases
from vllm_qoq.bench.attention_cases import DECODES, Decode, Heads
from vllm_qoq.cli import bench_serving, bench_table, measurement
from vllm_qoq.cli.arguments import is_positive, positive
from vllm_qoq.cli.parser import Commands, Parser


def add_parser(commands: Commands[Parser]) -> None:
    """Add the commands to those of the program."""
    bench = commands.add_parser(
        "bench", help="our kernels, and whole engines, beside what vLLM offers"
    )
    benchmarks = bench.add_subparsers(required=True, metavar="BENCHMARK")
    _add_gemm(benchmarks)
    _add_attention(benchmarks)
    bench_serving.add_parser(benchmarks)
    bench_table.add_parser(benchmarks)


def _add_gemm(benchmarks: Commands[Parser]) -> None:
    gemm = benchmarks.add_parser(
        "gemm", help="the W4A8 GEMM beside cuBLAS, CUTLASS, Marlin, Machete and humming"
    )
    gemm.add_argument(
        "--model",
        choices=tuple(cases.SHAPES),
        default="llama-3-8b",
        help="whose layers (default: llama-3-8b)",
    )
    gemm.add_argument(
        "--tokens",
        type=tokens,
        default=cases.TIMED_TOKENS,
        metavar="M,...",
        help=f"numbers of tokens (default: {','.join(map(str, cases.TIMED_TOKENS))})",
    )
    measurement.add_options(gemm, "gemm", cases.KERNELS, _gemm)


def _add_attention(benchmarks: Commands[Parser]) -> None:
    attention = benchmarks.add_parser(
        "attention",
        help="decode attention over the quantized KV cache beside FlashAttention 3 and Triton",
    )
    attention.add_argument(
        "--cases",
        type=decodes,
        default=DECODES,
        metavar="BxC,...",
        help="B sequences of C tokens, of which one is new, or Q with BxCxQ "
        f"(default: {','.join(map(str, DECODES))})",
    )
    heads = Heads()
    for option, value, text in (
        ("--heads", heads.query, "query heads"),
        ("--kv-heads", heads.kv, "KV heads"),
        ("--head-size", heads.size, "size of a head"),
        ("--block-size", heads.block_tokens, "tokens of a block of the cache, of every kernel"),
    ):
        attention.add_argument(
            option, type=positive, default=value, metavar="N", help=f"{text} (default: {value})"
        )
    measurement.add_options(attention, "attention", attention_cases.KERNELS, _attention)


def tokens(text: str) -> tuple[int, ...]:
    """Parse numbers of tokens, in ascending order: `64,1` gives (1, 64)."""
    parts = text.split(",")
    if not all(map(is_positive, parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers like 1,16")
    return tuple(sorted(set(map(int, parts))))


def decodes(text: str) -> tuple[Decode, ...]:
    """Parse cases such as `16x1024,1x8192,64x1024x4`, in the order given and each once."""
    found = [part.split("x") for part in text.split(",")]
    if not all(len(one) in (2, 3) and all(map(is_positive, one)) for one in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of sequences x tokens like 1x8192,64x1024, or with new tokens "
            "like 64x1024x4"
        )
    cases = tuple(dict.fromkeys(Decode(*map(int, one)) for one in found))
    for case in cases:
        most = min(case.context, attention_cases.MAX_QUERY_LEN)
        if case.query_len > most:
            raise argparse.ArgumentTypeError(
                f"{case} has {case.query_len} new tokens a sequence; take {most} or fewer"
            )
    return cases


def _gemm(args: argparse.Namespace) -> int:
    def check() -> None:
        measurement.check_gpu(args.kernels, cases.OURS, cases.KERNELS)

    def work() -> measurement.Finished:
        from vllm_qoq.bench import plot, report
        from vllm_qoq.bench.measure import measure
        from vllm_qoq.bench.result import to_json

        result = measure(args.model, args.tokens, args.kernels, args.quiet or args.json)
        drawn = partial(plot.save, result)
        return measurement.Finished(to_json(result), report.markdown(result), drawn)

    return measurement.run(args, "gemm", check, work)


def _attention(args: argparse.Namespace) -> int:
    heads = Heads(args.heads, args.kv_heads, args.head_size, args.block_size)
    _check_heads(heads, args.kernels)

    def check() -> None:
        measurement.check_gpu(args.kernels, attention_cases.OURS, attention_cases.KERNELS)

    def work() -> measurement.Finished:
        from vllm_qoq.bench import attention_plot, attention_report
        from vllm_qoq.bench.attention_measure import measure
        from vllm_qoq.bench.attention_result import to_json

        result = measure(heads, args.cases, args.kernels, args.quiet or args.json)
        drawn = partial(attention_plot.save, result)
        return measurement.Finished(to_json(result), attention_report.markdown(result), drawn)

    return measurement.run(args, "attention", check, work)


def _check_heads(heads: Heads, names: tuple[str, ...]) -> None:
    if heads.query % heads.kv:
        raise BenchError(
            f"--heads {heads.query} is not a multiple of --kv-heads {heads.kv}; each KV head has "
            "the same number of query heads"
        )
    multiple = attention_cases.BLOCK_MULTIPLE
    if heads.block_tokens % multiple:
        raise BenchError(f"--block-size {heads.block_tokens} is not a multiple of {multiple}")
    if not any(name in attention_cases.OURS for name in names):
        return
    others = f"--kernels {','.join(attention_cases.PEERS)}"
    if heads.size not in attention_cases.HEAD_SIZES:
        sizes = ", ".join(map(str, attention_cases.HEAD_SIZES))
        raise BenchError(
            f"our kernels serve heads of {sizes}, not --head-size {heads.size} "
            f"(measure the peers alone: {others})"
        )
    if (group := heads.query // heads.kv) > attention_cases.MAX_GROUP:
        raise BenchError(
            f"--heads {heads.query} and --kv-heads {heads.kv} are {group} query heads for a KV "
            f"head; our kernels serve up to {attention_cases.MAX_GROUP} "
            f"(measure the peers alone: {others})"
        )

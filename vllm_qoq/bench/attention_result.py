"""The result of `bench attention`, and what follows from it, without a GPU or torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_qoq.bench.attention_cases import (
    OURS,
    PEERS,
    PREFILL_TOKENS,
    WRITTEN_TOKENS,
    Decode,
    Heads,
    cache_bytes,
    floor_seconds,
    token_bytes,
)
from vllm_qoq.bench.result import LeftOut


@dataclass(frozen=True)
class AttentionResult:
    """The result of one run.

    environment      the result of `vllm_qoq.environment.describe`, with the CUDA of torch
    copy_rate        bytes a second of a copy, read plus written
    seconds          seconds of a call, by case and kernel; one that was left out is absent
    write_seconds    seconds of writing WRITTEN_TOKENS tokens, by kernel
    prefill_seconds  seconds of writing a prompt of PREFILL_TOKENS and attending to it, by kernel
    """

    heads: Heads
    device: str
    environment: Mapping[str, Any]
    copy_rate: float
    cases: tuple[Decode, ...]
    kernels: tuple[str, ...]
    seconds: Mapping[Decode, Mapping[str, float]]
    write_seconds: Mapping[str, float]
    prefill_seconds: Mapping[str, float]
    left_out: tuple[LeftOut, ...]

    def rate(self, kernel: str, case: Decode) -> float | None:
        """Compute the bytes of its cache that a kernel reads in a second; None if it is absent."""
        measured = self.seconds[case].get(kernel)
        return measured and cache_bytes(kernel, self.heads, case) / measured

    def share_of_floor(self, kernel: str, case: Decode) -> float | None:
        """Compare a kernel with a copy of its cache's bytes: 1 is as fast; None if it is absent."""
        measured = self.seconds[case].get(kernel)
        return measured and floor_seconds(kernel, self.heads, case, self.copy_rate) / measured


def speedups(result: AttentionResult) -> dict[str, list[float | None]]:
    """Divide the peers' times by ours: "PEER / OURS" -> a ratio a case, None if one is absent."""
    return {
        f"{peer} / {ours}": [_ratio(result.seconds[case], peer, ours) for case in result.cases]
        for ours in OURS
        for peer in PEERS
        if {peer, ours} <= set(result.kernels)
    }


def _ratio(times: Mapping[str, float], peer: str, ours: str) -> float | None:
    return times[peer] / times[ours] if peer in times and ours in times else None


def to_json(result: AttentionResult) -> dict[str, Any]:
    """Make the document of --json and attention.json: microseconds, null for what was left out."""
    heads, writes, prefills = result.heads, result.write_seconds, result.prefill_seconds
    return {
        "benchmark": "attention",
        "device": result.device,
        "environment": dict(result.environment),
        "copy_bytes_per_second": result.copy_rate,
        "heads": heads.query,
        "kv_heads": heads.kv,
        "head_size": heads.size,
        "block_size": heads.block_tokens,
        "kernels": list(result.kernels),
        "cache_bytes_per_token": {name: token_bytes(name, heads) for name in result.kernels},
        "cases": [_case(result, case) for case in result.cases],
        "write": {"tokens": WRITTEN_TOKENS, "microseconds": _microseconds(result, writes)},
        "prefill": {"tokens": PREFILL_TOKENS, "microseconds": _microseconds(result, prefills)},
        "speed_against_peers": speedups(result),
        "left_out": [vars(one) for one in result.left_out],
    }


def _case(result: AttentionResult, case: Decode) -> dict[str, Any]:
    heads = result.heads
    return {
        **case._asdict(),
        "microseconds": _microseconds(result, result.seconds[case]),
        "cache_bytes": {name: cache_bytes(name, heads, case) for name in result.kernels},
        "cache_bytes_per_second": {name: result.rate(name, case) for name in result.kernels},
        "floor_microseconds": {
            name: 1e6 * floor_seconds(name, heads, case, result.copy_rate)
            for name in result.kernels
        },
        "share_of_floor": {name: result.share_of_floor(name, case) for name in result.kernels},
    }


def _microseconds(result: AttentionResult, seconds: Mapping[str, float]) -> dict[str, float | None]:
    return {name: 1e6 * seconds[name] if name in seconds else None for name in result.kernels}

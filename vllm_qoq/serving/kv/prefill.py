"""Prompts over the quantized KV cache on a GPU: which part of their history is read when.

New tokens attend to each other unquantized, in FlashAttention. What the pages hold of a prompt
(earlier chunks, cached prefixes) is read back into two buffers, as much as fits at a time, and its
share is added by its log-sum-exp. With a sliding window the few tokens that are still seen are put
in front of the new ones instead, because the window moves from row to row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

# Tokens of the history that are read back at a time: 2 x 32 MiB with 8 heads of 128 in bf16.
HISTORY_ROWS = 16384


@dataclass(frozen=True)
class Run:
    """Neighbouring requests and what of their tokens the buffers hold: `length` from `first` on."""

    requests: slice
    first: list[int]
    length: list[int]


def history_runs(history: Sequence[int], rows: int) -> list[Run]:
    """Cut the histories, one after the other, into runs of at most `rows` tokens."""
    runs, room = [], 0
    for request, total in enumerate(history):
        done = 0
        while done < total:
            if room == 0:
                runs.append(Run(slice(request, request), [], []))
                room = rows
            run = runs[-1]
            # Requests without a history in between have no rows.
            for between in range(run.requests.stop, request):
                run.first.append(history[between])
                run.length.append(0)
            taken = min(room, total - done)
            run.first.append(done)
            run.length.append(taken)
            runs[-1] = Run(slice(run.requests.start, request + 1), run.first, run.length)
            done, room = done + taken, room - taken
    return runs


def window_runs(history: Sequence[int], new: Sequence[int], window: int, rows: int) -> list[Run]:
    """Whole requests: what their first new token still sees of the history, and the new tokens.

    A request has at most `window` - 1 + max(new) of the `rows`.
    """
    runs: list[Run] = []
    room = 0
    for request, (seen, count) in enumerate(zip(history, new, strict=True)):
        first = max(0, seen - (window - 1))
        length = seen - first + count
        if not runs or length > room:
            runs.append(Run(slice(request, request), [], []))
            room = rows
        run = runs[-1]
        run.first.append(first)
        run.length.append(length)
        runs[-1] = Run(slice(run.requests.start, request + 1), run.first, run.length)
        room -= length
    return runs


@dataclass(frozen=True)
class Piece:
    """A run on the device.

    requests, tokens   of the step's prompts
    query_start        int32 [requests + 1]   where the queries of each begin, in `tokens`
    first_token        int32 [requests]       what `kv_dequantize` reads
    row_start          int32 [requests + 1]   where in the buffers
    new_rows           int64 [tokens]         with a window: where the new tokens go there
    """

    requests: slice
    tokens: slice
    query_start: torch.Tensor
    first_token: torch.Tensor
    row_start: torch.Tensor
    new_rows: torch.Tensor | None
    rows: int
    longest: int


@dataclass(frozen=True)
class Prefill:
    """The prompts of one step.

    query_start    int32 [P + 1]   rows of request p among the step's prompt tokens
    max_query_len  the longest
    pieces         what is read of the pages; none for prompts from their first token on
    """

    query_start: torch.Tensor
    max_query_len: int
    pieces: list[Piece]


def plan_prefill(
    query_start: list[int],
    history: list[int],
    window: int | None,
    rows: int,
    device: torch.device,
) -> Prefill:
    """Plan one step; called once for all layers.

    query_start  [P + 1] from 0       history  [P] tokens of each request before this step
    """
    new = [b - a for a, b in pairwise(query_start)]
    runs: list[Run] = []
    if any(history):
        runs = (
            history_runs(history, rows)
            if window is None
            else window_runs(history, new, window, rows)
        )

    def ints(values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    pieces = []
    for run in runs:
        begin, end = run.requests.start, run.requests.stop
        tokens = slice(query_start[begin], query_start[end])
        row_start = [0, *accumulate(run.length)]
        new_rows = None
        if window is not None:
            ends = zip(row_start[1:], new[begin:end], strict=True)
            new_rows = ints(
                [row for stop, count in ends for row in range(stop - count, stop)], torch.int64
            )
        pieces.append(
            Piece(
                requests=run.requests,
                tokens=tokens,
                query_start=ints([start - tokens.start for start in query_start[begin : end + 1]]),
                first_token=ints(run.first),
                row_start=ints(row_start),
                new_rows=new_rows,
                rows=row_start[-1],
                longest=max(run.length),
            )
        )
    return Prefill(ints(query_start), max(new), pieces)


def buffer_rows(window: int | None, max_new_tokens: int) -> int:
    """Rows of the buffers: HISTORY_ROWS, or one request with a window and as many new tokens."""
    return HISTORY_ROWS if window is None else max(HISTORY_ROWS, window - 1 + max_new_tokens)


def attend_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    plan: Prefill,
    window: int | None,
    kernels: Any,
) -> None:
    """Attention of the prompt tokens of one step into `out`.

    query, out  [T, Hq, D]     key, value  [T, H, D], of this step, unquantized
    kernels     `read(piece)` -> keys and values [rows, H, D] of the pages,
                `flash(query, key, value, query_start, key_start, longest_query, longest_key,
                is_causal, window)` -> attention and its log-sum-exp [Hq, T]; with `out=` it
                writes there and returns nothing,
                `merge(out, out_lse, a, a_lse, b, b_lse)`
    """
    if window is not None and plan.pieces:
        for piece in plan.pieces:
            keys, values = kernels.read(piece)
            keys.index_copy_(0, piece.new_rows, key[piece.tokens])
            values.index_copy_(0, piece.new_rows, value[piece.tokens])
            kernels.flash(
                *(query[piece.tokens], keys, values, piece.query_start, piece.row_start),
                *(plan.max_query_len, piece.longest, True, window),
                out=out[piece.tokens],
            )
        return
    among_themselves = (
        *(query, key, value, plan.query_start, plan.query_start),
        *(plan.max_query_len, plan.max_query_len, True, window),
    )
    if not plan.pieces:
        kernels.flash(*among_themselves, out=out)
        return
    attended, lse = kernels.flash(*among_themselves)
    for piece in plan.pieces:
        keys, values = kernels.read(piece)
        part, part_lse = kernels.flash(
            *(query[piece.tokens], keys, values, piece.query_start, piece.row_start),
            *(plan.max_query_len, piece.longest, False, None),
        )
        merged, merged_lse = torch.empty_like(part), torch.empty_like(part_lse)
        before, before_lse = attended[piece.tokens], lse[:, piece.tokens].contiguous()
        kernels.merge(merged, merged_lse, part, part_lse, before, before_lse)
        attended[piece.tokens], lse[:, piece.tokens] = merged, merged_lse
    out.copy_(attended)

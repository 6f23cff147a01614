"""Attention of prompts over the quantized KV cache on a GPU, in parts that fit two buffers.

New tokens attend to each other unquantized, in FlashAttention. What the pages hold of a prompt
(earlier chunks, cached prefixes) is read back into two buffers, as much as fits at a time, and its
share is added by its log-sum-exp. With a sliding window the few tokens that are still seen are put
in front of the new ones instead, because the window moves from row to row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch

# So many tokens of the history are read back at a time: 2 x 32 MiB with 8 heads of 128 in bf16.
HISTORY_ROWS = 16384


@dataclass(frozen=True)
class Run:
    """Neighbouring requests, and the tokens of each in the buffers: `length` from `first` on."""

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
            # A request in between has no rows if it has no history.
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
    """Pack whole requests into runs: what the first new token sees of the history, then the new.

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
    """A `Run` on the device, with R requests and T new tokens.

    requests, tokens   the slices of the step's prompts and of their new tokens
    query_start        int32 [R + 1]   where the queries of each request begin in `tokens`
    first_token        int32 [R]       the first token that `kv_dequantize` reads of each
    row_start          int32 [R + 1]   where the rows of each begin in the buffers
    new_rows           int64 [T]       the rows of the new tokens there; None without a window
    rows               how many rows of the buffers are used
    longest            the most rows of a request
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

    query_start    int32 [P + 1]   request p has the rows [p] to [p + 1] of the prompt tokens
    max_query_len  the most tokens of a request
    pieces         what is read of the pages; empty for prompts from their first token on
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
    """Plan one step, once for all layers.

    query_start  [P + 1]   where the tokens of each request begin, from 0 on
    history      [P]       how many tokens of each request come before this step
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
    """Count the rows of the buffers: HISTORY_ROWS, or more to hold any request with a window."""
    return HISTORY_ROWS if window is None else max(HISTORY_ROWS, window - 1 + max_new_tokens)


class Kernels(Protocol):
    """The kernels that `attend_prefill` calls, for one layer and step."""

    def read(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """Read keys and values [rows, H, D] of a piece back from the pages."""

    def flash(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_start: torch.Tensor,
        key_start: torch.Tensor,
        longest_query: int,
        longest_key: int,
        is_causal: bool,
        window: int | None,
        has_sinks: bool,
        out: torch.Tensor | None = None,
    ) -> Any:
        """Attend: returns the result and its log-sum-exp [Hq, T], or writes the result to `out`.

        has_sinks  whether the layer's sinks, if it has any, are counted, in both
        """

    def merge(
        self,
        out: torch.Tensor,
        out_lse: torch.Tensor,
        a: torch.Tensor,
        a_lse: torch.Tensor,
        b: torch.Tensor,
        b_lse: torch.Tensor,
    ) -> None:
        """Merge the attention to two parts of the keys into `out` and `out_lse`."""


def attend_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    plan: Prefill,
    window: int | None,
    k_mean: torch.Tensor | None,
    kernels: Kernels,
) -> None:
    """Compute the attention of the prompt tokens of one step into `out`.

    query, out  [T, Hq, D]
    key, value  [T, H, D], of this step, unquantized
    k_mean      float32 [H, D], which the keys in the pages lack; None where they lack nothing
    """
    if k_mean is not None and plan.pieces:
        # One softmax sees these keys and those of the pages. Subtracted in float32, rounded once.
        key = torch.sub(key, k_mean, out=torch.empty_like(key))
    if window is not None and plan.pieces:
        for piece in plan.pieces:
            assert piece.new_rows is not None
            keys, values = kernels.read(piece)
            keys.index_copy_(0, piece.new_rows, key[piece.tokens])
            values.index_copy_(0, piece.new_rows, value[piece.tokens])
            kernels.flash(
                query=query[piece.tokens],
                key=keys,
                value=values,
                query_start=piece.query_start,
                key_start=piece.row_start,
                longest_query=plan.max_query_len,
                longest_key=piece.longest,
                is_causal=True,
                window=window,
                has_sinks=True,
                out=out[piece.tokens],
            )
        return
    attend_to_each_other = partial(
        kernels.flash,
        query=query,
        key=key,
        value=value,
        query_start=plan.query_start,
        key_start=plan.query_start,
        longest_query=plan.max_query_len,
        longest_key=plan.max_query_len,
        is_causal=True,
        window=window,
        has_sinks=True,
    )
    if not plan.pieces:
        attend_to_each_other(out=out)
        return
    attended, lse = attend_to_each_other()
    for piece in plan.pieces:
        keys, values = kernels.read(piece)
        part, part_lse = kernels.flash(
            query=query[piece.tokens],
            key=keys,
            value=values,
            query_start=piece.query_start,
            key_start=piece.row_start,
            longest_query=plan.max_query_len,
            longest_key=piece.longest,
            is_causal=False,
            window=None,
            has_sinks=False,  # once is enough
        )
        merged, merged_lse = torch.empty_like(part), torch.empty_like(part_lse)
        before, before_lse = attended[piece.tokens], lse[:, piece.tokens].contiguous()
        kernels.merge(merged, merged_lse, part, part_lse, before, before_lse)
        attended[piece.tokens], lse[:, piece.tokens] = merged, merged_lse
    out.copy_(attended)

"""Prompts over a quantized history: the parts into which a step is cut give the whole."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_qoq.numerics import kv_layout, reference_attention
from vllm_qoq.serving.kv.prefill import (
    attend_prefill,
    history_runs,
    plan_prefill,
    window_runs,
)

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD, BLOCK, BITS = 4, 2, 64, 16, 4
SCALE = HEAD**-0.5

counts = st.lists(st.integers(0, 60), min_size=1, max_size=6)


def covered(runs, requests):
    """Request -> the (first, length) of all runs."""
    found = {request: [] for request in range(requests)}
    for run in runs:
        assert len(run.first) == len(run.length) == run.requests.stop - run.requests.start
        for offset, part in enumerate(zip(run.first, run.length, strict=True)):
            found[run.requests.start + offset].append(part)
    return found


@given(counts, st.integers(1, 100))
def test_runs_hold_every_token_of_the_history_once_and_fit(history, rows):
    runs = history_runs(history, rows)
    assert len(runs) == math.ceil(sum(history) / rows)
    assert all(sum(run.length) <= rows for run in runs)
    for request, parts in covered(runs, len(history)).items():
        tokens = [t for first, length in parts for t in range(first, first + length)]
        assert tokens == list(range(history[request]))


@given(counts, st.integers(1, 50), st.data())
def test_runs_with_a_window_hold_what_is_seen_and_fit(history, window, data):
    new = data.draw(st.lists(st.integers(2, 9), min_size=len(history), max_size=len(history)))
    rows = window - 1 + 9
    runs = window_runs(history, new, window, rows)
    assert all(sum(run.length) <= rows for run in runs)
    for request, parts in covered(runs, len(history)).items():
        ((first, length),) = parts
        assert first == max(0, history[request] - window + 1)
        assert first + length == history[request] + new[request]


class Kernels:
    """The kernels' work in plain PyTorch; buffers of `rows` tokens, poisoned."""

    def __init__(self, pages, block_table, rows, soft_cap, sinks):
        self.pages, self.block_table, self.rows = pages, block_table, rows
        self.soft_cap, self.sinks = soft_cap, sinks

    def read(self, piece):
        assert piece.rows <= self.rows
        keys, values = torch.full((2, piece.rows, KV_HEADS, HEAD), math.nan)
        for index, blocks in enumerate(self.block_table[piece.requests]):
            begin, end = piece.row_start[index : index + 2].tolist()
            first = int(piece.first_token[index])
            every = kv_layout.read(self.pages, blocks, first + end - begin, HEAD, BITS)
            keys[begin:end], values[begin:end] = (tensor[first:] for tensor in every)
        assert piece.longest == int(piece.row_start.diff().max())
        return keys, values

    def flash(
        self,
        query,
        key,
        value,
        query_start,
        key_start,
        longest_query,
        longest_key,
        is_causal,
        window,
        has_sinks,
        out=None,
    ):
        result = torch.zeros_like(query), torch.full(query.shape[1::-1], -math.inf)
        out, lse = result if out is None else (out, result[1])
        assert longest_query >= int(query_start.diff().max())
        assert longest_key >= int(key_start.diff().max())
        starts = zip(query_start.tolist(), key_start.tolist(), strict=True)
        for (a, c), (b, d) in pairwise(starts):
            if a == b or c == d:
                continue
            group = HEADS // KV_HEADS
            k, v = (t[c:d].repeat_interleave(group, 1).transpose(0, 1) for t in (key, value))
            scores = query[a:b].transpose(0, 1) @ k.transpose(1, 2) * SCALE
            if self.soft_cap:
                scores = self.soft_cap * (scores / self.soft_cap).tanh()
            # Aligned at the end, as FlashAttention does.
            distance = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
            hidden = (distance < 0) & torch.tensor(is_causal)
            if window is not None:
                hidden |= distance >= window
            scores.masked_fill_(hidden, -math.inf)
            lse[:, a:b] = scores.logsumexp(-1)
            if has_sinks and self.sinks is not None:
                lse[:, a:b] = torch.logaddexp(lse[:, a:b], self.sinks[:, None])
            out[a:b] = ((scores - lse[:, a:b, None]).exp() @ v).transpose(0, 1)
        return out, lse

    def merge(self, out, out_lse, a, a_lse, b, b_lse):
        torch.logaddexp(a_lse, b_lse, out=out_lse)
        share = (a_lse - out_lse).exp().nan_to_num().t()[:, :, None]
        out.copy_(a * share + b * (1 - share))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(2, 20)), min_size=1, max_size=5),
    st.sampled_from([None, 1, 7, 40]),
    st.sampled_from(["plain", "mean", "capped", "sinks"]),
    st.integers(0, 2**31),
)
def test_a_step_in_parts_is_the_reference(requests, window, kind, seed):
    torch.manual_seed(seed)
    mean = torch.randn(KV_HEADS, HEAD) if kind == "mean" else None
    scores = {
        "soft_cap": 0.7 if kind == "capped" else 0.0,
        "sinks": torch.randn(HEADS) * 3 if kind == "sinks" else None,
    }
    history, new = ([pair[i] for pair in requests] for i in (0, 1))
    blocks = [-(-(h + n) // BLOCK) for h, n in requests]
    bytes_of_head = BLOCK * kv_layout.slot_bytes(HEAD, BITS)
    pages = torch.zeros(sum(blocks) + 1, KV_HEADS, bytes_of_head, dtype=torch.uint8)
    order = torch.randperm(sum(blocks)) + 1
    block_table = torch.zeros(len(requests), max(blocks), dtype=torch.int32)
    key, value, used = [], [], 0
    for request, (h, n) in enumerate(requests):
        mine = order[used : used + blocks[request]]
        block_table[request, : len(mine)] = mine
        used += len(mine)
        k, v = (torch.randn(h + n, KV_HEADS, HEAD) for _ in "kv")
        position = torch.arange(h + n)
        slots = mine[position // BLOCK] * BLOCK + position % BLOCK
        reference_attention.update(pages, k, v, slots, BITS, k_mean=mean)
        key.append(k[h:])
        value.append(v[h:])
    key, value = torch.cat(key), torch.cat(value)
    query = torch.randn(key.shape[0], HEADS, HEAD)
    starts = [0]
    for n in new:
        starts.append(starts[-1] + n)

    rows = 33 if window is None else max(33, window - 1 + max(new))
    plan = plan_prefill(starts, history, window, rows, CPU)
    out = torch.full_like(query, math.nan)
    kernels = Kernels(pages, block_table, rows, **scores)
    attend_prefill(query, key, value, out, plan, window, mean, kernels)
    expected = reference_attention.attention(
        *(query, key, value, pages, block_table),
        *(torch.tensor(history) + torch.tensor(new), torch.tensor(starts)),
        scale=SCALE,
        bits=BITS,
        sliding_window=window,
        k_mean=mean,
        **scores,
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_without_history_reads_no_pages():
    plan = plan_prefill([0, 3, 8], [0, 0], None, 100, CPU)
    assert plan.pieces == [] and plan.max_query_len == 5
    assert plan_prefill([0, 3, 8], [0, 0], 4, 100, CPU).pieces == []


@pytest.mark.parametrize("window", [None, 4])
def test_a_history_is_read_in_pieces(window):
    plan = plan_prefill([0, 3, 8], [150, 10], window, 100, CPU)
    pieces = [(piece.requests, piece.rows) for piece in plan.pieces]
    whole = slice(0, 2)
    assert pieces == (
        [(slice(0, 1), 100), (whole, 60)] if window is None else [(whole, 3 + 3 + 3 + 5)]
    )

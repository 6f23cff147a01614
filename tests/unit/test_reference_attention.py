"""Attention over the quantized cache, beside dense attention written another way."""

import math

import pytest
import torch

from vllm_qoq.numerics import kv_layout, reference_attention
from vllm_qoq.numerics.kv_layout import dequantize, quantize
from vllm_qoq.numerics.reference_attention import attention, hadamard, update

BLOCK = 16
# (tokens in the cache, new tokens): decode, a whole prompt, chunks, at and across blocks' ends
RAGGED = [(15, 1), (16, 1), (0, 33), (70, 20), (0, 1), (31, 17), (0, 300)]
# (query heads, key heads): one each, groups, one for all
HEADS = pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)], ids=str)
BITS = pytest.mark.parametrize("bits", kv_layout.WIDTHS)


class Step:
    """A ragged batch whose history is in the pages, blocks in random order."""

    def __init__(
        self,
        bits,
        heads=(4, 2),
        head_size=64,
        requests=RAGGED,
        use_hadamard=False,
        k_mean=None,
    ):
        random = torch.Generator().manual_seed(len(requests))
        self.bits, self.head_size, self.use_hadamard = bits, head_size, use_hadamard
        self.k_mean = k_mean
        lengths = [past + new for past, new in requests]
        blocks = [-(-length // BLOCK) for length in lengths]
        order = torch.randperm(sum(blocks) + 2, generator=random).int()
        self.block_table = torch.zeros(len(requests), max(blocks), dtype=torch.int32)
        for request, row in enumerate(order[: sum(blocks)].split(blocks)):
            self.block_table[request, : len(row)] = row
        self.requests = requests
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)
        starts = [0, *torch.tensor([new for _, new in requests]).cumsum(0).tolist()]
        self.query_start_loc = torch.tensor(starts, dtype=torch.int32)
        shape = (sum(blocks) + 2, heads[1], BLOCK * kv_layout.slot_bytes(head_size, bits))
        # What is not written must not matter, NaN scales included.
        self.pages = torch.full(shape, 0xFF, dtype=torch.uint8)
        dtype = torch.bfloat16
        self.keys, self.values = (
            [torch.randn(n, heads[1], head_size, generator=random).to(dtype) for n in lengths]
            for _ in range(2)
        )
        self.query = torch.randn(starts[-1], heads[0], head_size, generator=random).to(dtype)
        for request, (past, _) in enumerate(requests):
            self._write(request, 0, past)

    def _write(self, request, begin, end):
        position = torch.arange(begin, end)
        slots = self.block_table[request][position // BLOCK].long() * BLOCK + position % BLOCK
        key, value = self.keys[request][begin:end], self.values[request][begin:end]
        update(self.pages, key, value, slots, self.bits, self.use_hadamard, self.k_mean)

    def run(self, only=None, **options):
        """The outputs by request, after the new tokens were written."""
        for request, (past, new) in enumerate(self.requests):
            self._write(request, past, past + new)
        chosen = range(len(self.requests)) if only is None else [only]
        rows = [slice(*self.query_start_loc[r : r + 2].tolist()) for r in chosen]
        new = [self.requests[r][1] for r in chosen]
        new_tokens = [
            torch.cat([part[r][-n:] for r, n in zip(chosen, new, strict=True)])
            for part in (self.keys, self.values)
        ]
        output = attention(
            torch.cat([self.query[row] for row in rows]),
            *new_tokens,
            self.pages,
            self.block_table[list(chosen)],
            self.seq_lens[list(chosen)],
            torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32),
            scale=self.head_size**-0.5,
            bits=self.bits,
            use_hadamard=self.use_hadamard,
            k_mean=self.k_mean,
            **options,
        )
        return output.split(new)

    def expected(self, request, seen, window=math.inf, soft_cap=math.inf, sinks=None):
        """Dense attention in float64, one query and head after the other.

        seen(x, is_new, part) is what attention sees of the keys, part 0, or values x [L, H, D].
        """
        past, new = self.requests[request]
        is_new = torch.arange(past + new) >= past
        keys, values = (
            seen(x[request].float(), is_new & (new > 1), part).double()
            for part, x in enumerate((self.keys, self.values))
        )
        query = self.query[self.query_start_loc[request] :][:new].double()
        output = torch.zeros_like(query)
        group = query.shape[1] // keys.shape[1]
        for row in range(new):
            last = past + row + 1
            first = max(0, last - window) if window != math.inf else 0
            for head in range(query.shape[1]):
                k, v = keys[first:last, head // group], values[first:last, head // group]
                scores = k @ query[row, head] / self.head_size**0.5
                if soft_cap != math.inf:
                    scores = soft_cap * (scores / soft_cap).tanh()
                weights = scores.exp()
                of_sink = 0 if sinks is None else sinks[head].double().exp()
                output[row, head] = weights @ v / (weights.sum() + of_sink)
        return output


def as_stored(bits):
    def seen(x, is_new, part):
        stored = dequantize(*quantize(x, kv_layout.WIDTHS[bits][part]))
        return torch.where(is_new[:, None, None], x, stored)

    return seen


def unquantized(x, is_new, part):
    return x


def largest_gap(outputs, step, seen, **options):
    return max(
        float((out.double() - step.expected(request, seen, **options)).abs().max())
        for request, out in enumerate(outputs)
    )


@BITS
@HEADS
def test_it_is_exact_over_what_is_stored(bits, heads):
    step = Step(bits, heads)
    assert largest_gap(step.run(), step, as_stored(bits)) < 1e-5


@BITS
@pytest.mark.parametrize("head_size", kv_layout.HEAD_SIZES)
def test_every_head_size(bits, head_size):
    step = Step(bits, head_size=head_size, requests=RAGGED[:4])
    assert largest_gap(step.run(), step, as_stored(bits)) < 1e-5


# Half a step of a normal vector's range of about 5 is 0.17 or 0.01; averages over tokens are less.
@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.015), (4, 0.25)])
def test_it_is_close_to_dense_attention(bits, tolerance):
    step = Step(bits)
    gap = largest_gap(step.run(), step, unquantized)
    assert tolerance / 20 < gap < tolerance


@BITS
@pytest.mark.parametrize("window", [1, 7, 16, 64])
def test_a_window_hides_older_tokens(bits, window):
    step = Step(bits, requests=RAGGED[:-1])
    outputs = step.run(sliding_window=window)
    assert largest_gap(outputs, step, as_stored(bits), window=window) < 1e-5


@pytest.mark.parametrize("window", [None, 7])
def test_capped_scores_and_sinks(window):
    step = Step(4, heads=(6, 2), requests=RAGGED[:-1])
    # Larger and smaller than the scores.
    sinks = torch.tensor([-20.0, -1, 0, 1, 3, 20])
    for options in ({"soft_cap": 1.5}, {"sinks": sinks}, {"soft_cap": 0.5, "sinks": sinks}):
        outputs = step.run(sliding_window=window, **options)
        dense = options | ({} if window is None else {"window": window})
        assert largest_gap(outputs, step, as_stored(4), **dense) < 1e-5
        without = step.run(sliding_window=window)
        assert max(float((a - b).abs().max()) for a, b in zip(outputs, without, strict=True)) > 0.1


def test_a_mean_of_k_is_refused_where_scores_are_capped_or_beside_a_sink():
    step = Step(4, requests=[(5, 1)], k_mean=large_mean())
    for options in ({"soft_cap": 1.0}, {"sinks": torch.zeros(4)}):
        with pytest.raises(ValueError, match="mean of K"):
            step.run(**options)


@BITS
def test_a_whole_prompt_sees_no_quantization(bits):
    step = Step(bits, requests=[(0, 40)])
    assert largest_gap(step.run(), step, unquantized) < 1e-5


@BITS
@pytest.mark.parametrize("window", [None, 7])
def test_a_few_new_tokens_are_read_from_the_pages_as_one_at_a_time_is(bits, window):
    requests = [(15, 3), (70, 2), (0, 3), (33, 1)]
    step = Step(bits, heads=(6, 2), requests=requests)
    outputs = step.run(most_decode_tokens=3, sliding_window=window)
    for request, (past, new) in enumerate(requests):
        for i in range(new):
            one = Step(bits, heads=(6, 2), requests=[(past + i, 1)])
            one.pages, one.query = step.pages, step.query[step.query_start_loc[request] + i][None]
            one.keys, one.values = (
                [of_all[request][: past + i + 1]] for of_all in (step.keys, step.values)
            )
            one.block_table = step.block_table[request][None]
            assert torch.equal(one.run(sliding_window=window)[0][0], outputs[request][i])
    # A request with more reads its own as they are.
    longer = step.run(most_decode_tokens=2, sliding_window=window)
    changed = [not torch.equal(a, b) for a, b in zip(longer, outputs, strict=True)]
    assert changed == [True, False, True, False]


def test_new_tokens_before_the_first_of_a_request_see_nothing():
    step = Step(4, requests=[(0, 3)])
    step.run()
    step.seq_lens -= 2
    first, second, third = step.run(most_decode_tokens=3)[0]
    assert not first.any() and not second.any() and third.any()


@BITS
def test_the_batch_does_not_change_a_request(bits):
    step = Step(bits)
    together = step.run()
    for request, output in enumerate(together):
        assert torch.equal(step.run(only=request)[0], output)


def test_tiles_of_queries_do_not_change_the_result(monkeypatch):
    step = Step(4, requests=[(50, 300)])
    whole = step.run(sliding_window=100)[0]
    monkeypatch.setattr(reference_attention, "_QUERY_TILE", 33)
    torch.testing.assert_close(step.run(sliding_window=100)[0], whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_hadamard_is_the_orthogonal_sylvester_matrix(size):
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = torch.randn(3, size)
    torch.testing.assert_close(hadamard(x), x @ matrix / size**0.5)
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    with pytest.raises(ValueError, match="96 channels"):
        hadamard(torch.zeros(96))


def test_rotated_keys_lose_less_to_an_outlier():
    gaps = []
    for use_hadamard in (False, True):
        step = Step(4, head_size=128, requests=RAGGED[:4], use_hadamard=use_hadamard)
        for request in range(len(step.requests)):
            step.keys[request][:, :, 5] *= 20
        step.query[:, :, 5] /= 20  # scores stay as they are
        for request, (past, _) in enumerate(step.requests):
            step._write(request, 0, past)
        gaps.append(largest_gap(step.run(), step, unquantized))
    plain, rotated = gaps
    assert rotated < plain / 2


def large_mean():
    return torch.randn(2, 64, generator=torch.Generator().manual_seed(5)) * 20


class FloatPages:
    """Pages that keep what is written as it is."""

    def __init__(self, monkeypatch):
        self.written = {}
        monkeypatch.setattr(kv_layout, "write", self.write)
        monkeypatch.setattr(kv_layout, "read", self.read)

    def write(self, pages, slots, key, value, bits):
        for slot, k, v in zip(slots.tolist(), key.float(), value.float(), strict=True):
            self.written[slot] = k, v

    def read(self, pages, blocks, length, head_size, bits):
        slots = [int(blocks[t // BLOCK]) * BLOCK + t % BLOCK for t in range(length)]
        pairs = [self.written[slot] for slot in slots]
        shape = (length, pages.shape[1], head_size)
        return tuple(torch.stack(x) if x else torch.zeros(shape) for x in zip(*pairs, strict=True))


@pytest.mark.parametrize("use_hadamard", [False, True])
def test_a_mean_of_k_leaves_the_softmax_as_it_is(monkeypatch, use_hadamard):
    FloatPages(monkeypatch)
    requests = [pair for pair in RAGGED if pair[0]]
    step = Step(4, requests=requests, use_hadamard=use_hadamard, k_mean=large_mean())
    assert largest_gap(step.run(), step, unquantized) < 2e-5


def test_new_keys_lack_the_mean_like_those_of_the_pages():
    mean = large_mean()
    step = Step(4, requests=[(70, 20), (31, 17)], k_mean=mean)
    outputs = step.run()
    step.keys = [key.float() - mean for key in step.keys]
    assert largest_gap(outputs, step, as_stored(4)) < 1e-5


def test_keys_around_a_mean_lose_as_little_as_keys_around_zero():
    gaps = []
    for mean in (None, large_mean()):
        step = Step(4, k_mean=mean)
        step.keys = [key.float() + large_mean() for key in step.keys]
        for request, (past, _) in enumerate(step.requests):
            step._write(request, 0, past)
        gaps.append(largest_gap(step.run(), step, unquantized))
    assert gaps[1] < 0.25 < 3 * gaps[1] < gaps[0], gaps


def test_padded_requests_and_rows_are_left_out():
    step = Step(4, requests=[(20, 1)])
    (expected,) = step.run()
    output = attention(
        torch.cat([step.query, step.query]),
        step.keys[0][-1:],
        step.values[0][-1:],
        step.pages,
        torch.cat([step.block_table, step.block_table]),
        torch.tensor([21, 0]),
        torch.tensor([0, 1, 1]),
        scale=step.head_size**-0.5,
        bits=4,
    )
    assert torch.equal(output[:1], expected) and torch.count_nonzero(output[1:]) == 0

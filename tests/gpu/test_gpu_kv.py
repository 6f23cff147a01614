"""The CUDA kernels of the quantized KV cache against an oracle in float64, and to the bit."""

import math

import kv_oracle
import pytest
import torch
from gpu_room import skip_without_room

from vllm_qoq import ops
from vllm_qoq.numerics import kv_layout
from vllm_qoq.ops import kv_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ops.has_kernels("cuda"), reason="this build has no CUDA kernels (VLLM_QOQ_CUDA=1)"
    ),
]

DEVICE = torch.device("cuda")
EDGES = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 0, 1000, 2049]
BITS_AND_SIZES = [(bits, size) for bits in kv_oracle.WIDTHS for size in kv_layout.HEAD_SIZES]


class Cache:
    """Random pages, whatever is in them, and a block table for sequences of up to `most` tokens.

    Codes are random bytes; so are the scales and zeros of tokens that no sequence has, NaN too.
    """

    def __init__(self, lengths, kv_heads, head_size, bits, page_tokens):
        self.lengths, self.bits, self.head_size = lengths, bits, head_size
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        blocks = -(-max(1, *lengths) // page_tokens)
        shape = (blocks * len(lengths) + 5, kv_heads)
        size = kv_oracle.page_bytes(page_tokens, head_size, bits)
        self.pages = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, device=DEVICE)
        order = torch.randperm(shape[0], device=DEVICE)[: blocks * len(lengths)]
        self.table = order.view(len(lengths), blocks).int()

        widths = torch.tensor(kv_oracle.WIDTHS[bits], device=DEVICE)
        levels = (2**widths - 1)[:, None]  # of K and of V, for every token
        parameters = self.pages[..., -8 * page_tokens :].view(torch.float16)
        parameters = parameters.unflatten(-1, (2, page_tokens, 2))
        place = torch.arange(page_tokens, device=DEVICE)
        for row, length in zip(self.table.long(), lengths, strict=True):
            first = torch.arange(blocks, device=DEVICE)[:, None] * page_tokens
            is_used = (first + place < length)[:, None, None, :, None]
            scale_and_zero = torch.rand(parameters[row].shape, device=DEVICE)
            scale_and_zero[..., 0] = (scale_and_zero[..., 0] + 0.5) * 4 / levels
            scale_and_zero[..., 1] = (scale_and_zero[..., 1] * 0.4 + 0.3) * levels
            parameters[row] = torch.where(is_used, scale_and_zero.half(), parameters[row])

    def expected(self, query, scale, window, **options):
        out = torch.zeros(query.shape, dtype=torch.float64, device=DEVICE)
        for i, length in enumerate(self.lengths):
            if length > 0:
                key, value = kv_oracle.read(self.pages, self.table[i], self.head_size, self.bits)
                out[i] = kv_oracle.attention(query[i], key, value, length, scale, window, **options)
        return out

    def expected_of_new(self, query, counts, scale, window=0, **options):
        """The same for sequences with `counts` new tokens, NaN in rows of none of them."""
        out = torch.full(query.shape, math.nan, dtype=torch.float64, device=DEVICE)
        first = 0
        for i, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            rows, first = slice(first, first + count), first + count
            key, value = kv_oracle.read(self.pages, self.table[i], self.head_size, self.bits)
            given = (query[rows], key, value, length, scale, window)
            out[rows] = kv_oracle.attention_of_new(*given, **options)
        return out


def starts_of(counts):
    return torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()


def decode(cache, query, *, window=0, hadamard=False, out=None, **options):
    out = torch.full_like(query, math.nan) if out is None else out
    group = query.shape[1] // cache.pages.shape[1]
    kv_ops.kv_decode(
        *(query, cache.pages, cache.table, cache.seq_lens, query.shape[-1] ** -0.5, cache.bits),
        *(window, hadamard, out),
        kv_ops.workspace(DEVICE, group, query.shape[-1], options.get("query_len", 1)),
        **options,
    )
    return out


def assert_close(out, expected, more=0.0):
    """By row: the output's rounding, weights that are rounded to fp16, and `more`.

    Where one token has all the weight, three roundings of up to 2^-11 each move the whole row: of
    the weight, which is not 1 where scores are large, of its product with the scale of V, and of
    the output.
    """
    error = (out.double() - expected).norm(dim=-1)
    allowed = 3e-3 if out.dtype == torch.bfloat16 else 3 * 2**-11
    assert (error <= allowed * expected.norm(dim=-1) + more).all()


@pytest.mark.parametrize("bits, head_size", BITS_AND_SIZES)
@pytest.mark.parametrize("page_tokens", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (32, 8), (28, 4), (16, 2), (22, 2), (16, 1)])
def test_decode_attends_to_every_token_of_every_page(bits, head_size, page_tokens, heads, kv_heads):
    skip_without_room(head_size, bits, heads // kv_heads)
    if head_size in kv_ops.HALVED_SIZES and heads // kv_heads == 11:
        heads = 20  # more than 8 are an even number
    cache = Cache(EDGES, kv_heads, head_size, bits, page_tokens)
    query = torch.randn(len(EDGES), heads, head_size, device=DEVICE).half()
    out = decode(cache, query)
    assert_close(out, cache.expected(query, head_size**-0.5, 0))
    assert not kv_ops.workspace(DEVICE, heads // kv_heads, head_size)[:1024].any()


@pytest.mark.parametrize("bits, head_size", BITS_AND_SIZES)
@pytest.mark.parametrize("window", [1, 40, 700])
def test_decode_sees_only_the_window(bits, head_size, window):
    skip_without_room(head_size, bits, 4)
    cache = Cache(EDGES, 2, head_size, bits, 16)
    query = torch.randn(len(EDGES), 8, head_size, device=DEVICE).bfloat16()
    expected = cache.expected(query, head_size**-0.5, window)
    assert_close(decode(cache, query, window=window), expected)


@pytest.mark.parametrize("bits, head_size", BITS_AND_SIZES)
@pytest.mark.parametrize("heads", [8, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("soft_cap, has_sinks", [(0.5, False), (0.0, True), (2.0, True)])
def test_decode_caps_scores_and_counts_sinks(bits, head_size, heads, dtype, soft_cap, has_sinks):
    skip_without_room(head_size, bits, heads // 2)
    lengths = [*EDGES, 100000]
    cache = Cache(lengths, 2, head_size, bits, 64)
    query = torch.randn(len(lengths), heads, head_size, device=DEVICE).to(dtype)
    # Sinks that are nothing beside the tokens, as much as they, and all there is.
    sinks = torch.linspace(-20, 20, heads, device=DEVICE).to(dtype) if has_sinks else None
    # Among 100,000 tokens of nearly the same weight little is left of the sum of the codes when
    # that of the zeros is taken off, and tensor cores cut a bit off at each step of adding them up.
    cut_off = 1e-6 + 2e-9 * cache.seq_lens[:, None].double()
    for window in (0, 40):
        options = {"soft_cap": soft_cap, "sinks": sinks}
        expected = cache.expected(query, head_size**-0.5, window, **options)
        out = decode(cache, query, window=window, **options)
        assert_close(out, expected, cut_off if window == 0 else 1e-6)
        assert torch.equal(decode(cache, query, window=window, **options), out)
        plain = cache.expected(query, head_size**-0.5, window)
        assert (plain - expected).norm(dim=-1).max() > 0.1


@pytest.mark.parametrize("lengths", [[8192], [100000, 3], [700] * 64, [5] * 1500])
@pytest.mark.parametrize("head_size", kv_layout.HEAD_SIZES)
@pytest.mark.parametrize("heads, kv_heads", [(32, 8), (32, 2)])
def test_decode_divides_any_batch_and_repeats_to_the_bit(lengths, head_size, heads, kv_heads):
    skip_without_room(head_size, 4, heads // kv_heads)
    cache = Cache(lengths, kv_heads, head_size, 4, 16)
    query = torch.randn(len(lengths), heads, head_size, device=DEVICE).bfloat16()
    out = decode(cache, query)
    assert_close(out, cache.expected(query, head_size**-0.5, 0))
    for _ in range(10):
        assert torch.equal(decode(cache, query), out)


@pytest.mark.parametrize("size", [1e-6, 30.0, 6e4])
def test_decode_takes_queries_of_any_size(size):
    cache = Cache(EDGES, 2, 128, 4, 16)
    query = (torch.randn(len(EDGES), 8, 128, device=DEVICE) * size).clamp(-6e4, 6e4).half()
    # Scores are float32, so those of large queries do not say which of two near tokens is first.
    allowed = torch.zeros(query.shape[:2], dtype=torch.float64, device=DEVICE)
    for i, length in enumerate(cache.lengths):
        if length > 0:
            key, value = kv_oracle.read(cache.pages, cache.table[i], 128, 4)
            allowed[i] = kv_oracle.score_error(query[i], key, value, length, 128**-0.5)
    assert_close(decode(cache, query), cache.expected(query, 128**-0.5, 0), allowed)


def test_sequences_without_blocks_are_zero():
    cache = Cache([0, 0], 2, 128, 4, 16)
    cache.table = cache.table[:, :0]
    query = torch.randn(2, 8, 128, device=DEVICE).half()
    assert not decode(cache, query).any()


def test_decode_shows_nan():
    cache = Cache([100, 100], 2, 128, 4, 16)
    query = torch.randn(2, 8, 128, device=DEVICE).half()
    query[0, 1, 5] = math.nan
    out = decode(cache, query)
    assert out[0, 1].isnan().all()
    assert not out[0, 2:].isnan().any()
    assert not out[1].isnan().any()


def test_decode_in_a_graph_follows_lengths_and_tables():
    cache = Cache([3000] * 16, 8, 128, 4, 16)
    query = torch.randn(16, 32, 128, device=DEVICE).bfloat16()
    out = torch.empty_like(query)
    decode(cache, query, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(cache, query, out=out)
    for lengths in ([0] * 16, [3000] * 16, [1] * 15 + [2999], [0, 2048] * 8):
        query.normal_()
        out.fill_(math.nan)
        cache.lengths = lengths
        cache.seq_lens.copy_(torch.tensor(lengths))
        cache.table.copy_(cache.table.roll(1, 0))
        graph.replay()
        assert_close(out, cache.expected(query, 128**-0.5, 0))


def decode_new(cache, query, counts, **options):
    return decode(cache, query, query_len=max(2, *counts), query_start=starts_of(counts), **options)


def assert_close_in_rows_of_sequences(out, expected, more=0.0):
    """`assert_close`, and nothing was written where no sequence has a row."""
    is_used = ~expected.isnan().flatten(1).any(1)
    assert out[~is_used].isnan().all()
    assert_close(out[is_used], expected[is_used], more)


# With EDGES, sequences that are shorter than their new tokens, that begin a tile with some of them,
# and that have none in this step.
COUNTS = [1, 1, 4, 2, 4, 4, 3, 4, 0, 4, 2, 0, 4, 4]


@pytest.mark.parametrize("bits, head_size", BITS_AND_SIZES)
@pytest.mark.parametrize("page_tokens", [16, 48, 64])
@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (32, 8), (28, 4), (16, 2), (16, 1)])
@pytest.mark.parametrize("most", [2, 4, 8])
def test_new_tokens_see_what_is_before_them(bits, head_size, page_tokens, heads, kv_heads, most):
    skip_without_room(head_size, bits, heads // kv_heads, most)
    counts = [count * most // 4 for count in COUNTS]
    cache = Cache(EDGES, kv_heads, head_size, bits, page_tokens)
    query = torch.randn(sum(counts) + 3, heads, head_size, device=DEVICE).half()
    out = decode_new(cache, query, counts)
    expected = cache.expected_of_new(query, counts, head_size**-0.5)
    assert_close_in_rows_of_sequences(out, expected)
    group = heads // kv_heads
    assert not kv_ops.workspace(DEVICE, group, head_size, max(2, *counts))[:1024].any()


@pytest.mark.parametrize("bits, head_size", BITS_AND_SIZES)
@pytest.mark.parametrize("window", [1, 3, 40, 700])
@pytest.mark.parametrize("soft_cap, has_sinks", [(0.0, False), (2.0, True)])
def test_new_tokens_have_windows_of_their_own(bits, head_size, window, soft_cap, has_sinks):
    skip_without_room(head_size, bits, 4, 4)
    cache = Cache(EDGES, 2, head_size, bits, 16)
    query = torch.randn(sum(COUNTS), 8, head_size, device=DEVICE).bfloat16()
    sinks = torch.linspace(-20, 20, 8, device=DEVICE).bfloat16() if has_sinks else None
    options = {"window": window, "soft_cap": soft_cap, "sinks": sinks}
    expected = cache.expected_of_new(query, COUNTS, head_size**-0.5, **options)
    assert_close(decode_new(cache, query, COUNTS, **options), expected, 1e-6)


@pytest.mark.parametrize("lengths", [[8192], [100000, 3], [700] * 64, [5] * 300])
@pytest.mark.parametrize("head_size", kv_layout.HEAD_SIZES)
@pytest.mark.parametrize("query_len", [2, 4])
def test_new_tokens_of_any_batch_repeat_to_the_bit(lengths, head_size, query_len):
    skip_without_room(head_size, 4, 4, query_len)
    cache, counts = Cache(lengths, 8, head_size, 4, 16), [query_len] * len(lengths)
    query = torch.randn(sum(counts), 32, head_size, device=DEVICE).bfloat16()
    out = decode_new(cache, query, counts)
    assert_close(out, cache.expected_of_new(query, counts, head_size**-0.5))
    for _ in range(10):
        assert torch.equal(decode_new(cache, query, counts), out)


def test_new_tokens_are_as_one_after_the_other():
    """What a request generates is what it verifies."""
    lengths, count = [33, 700, 4096], 4
    cache = Cache(lengths, 8, 128, 4, 64)
    query = torch.randn(3, count, 32, 128, device=DEVICE).bfloat16()
    together = decode_new(cache, query.flatten(0, 1), [count] * 3).view(query.shape)
    for i in range(count):
        cache.seq_lens = torch.tensor(lengths, device=DEVICE).int() - count + 1 + i
        one = decode(cache, query[:, i].contiguous())
        assert_close(together[:, i], one.double())


def test_new_tokens_show_nan():
    cache = Cache([100, 100], 2, 128, 4, 16)
    query = torch.randn(8, 8, 128, device=DEVICE).half()
    query[2, 1, 5] = math.nan
    out = decode_new(cache, query, [4, 4])
    assert out[2, 1].isnan().all()
    assert out.isnan().sum() == 128


def test_new_tokens_in_a_graph_follow_lengths_and_starts():
    cache = Cache([3000] * 16, 8, 128, 4, 16)
    query = torch.randn(64, 32, 128, device=DEVICE).bfloat16()
    out, starts = torch.empty_like(query), starts_of([4] * 16)
    options = {"query_len": 4, "query_start": starts, "out": out}
    decode(cache, query, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(cache, query, **options)
    for lengths, counts in (
        ([3000] * 16, [4] * 16),
        ([0] * 16, [4] * 16),
        ([5] * 15 + [2999], [4] * 12 + [0] * 4),  # a batch that is padded
        ([3000, 2048] * 8, [1, 4, 3, 2] * 4),
    ):
        query.normal_()
        out.fill_(math.nan)
        cache.lengths = lengths
        cache.seq_lens.copy_(torch.tensor(lengths))
        starts.copy_(starts_of(counts))
        graph.replay()
        expected = cache.expected_of_new(query, counts, 128**-0.5)
        assert_close_in_rows_of_sequences(out, expected)


def skip_where_nothing_rotates(head_size, hadamard):
    if hadamard and head_size & (head_size - 1):
        pytest.skip(f"{head_size} channels are no power of two")


@pytest.mark.parametrize("bits, head_size", BITS_AND_SIZES)
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_mean", [False, True])
def test_write_equals_the_oracle_to_the_bit(bits, head_size, hadamard, dtype, has_mean):
    skip_where_nothing_rotates(head_size, hadamard)
    tokens, kv_heads, page_tokens = 100, 3, 32
    size = kv_oracle.page_bytes(page_tokens, head_size, bits)
    pages = torch.randint(0, 256, (6, kv_heads, size), dtype=torch.uint8)
    key, value = torch.randn(2, tokens + 4, 2 * kv_heads, head_size).to(dtype)[..., ::2, :]
    key[1], value[2, 0], key[3], value[4] = 0, 0.37, 60000, 1e-8
    key[5, 1], value[6, 1, 3] = 100 + key[5, 1] / 100, -30000
    slots = torch.randperm(6 * page_tokens)[:tokens]
    slots[::7] = -1
    expected, written = pages.clone(), pages.to(DEVICE)
    k_mean = torch.randn(kv_heads, head_size) * 30 if has_mean else None
    kv_oracle.write(expected, slots, key[:tokens], value[:tokens], bits, hadamard, k_mean)
    kv_ops.kv_write(
        *(key.to(DEVICE), value.to(DEVICE), slots.to(DEVICE), bits, hadamard, written),
        k_mean.to(DEVICE) if has_mean else None,
    )
    assert torch.equal(written.cpu(), expected)


def test_write_keeps_nan():
    pages = torch.zeros(1, 1, kv_oracle.page_bytes(16, 128, 4), dtype=torch.uint8, device=DEVICE)
    key = torch.randn(2, 1, 128, device=DEVICE).half()
    key[0, 0, 17] = math.nan
    kv_ops.kv_write(key, key, torch.arange(2, device=DEVICE), 4, False, pages)
    for read in kv_oracle.read(pages, torch.zeros(1, device=DEVICE), 128, 4):
        assert read[0].isnan().all()
        assert not read[1].isnan().any()


@pytest.mark.parametrize("bits, head_size", BITS_AND_SIZES)
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("page_tokens", [16, 48])
def test_dequantize_reads_ranges_of_sequences(bits, head_size, hadamard, page_tokens):
    skip_where_nothing_rotates(head_size, hadamard)
    cache = Cache([100, 7, 300, 64], 3, head_size, bits, page_tokens)
    first, counts = [10, 0, 200, 0], [90, 7, 77, 0]
    starts = torch.tensor([5, *counts]).cumsum(0).int()
    key, value = torch.full((2, 200, 3, head_size), math.nan, device=DEVICE).half()
    kv_ops.kv_dequantize(
        *(cache.pages, cache.table, torch.tensor(first, device=DEVICE).int(), starts.to(DEVICE)),
        *(bits, hadamard, key, value),
    )
    for i, count in enumerate(counts):
        rows = slice(int(starts[i]), int(starts[i + 1]))
        wanted = slice(first[i], first[i] + count)
        k, v = kv_oracle.read(cache.pages, cache.table[i], head_size, bits)
        k = kv_oracle.rotate(k.cpu()).to(DEVICE) if hadamard else k
        assert torch.equal(key[rows], k[wanted].half())
        assert torch.equal(value[rows], v[wanted].half())
    for unused in (slice(0, 5), slice(int(starts[-1]), None)):
        assert key[unused].isnan().all()
        assert value[unused].isnan().all()


@pytest.mark.parametrize("bits, head_size", BITS_AND_SIZES)
def test_a_step_writes_then_attends_with_a_rotation(bits, head_size):
    skip_without_room(head_size, bits, 4)
    skip_where_nothing_rotates(head_size, True)
    lengths, page_tokens = [70, 1, 130], 16
    cache = Cache(lengths, 2, head_size, bits, page_tokens)
    key, value = torch.randn(2, sum(lengths), 2, head_size, device=DEVICE).bfloat16()
    slots = torch.cat(
        [
            row[torch.arange(n, device=DEVICE) // page_tokens].long() * page_tokens
            + torch.arange(n, device=DEVICE) % page_tokens
            for row, n in zip(cache.table, lengths, strict=True)
        ]
    )
    kv_ops.kv_write(key, value, slots, bits, True, cache.pages)
    query = torch.randn(3, 8, head_size, device=DEVICE).bfloat16()
    expected = cache.expected(kv_oracle.rotate(query), head_size**-0.5, 0)
    assert_close(decode(cache, query, hadamard=True), expected)


def test_refusals_name_the_value():
    cache = Cache([100], 2, 128, 4, 16)
    query = torch.randn(1, 8, 128, device=DEVICE).half()
    with pytest.raises(RuntimeError, match="7 query heads for 2 KV heads"):
        decode(cache, query[:, :7])
    with pytest.raises(RuntimeError, match="the head size is 80"):
        decode(cache, query[..., :80])
    with pytest.raises(RuntimeError, match=r"has 72 bytes a token"):
        decode(cache, query[..., :64])
    with pytest.raises(RuntimeError, match=r"seq_lens is Int \[2\], expected contiguous Int \[1\]"):
        cache.seq_lens = cache.seq_lens.repeat(2)
        decode(cache, query)

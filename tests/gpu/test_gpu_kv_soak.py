"""Thousands of random steps over one pool of pages: requests come, wait, are preempted and end.

After every step the pool must answer as pages do that were written at once, in order, to the bit.
"""

import math
import random

import kv_oracle
import pytest
import torch

from vllm_qoq import ops
from vllm_qoq.ops import kv_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ops.has_kernels("cuda"), reason="this build has no CUDA kernels (VLLM_QOQ_CUDA=1)"
    ),
]

DEVICE = torch.device("cuda")
STEPS = 2500
ROWS, HEADS, KV_HEADS, SIZE = 24, 8, 2, 128
PAGE, LONGEST = 16, 400
PAGES_OF_ROW = LONGEST // PAGE
POOL = ROWS * PAGES_OF_ROW // 3  # too few for all at their longest


class Request:
    """Its token i has the keys and values `start` + i of the pool's."""

    def __init__(self, rng):
        self.start = rng.randrange(10_000)
        self.length = rng.randrange(
            1, LONGEST - 200
        )  # tokens in the pages, or to be computed again
        self.end = self.length + rng.randrange(1, 200)
        self.pages = []


def slots(pages, first, last):
    """Where tokens first..last - 1 go."""
    return [pages[i // PAGE] * PAGE + i % PAGE for i in range(first, last)]


class Pool:
    """Pages that are filled with NaN when they are free, and the graph that reads them."""

    def __init__(self, bits, hadamard):
        self.bits, self.hadamard = bits, hadamard
        self.key, self.value = torch.randn(2, 11_000, KV_HEADS, SIZE, device=DEVICE).bfloat16()
        size = kv_oracle.page_bytes(PAGE, SIZE, bits)
        shape = POOL, KV_HEADS, size
        self.pages = torch.full(shape, 255, dtype=torch.uint8, device=DEVICE)
        self.fresh = torch.empty(
            (ROWS * PAGES_OF_ROW, KV_HEADS, size), dtype=torch.uint8, device=DEVICE
        )
        self.table = torch.zeros(ROWS, PAGES_OF_ROW, dtype=torch.int32, device=DEVICE)
        self.in_order = torch.arange(ROWS * PAGES_OF_ROW, device=DEVICE).int().view(ROWS, -1)
        self.lengths = torch.zeros(ROWS, dtype=torch.int32, device=DEVICE)
        self.query = torch.randn(ROWS, HEADS, SIZE, device=DEVICE).bfloat16()
        self.out = torch.empty_like(self.query)
        self.workspace = kv_ops.workspace(DEVICE, HEADS // KV_HEADS, SIZE)
        self.decode(self.pages, self.table, self.out)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.decode(self.pages, self.table, self.out)

    def decode(self, pages, table, out):
        kv_ops.kv_decode(
            *(self.query, pages, table, self.lengths, SIZE**-0.5, self.bits, 0, self.hadamard),
            *(out, self.workspace),
        )

    def write(self, pages, requests_and_slots):
        tokens = [
            r.start + i
            for r, first, at in requests_and_slots
            for i in range(first, first + len(at))
        ]
        index = torch.tensor(tokens, device=DEVICE)
        places = torch.tensor([slot for *_, at in requests_and_slots for slot in at], device=DEVICE)
        kv_ops.kv_write(self.key[index], self.value[index], places, self.bits, self.hadamard, pages)

    def expected(self, running):
        """Of pages that nobody had before, in the order of the rows."""
        self.fresh.fill_(255)
        self.write(
            self.fresh,
            [
                (r, 0, slots(range(row * PAGES_OF_ROW, (row + 1) * PAGES_OF_ROW), 0, r.length))
                for row, r in enumerate(running)
            ],
        )
        out = torch.full_like(self.out, math.nan)
        self.decode(self.fresh, self.in_order, out)
        return out


@pytest.mark.parametrize("bits, hadamard", [(4, False), (4, True), (8, False), ("k8v4", False)])
def test_random_steps_equal_pages_that_were_written_at_once(bits, hadamard):
    rng = random.Random(torch.seed())
    pool = Pool(bits, hadamard)
    free, running, waiting = list(range(POOL)), [], []
    preempted = ended = 0

    def release(request):
        pool.pages[torch.tensor(request.pages, device=DEVICE)] = 255
        free.extend(request.pages)
        request.pages = []

    for step in range(STEPS):
        rng.shuffle(free)
        writes = []
        # The running ones get a token more; whoever finds no page puts another one out.
        for request in list(running):
            if request not in running:
                continue
            while request.length % PAGE == 0 and len(request.pages) * PAGE == request.length:
                if free:
                    request.pages.append(free.pop())
                    continue
                victim = running.pop()
                release(victim)
                waiting.append(victim)
                preempted += 1
                if victim is request:
                    break
            if request.pages:
                request.length += 1
        for request in running:
            first = request.length - 1
            writes.append((request, first, slots(request.pages, first, request.length)))
        if not waiting and rng.random() < 0.5:
            waiting.append(Request(rng))
        while waiting and len(running) < ROWS:
            needed = -(-waiting[0].length // PAGE)
            if needed > len(free):
                break
            request = waiting.pop(0)
            request.pages = [free.pop() for _ in range(needed)]
            writes.append((request, 0, slots(request.pages, 0, request.length)))
            running.insert(rng.randrange(len(running) + 1), request)
        if not running:
            continue
        pool.write(pool.pages, writes)

        lengths = [r.length for r in running] + [0] * (ROWS - len(running))
        table = [r.pages + [POOL - 1] * (PAGES_OF_ROW - len(r.pages)) for r in running]
        pool.lengths.copy_(torch.tensor(lengths))
        pool.table[: len(running)] = torch.tensor(table, device=DEVICE).int()
        pool.query.normal_()
        pool.out.fill_(math.nan)
        pool.graph.replay()
        expected = pool.expected(running)
        assert torch.equal(pool.out, expected), f"step {step}"
        assert pool.out[: len(running)].abs().amax((1, 2)).min() > 0

        for request in [r for r in running if r.length >= r.end]:
            running.remove(request)
            release(request)
            ended += 1
    assert preempted > 20 and ended > 100, (preempted, ended)

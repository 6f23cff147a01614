"""Predict what a GEMM of the portable path takes on cards that it has not run on.

    python docs/measurements/predict_portable.py

prints the table of portable_h200.md. The shares and the constant are what fits the times that were
measured on an H200, in data/portable_h200/gemm.json, to within 21 %; nothing else is known.
"""

from __future__ import annotations

from typing import NamedTuple

from vllm_qoq.bench.cases import LAYERS, OURS, SHAPES, Case
from vllm_qoq.bench.roofline import bytes_moved, operations
from vllm_qoq.markdown import markdown_table

KERNEL, MODEL = "qoq-g128", "llama-3-8b"
TOKENS = (1, 16, 64, 256, 1024, 4096)
# A launch, the first fetch and the last output, in seconds.
CONSTANT = 6.4e-6
# Of the memory's published bandwidth, and of the rate of int8 mma with few tokens and with more.
OF_BANDWIDTH, OF_RATE_OF_FEW, OF_RATE = 0.8, 0.45, 0.61
FEW = 64


class Card(NamedTuple):
    """Published bytes a second, and dense int8 operations a second."""

    name: str
    bandwidth: float
    rate: float


# Of the H200, whose data sheet has the rate of wgmma, the rate of mma.sync that was measured.
H200 = Card("H200", 4.8e12, 1290e12)
CARDS = (
    Card("A100 80 GB SXM", 2.039e12, 624e12),
    Card("L40S", 0.864e12, 733e12),
    Card("RTX 4090", 1.008e12, 661e12),
)


def seconds(card: Card, case: Case) -> tuple[float, bool]:
    """Predict the seconds of a call, and whether the tensor cores rather than memory bind."""
    memory = bytes_moved(case, OURS[KERNEL]) / (card.bandwidth * OF_BANDWIDTH)
    share = OF_RATE_OF_FEW if case.m <= FEW else OF_RATE
    products = operations(case) / (card.rate * share)
    return CONSTANT + max(memory, products), products > memory


def cell(card: Card, case: Case) -> str:
    """Write microseconds, bold where the tensor cores bind."""
    time, is_bound_by_products = seconds(card, case)
    text = f"{1e6 * time:.0f}"
    return f"**{text}**" if is_bound_by_products else text


def text() -> str:
    """Write the table."""
    rows = [
        [card.name, layer, *(cell(card, Case(layer, n, k, m)) for m in TOKENS)]
        for card in CARDS
        for layer, (n, k) in zip(LAYERS, SHAPES[MODEL], strict=True)
    ]
    return markdown_table(["card", "microseconds at M =", *map(str, TOKENS)], rows)


if __name__ == "__main__":
    print(text())

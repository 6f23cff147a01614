"""What `vllm-qoq doctor` runs on a GPU, on a CPU: right kernels pass, and a wrong one is found."""

import pytest
import torch
from torch.library import Library

from vllm_qoq.doctor import trial
from vllm_qoq.numerics import kv_layout, reference_attention
from vllm_qoq.ops import kv_ops, library

CPU = torch.device("cpu")
BITS = {(4, 4): 4, (8, 8): 8, (8, 4): "k8v4"}


def write(key, value, slots, k_bits, v_bits, hadamard, pages, k_mean):
    reference_attention.update(
        pages, key, value, slots, BITS[k_bits, v_bits], use_hadamard=hadamard, k_mean=k_mean
    )


def decode(query, pages, table, lengths, scale, k_bits, v_bits, window, hadamard, out, *options):
    *_, new, starts = options
    starts = torch.arange(len(lengths) + 1) if starts is None else starts
    out.copy_(
        reference_attention.attention(
            *(query, query, query, pages, table, lengths, starts),
            **{"scale": scale, "bits": BITS[k_bits, v_bits]},
            **{"most_decode_tokens": new, "use_hadamard": hadamard},
        )
    )


def dequantize(pages, table, first, starts, k_bits, v_bits, hadamard, key, value):
    for i, skipped in enumerate(first.tolist()):
        rows = slice(int(starts[i]), int(starts[i + 1]))
        length = skipped + rows.stop - rows.start
        k, v = kv_layout.read(pages, table[i], length, key.shape[-1], BITS[k_bits, v_bits])
        key[rows] = reference_attention.hadamard(k)[skipped:].half()
        value[rows] = v[skipped:].half()


@pytest.fixture(autouse=True)
def kv_ops_on_the_cpu(monkeypatch):
    """The ops of the KV cache have kernels alone: here they are their reference."""
    monkeypatch.setattr(kv_ops, "workspace", lambda *_: torch.zeros(1))
    added = Library("qoq", "IMPL")
    for name, function in (("write", write), ("decode", decode), ("dequantize", dequantize)):
        added.impl(f"kv_{name}", function, "CPU")
    yield
    added._destroy()


def test_every_op_is_tried_and_is_right():
    found = trial.run(CPU)
    assert found.tried == set(library._ops["cuda"])
    assert found.wrong == []


@pytest.mark.parametrize("op", library._ops["cuda"])
def test_an_op_that_is_wrong_in_one_value_is_named(op, monkeypatch):
    run = trial.Trial.run

    def one_wrong(self, name, *arguments):
        found = run(self, name, *arguments)
        if name == op:
            written = {"kv_write": 6, "kv_decode": 9, "kv_dequantize": 7}
            value = arguments[written[op]] if op in written else found[0]
            value.view(-1)[0] += 3
        return found

    monkeypatch.setattr(trial.Trial, "run", one_wrong)
    wrong = trial.run(CPU).wrong
    assert wrong[0].startswith(op), wrong


def test_an_output_that_is_not_written_is_wrong(monkeypatch):
    run = trial.Trial.run

    def nothing_written(self, name, *arguments):
        return () if name == "kv_decode" else run(self, name, *arguments)

    monkeypatch.setattr(trial.Trial, "run", nothing_written)
    assert trial.run(CPU).wrong[0] == "kv_decode, 4 bits, one new token a request: 24 of 24 values"

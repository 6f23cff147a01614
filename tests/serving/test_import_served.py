"""A real model in QServe's layout, imported and run by vLLM."""

import sys

import pytest
from engines import engine
from qserve_served import quantized
from safetensors.torch import load_file, save_file

from vllm_qoq.bench.perplexity import text_perplexity
from vllm_qoq.cli import main as cli


def test_vllm_runs_an_imported_model(tiny_model, heldout_text, tmp_path, monkeypatch):
    """What is left against the dequantized weights is int8 activations."""
    packed, plain = {}, {}
    for name, tensor in load_file(tiny_model / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if not layer.endswith("_proj"):
            packed[name] = plain[name] = tensor
            continue
        leaves, weight = quantized(tensor)
        packed |= {f"{layer}.{leaf}": value for leaf, value in leaves.items()}
        plain[name] = weight.bfloat16()
    for folder, tensors in (("qserve", packed), ("dequantized", plain)):
        (tmp_path / folder).mkdir()
        for file in tiny_model.iterdir():
            if file.suffix == ".json":
                (tmp_path / folder / file.name).write_bytes(file.read_bytes())
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})

    arguments = ("import", tmp_path / "qserve", "-o", tmp_path / "out", "--base", tiny_model, "-q")
    monkeypatch.setattr(sys, "argv", ["vllm-qoq", *map(str, arguments)])
    assert cli.main() == 0
    text = heldout_text.read_text()[:20_000]
    imported, dequantized = (
        text_perplexity(engine(tmp_path / folder), text, 256)["perplexity"]
        for folder in ("out", "dequantized")
    )
    assert imported == pytest.approx(dequantized, rel=0.006)

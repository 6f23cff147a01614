"""A real model in QServe's layout, imported and run by vLLM."""

import sys

import pytest
import torch
from engines import engine
from safetensors.torch import load_file, save_file
from test_import import packed_codes, permuted

from vllm_qoq.bench.perplexity import text_perplexity
from vllm_qoq.cli import main as cli


def quantized(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """QServe's g128 leaves of a weight, rounded to the nearest code, and what they stand for."""
    n, k = weight.shape
    channel = (weight.float().abs().amax(1) / 119).half()
    level1 = (weight.float() / channel.float()[:, None]).round().clamp(-119, 119)
    groups = level1.view(n, k // 128, 128)
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    scale = ((high - low) / 15).ceil().clamp(1, 16)
    zero = (-low / scale).round().clamp(0, 15)
    codes = ((groups / scale[:, :, None]).round() + zero[:, :, None]).clamp(0, 15)
    stands_for = ((codes - zero[:, :, None]) * scale[:, :, None]).view(n, k) * channel[:, None]
    leaves = {
        "qweight": packed_codes(codes.view(n, k).long()),
        "s1_scales": channel,
        "s2_scales": permuted(scale.long(), "qserve"),
        "s2_zeros": permuted(((-zero * scale + 128) % 256 - 128).long(), "qserve"),
    }
    return leaves, stands_for


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

"""`merge --nest`: two finished sets, one of them stored as a residual on the other."""

import json
import shutil
import sys

import pytest
import torch
from qoq_checkpoints import write_plain
from safetensors.torch import load_file, save_file

from merge_tools.__main__ import main
from vllm_qoq.checkpoint import verify
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.numerics.packing import unpack_nibbles
from vllm_qoq.numerics.reference import dequantize, nested_int8
from vllm_qoq.progress import Progress
from vllm_qoq.quantizer.sets import SetKind

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """`float`, the model; `w4a8`, QoQ by rounding; `w8a8`, int8 per channel by rounding."""
    folder = tmp_path_factory.mktemp("nest")
    shutil.copytree(tiny_model, folder / "float")
    write_plain(tiny_model, folder / "w4a8")
    write_plain(tiny_model, folder / "channel", -1)
    shutil.copytree(tiny_model, folder / "w8a8")
    tensors = {}
    for name, tensor in load_file(tiny_model / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor / scale).round().to(torch.int8)
            tensors[name.replace("weight", "weight_scale")] = scale
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "w8a8" / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "w8a8" / "config.json").read_text())
    config["quantization_config"] = SetKind("w8a8", 128).config()
    (folder / "w8a8" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def merge(monkeypatch, capsys, tmp_path):
    """`merge(NAME=DIR, ..., option)` into `tmp_path / "out"`: exit code, stdout, stderr."""

    def run(*options, **sets):
        arguments = [f"{name}={folder}" for name, folder in sets.items()]
        command = ["merge_tools", "merge", *arguments, "-o", tmp_path / "out", *options]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        return main(), *capsys.readouterr()

    return run


@pytest.mark.parametrize("source", ["float", "w8a8"])
def test_the_nested_set_is_the_source_on_the_bases_scale(merge, folders, tmp_path, source):
    code, out, err = merge("--nest", "--json", w8=folders / source, w4=folders / "w4a8")
    assert code == 0, err
    assert max(json.loads(out)["clipped_shares"].values()) < 0.01
    merged = Checkpoint.open(tmp_path / "out")
    assert merged.section.base_of("w8") == "w4" and merged.section.routing.prefill == "w8"
    assert verify.structure(merged.path) == []
    assert verify.contents(merged.path, Progress(quiet=True)) == []
    base = Checkpoint.open(folders / "w4a8")
    leaves = {
        leaf: merged.get(f"w4.{UP}.{leaf}")
        for leaf in ("qweight", "channel_scale", "group_scale", "group_offset")
    }
    assert all(torch.equal(leaves[leaf], base.get(f"{UP}.{leaf}")) for leaf in leaves)
    weight = Checkpoint.open(folders / "float").get(f"{UP}.weight").float()
    leaves["qresidual"] = merged.get(f"w8.{UP}.qresidual")
    steps = (dequantize(leaves) - weight).abs() / leaves["channel_scale"][:, None]
    # Half a step of this scale; where int8 was rounded before, half of its own. Few are clipped.
    bound = 0.51 if source == "float" else 1.01
    assert (steps > bound).float().mean() < 0.01 and steps.max() <= bound + 1
    assert not [name for name in merged.tensors if name.endswith(("_proj.weight", "weight_scale"))]


def test_weights_out_of_reach_are_clipped_or_refused(merge, folders, tmp_path):
    copy = tmp_path / "moved"
    shutil.copytree(folders / "w4a8", copy)
    tensors = load_file(copy / "model.safetensors")
    codes = tensors[f"{UP}.qweight"]
    tensors[f"{UP}.qweight"] = codes ^ 8  # the even inputs move by 8 steps of their group
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    code, _, err = merge("--nest", w8=folders / "float", w4=copy)
    assert code == 2 and f"{UP}: " in err and "--max-clipped 0.1" in err and "--nested" in err
    assert not (tmp_path / "out").exists()
    code, out, err = merge("--nest", "--max-clipped", "0.6", w8=folders / "float", w4=copy)
    assert code == 0 and f"in {UP}" in out, err
    merged = Checkpoint.open(tmp_path / "out")
    residual = merged.get(f"w8.{UP}.qresidual")
    assert {0, 15} <= set(unpack_nibbles(residual).unique().tolist())
    leaves = ("qweight", "group_scale", "group_offset")
    nested_int8(*(merged.get(f"w4.{UP}.{leaf}") for leaf in leaves), residual)


def test_what_cannot_nest_is_refused(merge, folders, w8a8_dir, w4a16_dir, tmp_path):
    base, eight = folders / "w4a8", folders / "w8a8"
    cases = [
        ({"w8a8": w8a8_dir, "w4a8": base}, "model.layers.0.input_layernorm.weight: differs"),
        ({"w4a16": w4a16_dir, "w4a8": base}, "is 4 bits (packed) in w4a16"),
        ({"w8a8": eight, "w4a8": folders / "channel"}, "w4a8 is qoq_linear per channel"),
        ({"w8a8": eight, "a": base, "b": base}, "takes one qoq_linear set"),
        ({"w8a8": eight}, "takes one qoq_linear set"),
    ]
    for sets, message in cases:
        code, _, err = merge("--nest", **sets)
        assert code == 2 and message in err, (message, err)
        assert "leave out --nest" in err
    code, _, err = merge(w8=folders / "float", w4=base)
    assert code == 2 and "this model is not quantized" in err
    assert not (tmp_path / "out").exists()

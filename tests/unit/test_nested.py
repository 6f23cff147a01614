"""`quantize --nested`: an 8-bit set that is a residual on a 4-bit one, from grid to checkpoint."""

import json
import re
import sys

import pytest
import torch
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from rounded_layers import fill, output_error
from safetensors.torch import load_file, save_file

from vllm_qoq.checkpoint import inspect, verify
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.cli import main as cli
from vllm_qoq.numerics.packing import unpack_nibbles
from vllm_qoq.progress import Progress
from vllm_qoq.quantizer import QuantizeError
from vllm_qoq.quantizer.job import run
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.plan import Job
from vllm_qoq.quantizer.report import refuse_clipped, table
from vllm_qoq.quantizer.sets import SetKind, dequantize

FINE = SetKind("w4a8", 32), SetKind("w8a8", 32, "w4a8")
W4, NESTED, W8 = SetKind("w4a8", 128), SetKind("w8a8", 128, "w4a8"), SetKind("w8a8", 128)
FEW = {"samples": 4, "seqlen": 64, "kv_bits": 16}
UP = "model.layers.0.mlp.up_proj"


def layer(n=48, k=256, seed=0):
    """Weights and the Hessian of correlated inputs."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(512, k // 4, generator=random) @ torch.randn(k // 4, k, generator=random)
    x += 0.3 * torch.randn(512, k, generator=random)
    return torch.randn(n, k, generator=random), x.t() @ x / len(x)


def filled(kind, weight, hessian, clip=True, base=None):
    grid = kind.grid(weight, torch.bfloat16, clip, base)
    fill(weight, hessian, grid)
    return grid


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([1e-6, 1.0, 1e4]),
    kind=st.sampled_from(["normal", "one outlier", "zeros", "two values"]),
    clip=st.booleans(),
    use_gptq=st.booleans(),
    is_fine=st.booleans(),
)
def test_every_residual_fits_and_gives_an_int8(seed, spread, kind, clip, use_gptq, is_fine):
    weight, hessian = layer(4, 128, seed)
    if kind == "one outlier":
        weight[0, 5] = 1000
    elif kind == "zeros":
        weight[:] = 0
    elif kind == "two values":
        weight = weight.sign()
    weight *= spread
    hessian = hessian if use_gptq else None
    w4, w8 = FINE if is_fine else (W4, NESTED)
    base = filled(w4, weight, hessian, clip)
    before = base.tensors(torch.bfloat16)
    nested = filled(w8, weight, hessian, clip, base)
    stored = nested.tensors(torch.bfloat16)
    assert stored.keys() == {"qresidual"}
    # dequantize refuses what is no int8
    assert torch.equal(dequantize({**before, **stored}), nested.dequantized())
    after = base.tensors(torch.bfloat16)
    assert all(torch.equal(after[leaf], before[leaf]) for leaf in before)


def test_rounded_weights_lose_at_most_a_step_to_the_residual():
    weight, _ = layer()
    base = filled(W4, weight, None, clip=False)
    nested = filled(NESTED, weight, None, base=base)
    steps = (nested.dequantized() - weight).abs() / base.channel_scale[:, None]
    # Scale 16 leaves up to 8, and a residual holds 7.
    assert steps.max() <= 1.01 and nested.clipped_share() < 0.01


def test_the_pass_of_its_own_loses_less_than_clipping_afterwards():
    weight, hessian = layer()
    base = filled(W4, weight, hessian)
    nested = filled(NESTED, weight, hessian, base=base)
    rounded = filled(NESTED, weight, None, base=base)
    alone = filled(W8, weight, hessian)
    errors = [
        output_error(weight, grid.dequantized(), hessian) for grid in (alone, nested, rounded, base)
    ]
    assert errors[0] < errors[1] < 0.5 * errors[2] and errors[1] < 0.3 * errors[3]
    assert 0 < nested.clipped_share() < rounded.clipped_share()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sets": ["w8a8"]}, "give both in sets"),
        ({"sets": ["w4a16", "w4a8"]}, "give both in sets"),
        ({"group_size": -1}, "group_size is -1; give 128, 64 or 32"),
        ({"sets": ["w4a8", "w8a8"]}, "give w8a8,w4a8"),
    ],
)
def test_what_cannot_nest_is_refused_with_the_remedy(options, message):
    with pytest.raises(QuantizeError, match=message):
        QuantizeOptions.parse({"nested": True, **options}, "options")
    QuantizeOptions.parse(options, "options")


def test_the_worst_layer_is_refused_by_name_and_share():
    rows = [
        {"layer": f"layer{i}", "set": "w8a8", "output_error": 0.0, "seconds": 0.0} for i in range(3)
    ]
    refuse_clipped(rows, 0.0)  # no nested set
    for row, share in zip(rows, (0.01, 0.03, 0.02), strict=True):
        row["clipped_share"] = share
    refuse_clipped(rows, 0.03)
    with pytest.raises(QuantizeError, match=r"layer1: 3\.00% .*--max-clipped 0\.02.*--nested"):
        refuse_clipped(rows, 0.02)


def quantize(model, out, nested, **job):
    options = QuantizeOptions.parse({**FEW, "nested": nested}, "options")
    work = out.with_name(f"{out.name}.work")
    return run(Job(model, out, DATA / "calibration.txt", work, quiet=True, **job), options)


@pytest.fixture(scope="module")
def nested_dir(tiny_model, tmp_path_factory):
    """Both sets of the tiny model, refused first."""
    out = tmp_path_factory.mktemp("nested") / "checkpoint"
    with pytest.raises(QuantizeError, match="% of the residuals are clipped"):
        quantize(tiny_model, out, nested=True, max_clipped=0.0)
    assert not out.exists()
    report = quantize(tiny_model, out, nested=True, resume="required")
    assert "clipped, mean (worst)" in table(report)
    return out


def test_the_four_bit_set_is_the_same_without_nesting(nested_dir, tiny_model, tmp_path):
    quantize(tiny_model, tmp_path / "whole", nested=False)
    nested, whole = Checkpoint.open(nested_dir), Checkpoint.open(tmp_path / "whole")
    mine = [name for name in whole.tensors if not name.startswith("w8a8.")]
    assert sum(name.startswith("w4a8.") for name in mine) == 14 * 4
    for name in mine:
        assert torch.equal(nested.get(name), whole.get(name)), name
    ours, theirs = (
        {row["layer"]: row["output_error"] for row in report["layers"] if row["set"] == "w8a8"}
        for folder in (nested_dir, tmp_path / "whole")
        for report in [json.loads((folder / "quantization_report.json").read_text())]
    )
    assert all(ours[name] < 5 * theirs[name] for name in theirs)


def test_the_checkpoint_says_what_it_is_and_how_large(nested_dir):
    assert Checkpoint.open(nested_dir).section.base_of("w8a8") == "w4a8"
    assert verify.structure(nested_dir) == []
    assert verify.contents(nested_dir, Progress(quiet=True)) == []
    entry = inspect.inspect(nested_dir)["sets"]["w8a8"]
    assert entry["bits_per_weight"] == 4 and entry["base"] == "w4a8"
    assert 8.125 < entry["bits_per_weight_with_base"] < 8.3
    assert "with its base w4a8" in inspect.table(inspect.inspect(nested_dir))


def test_inspect_and_verify_know_a_load(nested_dir, tmp_path):
    for file in nested_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((nested_dir / "config.json").read_text())
    load = {"enter": 8, "leave": 2, "prefill": "w4a8"}
    config["quantization_config"]["routing"]["load"] = load
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = inspect.inspect(tmp_path)
    assert report["routing"]["load"] == load
    lines = inspect.table(report).splitlines()
    at = lines.index("busy, from 8 waiting requests until 2 are left:")
    assert lines[at + 1] == "  prompts: w4a8" and not lines[at + 2].startswith("  ")
    assert verify.structure(tmp_path) == []


def test_a_dry_run_of_the_command_tells_the_size(
    nested_dir, tiny_model, tmp_path, monkeypatch, capfd
):
    command = ["vllm-qoq", "quantize", tiny_model, "-o", tmp_path / "out", "--nested", "--dry-run"]
    command += ["--text", DATA / "calibration.txt", "--json", "--max-clipped", "0.02"]
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    assert cli.main() == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan["options"]["nested"]
    # scales per row, and the lm_head that was tied
    written = Checkpoint.open(nested_dir).total_bytes
    assert plan["output_bytes"] == pytest.approx(written, rel=0.1)


def test_the_clipped_share_is_at_most_what_verify_says(nested_dir):
    report = json.loads((nested_dir / "quantization_report.json").read_text())
    shares = [row["clipped_share"] for row in report["layers"] if row["set"] == "w8a8"]
    assert len(shares) == 14 and min(shares) > 0
    assert min(shares) < verify.limits(nested_dir)["w8a8"] < 0.5


@pytest.fixture
def damaged(nested_dir, tmp_path):
    """`damaged(change)` is the checkpoint after `change(tensors)`, in one shard."""

    def make(change):
        tensors = {}
        for file in sorted(nested_dir.glob("*.safetensors")):
            tensors |= load_file(file)
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text((nested_dir / "config.json").read_text())
        return tmp_path

    return make


def overflow(tensors):
    """Push the largest weight of a layer over 127, or the least under -128."""
    leaves = ("qweight", "group_scale", "group_offset")
    qweight, scale, offset = (tensors[f"w4a8.{UP}.{leaf}"] for leaf in leaves)
    scale[0, 0], offset[0, 0] = 1, 112
    qweight[0, 0] = 0xFF
    assert unpack_nibbles(qweight)[0, 0] == 15  # 127
    tensors[f"w8a8.{UP}.qresidual"][0, 0] = 0x99  # +1


DAMAGES = [
    (overflow, rf"w8a8\.{UP}\.qresidual: .*leaves the range of int8"),
    (
        lambda t: t.update({f"w8a8.{UP}.qresidual": t[f"w8a8.{UP}.qresidual"][:8].clone()}),
        rf"w8a8\.{UP}\.qresidual: is U8 \[8, 128\], expected U8",
    ),
    (lambda t: t.pop(f"w8a8.{UP}.qresidual"), rf"w8a8\.{UP}\.qresidual: missing, w4a8 has"),
    (
        lambda t: t.update({f"w8a8.{UP}.channel_scale": t[f"w4a8.{UP}.channel_scale"].clone()}),
        rf"w8a8\.{UP}\.channel_scale: .*qoq_residual does not have it",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"), DAMAGES, ids=["overflow", "shape", "missing", "more"]
)
def test_verify_finds_a_residual_that_cannot_be(damaged, change, message):

    folder = damaged(change)
    found = verify.structure(folder) + verify.contents(folder, Progress(quiet=True))
    assert any(re.search(message, finding) for finding in found), found

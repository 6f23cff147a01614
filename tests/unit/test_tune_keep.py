"""`vllm-qoq tune --keep-first` and `--keep-sensitive`: which layers stay in the accurate set."""

import json

import pytest
import torch
from safetensors.torch import save_file

from vllm_qoq.checkpoint.format import Section
from vllm_qoq.routing.table import LayerRule, Phase, Routing, Step
from vllm_qoq.tuner import TuneError, keep

ORDER = ("w8a8", "w4a8")
SECTION = Section.parse(
    {
        "quant_method": "qoq",
        "format_version": 1,
        "sets": {
            "w8a8": {"quant_method": "qoq_residual", "base": "w4a8"},
            "w4a8": {"quant_method": "qoq_linear"},
        },
        "routing": {"prefill": "w8a8", "decode": "w4a8"},
    }
)
LAYERS = [f"model.layers.{i}.{leaf}" for i in range(12) for leaf in ("mlp.up_proj", "self_attn.o")]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": SECTION.to_json(), "architectures": ["X"]})
    )
    names = [f"w4a8.{layer}.qweight" for layer in LAYERS] + ["model.layers.99.norm.weight"]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    return tmp_path


def write_report(folder, error_of):
    """error_of(block, set) for both layers of a block."""
    rows = [
        {"layer": layer, "set": name, "output_error": error_of(int(layer.split(".")[2]), name)}
        for layer in LAYERS
        for name in ORDER
    ]
    (folder / keep.REPORT).write_text(json.dumps({"layers": rows, "seconds": 1.0}))


def test_the_first_layers_are_counted_by_number(folder):
    expected = [f"model.layers.{i}" for i in range(11)]
    assert keep.first(folder, SECTION, 11) == expected
    with pytest.raises(TuneError, match=r"--keep-first 13: the model has 12 quantized"):
        keep.first(folder, SECTION, 13)


def test_the_sensitive_layers_lose_most_against_the_accurate_set(folder):
    # Block 3 is bad in both sets; 7 and then 10 lose most by taking 4 bits.
    errors = {"w4a8": {3: 0.9, 7: 0.5, 10: 0.4}, "w8a8": {3: 0.9}}
    write_report(folder, lambda block, name: errors[name].get(block, 0.1))
    assert keep.sensitive(folder, ORDER, 1) == ["model.layers.7"]
    assert keep.sensitive(folder, ORDER, 2) == ["model.layers.7", "model.layers.10"]
    with pytest.raises(TuneError, match=r"--keep-sensitive 40: the model has 12 quantized"):
        keep.sensitive(folder, ORDER, 40)


def test_without_a_sound_report_the_remedy_is_named(folder):
    with pytest.raises(TuneError, match=r"--keep-sensitive 2: .* use --keep-first"):
        keep.sensitive(folder, ORDER, 2)
    (folder / keep.REPORT).write_text('{"layers": [{"layer": 1}]}')
    with pytest.raises(TuneError, match=r"--keep-sensitive 2: .*layers\.0"):
        keep.sensitive(folder, ORDER, 2)
    write_report(folder, lambda block, name: 0.1)
    with pytest.raises(TuneError, match="has no errors of w4a16 or w8a16"):
        keep.sensitive(folder, ("w8a16", "w4a16"), 2)


def test_kept_layers_generate_in_the_accurate_set_and_others_as_before():
    old = [
        LayerRule(match="model.layers.1.*", decode="w4a8"),
        LayerRule(match="x*", prefill="w8a8"),
    ]
    table = Routing(
        prefill="w4a8",
        decode="w4a8",
        layers=tuple(keep.rules(["model.layers.1", "model.layers.10"], "w8a8", old)),
    )
    assert [rule.match for rule in table.layers] == [
        "model.layers.1.*",
        "model.layers.10.*",
        "x*",
    ]
    for block, decode in ((1, "w8a8"), (10, "w8a8"), (11, "w4a8"), (100, "w4a8")):
        route = table.route([f"model.layers.{block}.mlp.up_proj"])
        assert (
            route.choose(Step(Phase.DECODE, 1)) == route.choose(Step(Phase.DECODE, 500)) == decode
        )
        assert route.choose(Step(Phase.PREFILL, 1)) == "w4a8"

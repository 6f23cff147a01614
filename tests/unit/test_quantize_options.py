"""Options, recipes and efforts of `quantize`, and what its report tells a user to do."""

import json
import re
import shlex

import pytest

from vllm_qoq.quantizer import QuantizeError
from vllm_qoq.quantizer.effort import EFFORTS
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.report import steps_that_ran
from vllm_qoq.quantizer.worst import advice, worst_layers
from vllm_qoq.routing.table import Phase, Routing, Step


@pytest.fixture
def recipe(tmp_path):
    def write(**values):
        file = tmp_path / "recipe.json"
        file.write_text(json.dumps(values))
        return file

    return write


def test_an_effort_stands_for_options_and_explicit_ones_win(recipe):
    assert QuantizeOptions() == QuantizeOptions(effort="default")
    assert QuantizeOptions().effort == "default"
    for name, preset in EFFORTS.items():
        options = QuantizeOptions.read(recipe(effort=name), {})
        assert {key: getattr(options, key) for key in preset} == preset
        assert options.effort == name and "effort" not in options.model_dump()
    mixed = QuantizeOptions.read(recipe(passes=7, effort="fast"), {"effort": "best", "samples": 9})
    assert (mixed.passes, mixed.samples, mixed.effort) == (EFFORTS["best"]["passes"], 9, None)
    with pytest.raises(QuantizeError, match=r"effort must be one of fast, default, best, not 'so'"):
        QuantizeOptions.read(recipe(effort="so"), {})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("no_k_mean", True, r'no_k_mean: .*write "k_mean": false to leave it out'),
        ("no-gptq", True, r'no-gptq: .*write "gptq": false'),
        ("--no-gptq", False, r'write "gptq": false .* \(--no-gptq: False was given\)'),
        ("kv-bits", 8, r"kv-bits: write 'kv_bits' in a recipe"),
        ("nonsense", 1, r"nonsense: .*check its spelling"),
    ],
)
def test_a_recipe_with_the_command_lines_names_is_refused_with_its_own(recipe, key, value, message):
    with pytest.raises(QuantizeError, match=message):
        QuantizeOptions.read(recipe(**{key: value}), {})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("min_expert_tokens", 0, r"0 is out of range; give 1 \(GPTQ for every expert .*\) or more"),
        ("samples", -1, "-1 is out of range; give 1 or more pieces of text"),
        ("seqlen", 1, "1 is out of range; give 2 or more tokens"),
        ("passes", 101, r"101 is out of range; give 0 \(GPTQ alone\) to 100"),
    ],
)
def test_a_number_out_of_range_is_refused_with_what_may_be_given(recipe, key, value, message):
    with pytest.raises(QuantizeError, match=rf"recipe\.json\.{key}: {message}"):
        QuantizeOptions.read(recipe(**{key: value}), {})


def test_the_report_says_which_steps_ran():
    assert steps_that_ran(QuantizeOptions(), 44) == (
        "effort default: rotate, k_mean, smooth_attention, smooth_outputs, reorder, clip, gptq "
        "with 3 passes of descent; 44 pieces of 1024 tokens"
    )
    bare = {name: False for name in ("rotate", "smooth_outputs", "reorder", "clip", "gptq")}
    found = steps_that_ran(QuantizeOptions(**bare, kv_bits=16, samples=2), 2)
    assert found == "steps: rounding to the nearest alone; 2 pieces of 1024 tokens"


def rows(errors):
    """{set: [error of the decoder layer 0, of 1, ...]} as rows of the report."""
    return [
        {"layer": f"model.layers.{i}.mlp.up_proj", "set": name, "output_error": e, "seconds": 0.0}
        for name, each in errors.items()
        for i, e in enumerate(each)
    ]


def test_the_layers_that_lose_most_have_a_routing_that_keeps_them(tmp_path):
    w8a8, w4a8 = [0.01] * 12, [0.1] * 12
    w4a8[7], w4a8[3] = 0.4, 0.3
    w4a8[5] = w8a8[5] = 0.9  # as bad in both
    found = worst_layers(rows({"w8a8": w8a8, "w4a8": w4a8}), ("w8a8", "w4a8"))
    assert [row["layer"] for row in found["decoder_layers"][:2]] == [
        "model.layers.7",
        "model.layers.3",
    ]
    report = found | {"options": {"sets": ["w8a8", "w4a8"]}}
    text = advice(report, tmp_path / "my out")
    option = shlex.split(text.splitlines()[1])[1]
    routing = Routing.parse(json.loads(option)["qoq"]["routing"], ["w8a8", "w4a8"])
    decode = Step(Phase.DECODE, 1)
    names = {i: [f"model.layers.{i}.mlp.up_proj"] for i in (7, 3, 70, 0)}
    chosen = {i: routing.route(each).choose(decode) for i, each in names.items()}
    assert chosen == {7: "w8a8", 3: "w8a8", 70: "w4a8", 0: "w4a8"}
    assert "in 2 of 12 decoder layers" in text and "--keep-sensitive 2" in text
    assert "on the GPU that will serve" in text  # tune measures, and refuses to write on a CPU
    assert shlex.split(text.splitlines()[2].partition(": ")[2])[2] == str(tmp_path / "my out")


def test_without_a_better_set_there_is_nothing_to_keep(tmp_path):
    for sets in (("w4a8",), ("w4a8", "w8a8")):
        found = worst_layers(rows({"w8a8": [0.01], "w4a8": [0.1]}), sets)
        assert "routing" not in found and len(found["decoder_layers"]) == 1
        assert advice(found, tmp_path) == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("nested", value) for value in ("yes", 1, "true", [])),
        *(("clip", value) for value in (0, "off", None)),
        *(("kv_hadamard", value) for value in (1, "no")),
        *(("samples", value) for value in ("64", 64.0, True, 1.5, None)),
        *(("passes", value) for value in ("3", False)),
        *(("group_size", value) for value in ("128", True)),
        *(("kv_bits", value) for value in ("4", 5)),
        *(("rotate", value) for value in (1, "yes", "true")),
        *(("sets", value) for value in ("w8a8", {"w8a8": 1}, [8], "w8a8,w4a8", None)),
    ],
)
def test_a_recipe_with_a_value_of_another_type_is_refused_with_its_place(recipe, key, value):
    file = recipe(**{key: value})
    place = re.escape(f"--recipe {file}.{key}")
    with pytest.raises(QuantizeError, match=rf"^{place}.*, but it is .*; change it$"):
        QuantizeOptions.read(file, {})


def test_a_recipe_of_all_options_is_the_options(recipe):
    """As a report has them, which people copy."""
    options = QuantizeOptions(sets=("w8a8", "w4a16"), kv_bits="k8v4", rotate="values", samples=3)
    assert QuantizeOptions.read(recipe(**options.model_dump(mode="json")), {}) == options

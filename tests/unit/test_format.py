"""The contract of config.json and of tensor names."""

import pytest

from vllm_qoq.checkpoint.format import Section, join_name, split_layer, split_name
from vllm_qoq.errors import FormatError

GOOD = {
    "quant_method": "qoq",
    "format_version": 1,
    "sets": {"w8a8": {"quant_method": "compressed-tensors"}, "w4": {"quant_method": "gptq"}},
    "routing": {"prefill": "w8a8", "decode": [{"set": "w4"}]},
    "input_ratio": {"w4": ["model.layers.*.mlp.up_proj"]},
}


def test_json_round_trip():
    assert Section.parse(GOOD).to_json() == GOOD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sets": {}}, "at least one set"),
        ({"sets": {"W8": {"quant_method": "x"}}}, "'W8'.*lower-case"),
        ({"sets": {"q_proj": {"quant_method": "x"}}}, "'q_proj'.*lower-case"),
        ({"sets": {"model": {"quant_method": "x"}}}, "'model' is reserved"),
        ({"sets": {"w8a8": {}}}, "'w8a8' has no quant_method"),
        ({"sets": {"w4": {"quant_method": "qoq_linear", "group_size": 16}}}, "w4.group_size: .*16"),
        (
            {"sets": {"w8a8": {"quant_method": "qoq_residual", "base": 5}}},
            "w8a8.base: .*string.* 5",
        ),
        ({"routing": 5}, "routing: Input should be a valid dictionary, but it is 5; change"),
        ({"format_version": 2}, "format_version"),
        ({"routing": {"prefill": "w9", "decode": "w4"}}, "'w9'"),
        ({"input_ratio": {"w9": []}}, "'w9'"),
        ({"kv": 4}, "quantization_config.kv: Extra inputs"),
    ],
)
def test_bad_sections_are_refused_with_the_key(change, message):
    with pytest.raises(FormatError, match=message):
        Section.parse(GOOD | change)


def test_names_split_only_at_known_sets():
    assert split_name("w4.model.norm.weight", {"w4"}) == ("w4", "model.norm.weight")
    assert split_name("model.norm.weight", {"w4"}) == (None, "model.norm.weight")
    assert join_name(*split_name("w4.a.b", {"w4"})) == "w4.a.b"
    assert split_layer("a.b.weight") == ("a.b", "weight")


def test_input_ratio_is_found_by_glob():
    section = Section.parse(GOOD)
    assert section.has_input_ratio("w4", "model.layers.11.mlp.up_proj")
    assert not section.has_input_ratio("w4", "model.layers.11.mlp.down_proj")
    assert not section.has_input_ratio("w8a8", "model.layers.11.mlp.up_proj")

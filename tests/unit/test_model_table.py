"""The table of models in the documents is what the tests run over and what was measured."""

import model_table

from vllm_qoq.models.table import with_names


def test_the_page_has_the_table_that_tests_and_measurements_make():
    page = model_table.PAGE.read_text(encoding="utf-8")
    assert model_table.with_table(page) == page, "run python tests/support/model_table.py"


def test_every_class_that_is_quantized_is_served_in_a_test():
    assert model_table.classes_served() == set(with_names())


def test_a_measured_shape_is_named_in_the_row_of_its_class():
    (row,) = (row for row in model_table.table().splitlines() if "`Qwen3ForCausalLM`" in row)
    assert row == "| `Qwen3ForCausalLM` | yes | yes | yes | qwen3-32b |"

"""Routing tables on the command line of the merge, and the spelling of its options."""

import json

import pytest

from vllm_qoq.cli.main import main
from vllm_qoq.cli.parser import kebab_case

TABLE = {
    "prefill": "w8a8",
    "decode": [{"max_batch": 16, "set": "w4a16"}, {"set": "w8a8"}],
    "layers": [{"match": "model.layers.[01].*", "decode": [{"set": "w8a8"}]}],
}


@pytest.fixture
def merge(monkeypatch, w8a8_dir, w4a16_dir, tmp_path):
    """merge(TABLE or None, OPTION, ...): the exit code of a merge into tmp_path / "out"."""

    def run(table, *options) -> int:
        arguments = ["merge", f"w8a8={w8a8_dir}", f"w4a16={w4a16_dir}", "-o", tmp_path / "out"]
        if table is not None:
            (tmp_path / "table.json").write_text(json.dumps(table))
            arguments += ["--routing", tmp_path / "table.json"]
        arguments += ["--quiet", *options]
        monkeypatch.setattr("sys.argv", ["vllm-qoq", *map(str, arguments)])
        return main()

    return run


def test_a_table_from_a_file_is_stored_whole(merge, tmp_path):
    assert merge(TABLE) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["routing"] == TABLE


def test_a_rule_may_use_the_name_of_a_fused_layer(merge):
    rule = {"match": "*.qkv_proj", "decode": "w8a8"}
    assert merge(TABLE | {"layers": [rule]}, "--dry-run") == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"layers": [{"match": "model.layer.*", "decode": "w8a8"}]},
            ["'model.layer.*'", "a layer is called model.layers.0.mlp.down_proj"],
        ),
        ({"layers": [{"match": "lm_head", "decode": "w8a8"}]}, ["'lm_head'"]),
        ({"prefill": "w9"}, ["table.json", "'w9'"]),
        ({"prefil": "w8a8"}, ["table.json", "routing.prefil"]),
        ({"decode": [{"max_batch": 4, "set": "w8a8"}]}, ["table.json", "above 4"]),
    ],
)
def test_a_bad_table_is_refused(merge, tmp_path, capsys, change, named):
    assert merge(TABLE | change) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in named) and message.count("\n") == 1, message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--prefill", "--decode"])
def test_a_table_excludes_the_short_form(merge, capsys, option):
    assert merge(TABLE, option, "w8a8") == 2
    assert "leave out --prefill and --decode" in capsys.readouterr().err


def test_a_table_that_is_not_there_is_refused(merge, tmp_path, capsys):
    assert merge(None, "--routing", tmp_path / "none.json") == 2
    assert "none.json: no such file" in capsys.readouterr().err


def test_options_may_be_written_with_underscores(merge, tmp_path):
    assert merge(None, "--max_shard_size=300KB", "--no_model_card") == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert not (tmp_path / "out" / "README.md").exists()


def test_only_names_of_options_are_rewritten():
    before = ["merge", "a_b=c_d", "--a_b", "c_d", "--e_f=g_h", "-x_y", "--", "--i_j"]
    after = ["merge", "a_b=c_d", "--a-b", "c_d", "--e-f=g_h", "-x_y", "--", "--i_j"]
    assert kebab_case(before) == after

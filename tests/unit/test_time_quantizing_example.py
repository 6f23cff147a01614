"""examples/time_quantizing.py: its commands are those of the programs, and its table adds up."""

import importlib

import pytest
from example_scripts import load_example

from vllm_qoq.bench.serving.shapes import SHAPES
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.cli.parser import Parser
from vllm_qoq.quantizer.inputs import check_model


@pytest.fixture(scope="module")
def script():
    return load_example("time_quantizing")


def test_every_way_is_a_command_that_the_programs_take(script, tmp_path):
    peer, programs = load_example("quantize_llmcompressor"), Parser().add_subparsers()
    importlib.import_module("vllm_qoq.cli.quantize").add_parser(programs)
    for way in script.WAYS:
        _, *words = script.command(way, tmp_path / "m", tmp_path / "o", tmp_path / "t", 2, 64)
        if way.startswith(script.PEER):
            assert words[0].endswith("quantize_llmcompressor.py")
            assert words[words.index("--scheme") + 1] in peer.SCHEMES
        else:
            assert words[:2] == ["-m", "vllm_qoq.cli"]
            parsed = programs.choices[words[2]].parse_args(words[3:])
            assert (parsed.samples, parsed.seqlen) == (2, 64)


def test_a_model_of_a_shape_can_be_quantized(script, tmp_path):
    config = SHAPES["llama-2-7b"].config()
    small = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2}
    config |= small | {"num_key_value_heads": 1, "vocab_size": 300}
    script.write_model(tmp_path / "model", config, blocks=1)
    inputs = check_model(Checkpoint.open(tmp_path / "model"), "quantized")
    assert inputs.dimensions.layers == 1


def test_a_whole_model_is_the_first_run_and_the_blocks_that_it_lacks(script):
    runs = [script.Run("nested", 4, 30.0, 3 * 2**30), script.Run("nested", 2, 20.0, 2**30)]
    (row,) = script.table(runs, layers=32).splitlines()[2:]
    assert row == "| nested | 2: 20.0, 4: 30.0 | 5.00 | 2.8 | 3.0 |"

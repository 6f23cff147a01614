"""examples/dequantize.py: a set becomes an ordinary model that computes what its weights say."""

import pytest
import torch
from example_scripts import load_example
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from vllm_qoq.numerics import reference

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def dequantize(monkeypatch):
    script = load_example("dequantize")

    def run(*args):
        monkeypatch.setattr("sys.argv", ["dequantize.py", *map(str, args)])
        script.main()

    return run


def test_a_set_of_ours_becomes_the_model_that_its_codes_stand_for(dequantize, nested_dir, tmp_path):
    out = tmp_path / "out"
    dequantize(nested_dir, out, "--set", "w4a8")
    stored = {}
    for file in nested_dir.glob("*.safetensors"):
        stored |= load_file(file)
    prefix = next(name for name in stored if name.endswith(f"{LAYER}.qweight"))
    prefix = prefix.removesuffix("qweight")
    leaves = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    found = model.get_submodule(LAYER).weight
    assert torch.equal(found, reference.dequantize(leaves).to(torch.bfloat16))


def test_llmcompressors_weights_are_near_the_models(dequantize, w4a16_dir, tiny_model, tmp_path):
    dequantize(w4a16_dir, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    model = load_file(tiny_model / "model.safetensors")
    assert found.keys() == model.keys()
    name = f"{LAYER}.weight"
    lost = (found[name].float() - model[name].float()).norm() / model[name].float().norm()
    assert 0.02 < lost < 0.2
    assert torch.equal(found["model.norm.weight"], model["model.norm.weight"])
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("config.json", "model.safetensors", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    with pytest.raises(SystemExit, match="out: is there already; name a new folder"):
        dequantize(w4a16_dir, tmp_path / "out")


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "/.* has the sets w8a8, w4a8; name one with --set"),
        (("--set", "w2"), "--set w2: .* has the sets w8a8, w4a8; name one with --set"),
    ],
    ids=["no set", "an unknown set"],
)
def test_one_of_several_sets_has_to_be_named(dequantize, nested_dir, tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        dequantize(nested_dir, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()

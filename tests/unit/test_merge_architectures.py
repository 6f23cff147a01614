"""Sets whose norms differ, as SmoothQuant leaves them, of models with other norms than Llama's."""

import pytest
import torch
from rtn_checkpoints import edit, w8a8
from safetensors.torch import load_file
from tiny_models import write

from merge_tools import MergeError
from merge_tools.job import merge
from vllm_qoq.checkpoint.verify import verify

MODULES = {
    "GemmaForCausalLM": ("input_layernorm", 1, [f"self_attn.{x}_proj" for x in "qkv"]),
    "Gemma2ForCausalLM": ("pre_feedforward_layernorm", 1, ["mlp.gate_proj", "mlp.up_proj"]),
    "Phi3ForCausalLM": ("input_layernorm", 0, ["self_attn.qkv_proj"]),
    "CohereForCausalLM": (
        "input_layernorm",
        0,
        [*(f"self_attn.{x}_proj" for x in "qkv"), "mlp.gate_proj", "mlp.up_proj"],
    ),
}


@pytest.mark.parametrize(
    ("name", "norm", "offset", "readers"), [(k, *v) for k, v in MODULES.items()]
)
def test_the_readers_of_a_norm_make_up_for_it(name, norm, offset, readers, tiny_model, tmp_path):
    model = write(name, tmp_path / "model", tiny_model)
    a, smoothed = w8a8(model, tmp_path / "a"), write(name, tmp_path / "smoothed", tiny_model)
    scale = torch.linspace(0.3, 3, 128)

    def smooth(tensors, config):
        for layer in ("model.layers.0", "model.layers.1"):
            weight = tensors[f"{layer}.{norm}.weight"]
            weight.copy_((weight + offset) / scale - offset)
            for reader in readers:
                tensors[f"{layer}.{reader}.weight"] *= scale

    b = w8a8(edit(smoothed, smooth), tmp_path / "b")
    out = tmp_path / "out"
    merge({"a": a, "b": b}, out)
    assert verify(out).findings == ()
    tensors = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    ratios = {k: t for k, t in tensors.items() if k.endswith("input_ratio")}
    assert set(ratios) == {
        f"b.model.layers.{layer}.{reader}.input_ratio" for layer in (0, 1) for reader in readers
    }
    for ratio in ratios.values():
        torch.testing.assert_close(ratio, 1 / scale, rtol=1e-3, atol=0)


def test_norms_that_no_ratio_brings_together_are_refused_before_anything_is_written(
    tiny_model, tmp_path
):
    model = write("Phi3ForCausalLM", tmp_path / "model", tiny_model)
    b = w8a8(model, tmp_path / "b")

    def without_a_channel(tensors, config):
        tensors["model.layers.1.input_layernorm.weight"][5] = 0

    a = w8a8(edit(model, without_a_channel), tmp_path / "a")
    message = r"layers\.1\.input_layernorm.*channel 5 is 0 in a and .* no factor brings together"
    with pytest.raises(MergeError, match=message):
        merge({"a": a, "b": b}, tmp_path / "out", dry_run=True)

"""Models of images and text: names, configs, merges and what is refused."""

import json
import shutil

import pytest
import torch
import vision_models
from rtn_checkpoints import edit, w8a8
from safetensors.torch import load_file

from merge_tools.job import merge
from vllm_qoq.checkpoint import inspect
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.checkpoint.language import language_part
from vllm_qoq.checkpoint.verify import verify
from vllm_qoq.errors import FormatError
from vllm_qoq.models.tensors import expected_tensors
from vllm_qoq.models.vision import (
    TOWERS,
    VISION_LANGUAGE,
    language_config,
    language_name,
    stored_pattern,
    whole_name,
)


@pytest.fixture(scope="module", params=vision_models.MODELS)
def model(request, tiny_model, tmp_path_factory):
    name = request.param
    folder = tmp_path_factory.mktemp("vision") / name
    return vision_models.write(name, folder, tiny_model)


def test_every_class_is_tried():
    tried = {f"{name.partition(',')[0]}ForConditionalGeneration" for name in vision_models.MODELS}
    assert tried == set(VISION_LANGUAGE)


def test_the_language_model_has_the_tensors_of_its_class(model):
    part = language_part(Checkpoint.open(model))
    expected = expected_tensors(part.config)
    assert {name: info.shape for name, info in part.tensors.items()} == dict(expected)
    for name in expected:
        assert language_name(whole_name(name)) == name


def test_a_set_with_other_norms_is_merged_verified_and_inspected(model, tmp_path):
    smoothed = edit(shutil.copytree(model, tmp_path / "smoothed"), smooth)
    folders = {
        name: vision_models.finish(w8a8(one, tmp_path / name, TOWERS), model)
        for name, one in (("a", model), ("b", smoothed))
    }
    out = tmp_path / "out"
    layer = next(
        n for n in load_file(model / "model.safetensors") if n.endswith("0.mlp.up_proj.weight")
    )
    merge(folders, out)
    assert verify(out).findings == ()
    for file in vision_models.side_files(model):
        assert (out / file.name).read_bytes() == file.read_bytes()
    tensors = Checkpoint.open(out).tensors
    assert f"b.{layer.removesuffix('weight')}input_ratio" in tensors
    towers = [name for name in tensors if language_name(name) is None]
    assert towers and not [name for name in tensors if name.startswith(("a.v", "b.v"))]
    report = inspect.inspect(out)
    assert report["sets"]["a"]["layers"] == 14 and report["lm_head"] == {"bits": 32}


def smooth(tensors, config):
    scale = torch.linspace(0.5, 2, 128).bfloat16()
    for name, tensor in tensors.items():
        if name.endswith("post_attention_layernorm.weight"):
            tensor /= scale
        elif name.endswith(("mlp.gate_proj.weight", "mlp.up_proj.weight")) and language_name(name):
            tensor *= scale


def test_a_quantized_tower_is_refused(model, tmp_path):
    def quantize_tower(tensors, config):
        name = next(
            name
            for name in tensors
            if ".fc1.weight" in name or (".proj.weight" in name and "attn" in name)
        )
        tensors[name] = tensors[name].to(torch.int8)
        tensors[f"{name}_scale"] = torch.ones(len(tensors[name]), 1)

    folders = {}
    for name in "ab":
        made = edit(w8a8(model, tmp_path / name, TOWERS), quantize_tower)
        folders[name] = vision_models.finish(made, model)
    with pytest.raises(FormatError, match=r"is quantized, but what reads images stays in float"):
        merge(folders, tmp_path / "out")


QWEN = json.loads(
    '{"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", '
    '"rms_norm_eps": 1e-6, "hidden_size": 64, "vision_config": {}, "image_token_id": 5, '
    '"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}'
)


def test_a_config_without_a_text_config_is_read_too():
    found = language_config(QWEN)
    assert (found["architectures"], found["model_type"]) == (["Qwen2ForCausalLM"], "qwen2")
    assert found["rope_scaling"] == {"type": "default"} and "vision_config" not in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"model_type": "opt"}}, "text_config.model_type: 'opt' is not supported"),
        ({"rms_norm_eps": None}, "rms_norm_eps: missing"),
        (
            {
                "tie_word_embeddings": True,
                "text_config": QWEN | {"tie_word_embeddings": False},
            },
            "tie_word_embeddings: .* different things",
        ),
    ],
)
def test_a_config_that_cannot_be_is_named(change, message):
    with pytest.raises(FormatError, match=message):
        language_config(QWEN | change)


def test_a_layer_of_vllm_is_found_under_every_name_of_a_checkpoint():
    import re

    pattern = re.compile(stored_pattern("language_model.model.layers.1.mlp"))
    for prefix in ("model.language_model.", "language_model.model.", "model."):
        assert pattern.fullmatch(f"{prefix}layers.1.mlp")
    assert not pattern.fullmatch("model.layers.11mlp")
    assert stored_pattern("model.layers.1.mlp") == r"model\.layers\.1\.mlp"

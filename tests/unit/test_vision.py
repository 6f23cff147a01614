"""Models of images and text: names, configs, merges and what is refused."""

import json
import re
import shutil

import pytest
import torch
import transformers
import vision_models
from rtn_checkpoints import edit, w8a8
from safetensors.torch import load_file

from merge_tools.job import merge
from vllm_qoq.bench.evaluate import job as evaluate
from vllm_qoq.checkpoint import complete, inspect, towers
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.checkpoint.format import SECTION, Section
from vllm_qoq.checkpoint.language import language_part
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.checkpoint.verify import Verified, verify
from vllm_qoq.errors import FormatError, UserError
from vllm_qoq.models.tensors import expected_tensors
from vllm_qoq.models.vision import (
    TOWERS,
    VISION_LANGUAGE,
    language_config,
    language_name,
    stored_pattern,
    whole_name,
)
from vllm_qoq.quantizer import calibrate_kv
from vllm_qoq.quantizer.job import quantize
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.rotate import hadamard

# No tower needs these. From a number of labels transformers would make a list of them.
UNREAD = {"num_labels": "many", "layer_types": "many", "vocab_size": "many", "head_dim": "many"}
LLAVA = "LlavaForConditionalGeneration"
ONE_MLP = [name for name in vision_models.MODELS if "Moe" not in name]


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


@pytest.mark.parametrize("model", ONE_MLP, indirect=True)
def test_a_set_with_other_norms_is_merged_verified_and_inspected(model, tmp_path, monkeypatch):
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
    assert verify(out) == Verified((), {}, ())
    for file in vision_models.side_files(model):
        assert (out / file.name).read_bytes() == file.read_bytes()
    tensors = Checkpoint.open(out).tensors
    assert f"b.{layer.removesuffix('weight')}input_ratio" in tensors
    beside = [name for name in tensors if language_name(name) is None]
    assert beside and not [name for name in tensors if name.startswith(("a.v", "b.v"))]
    report = inspect.inspect(out)
    linear = 1 if "linear_attention" in (model / "config.json").read_text() else 0
    assert report["sets"]["a"]["layers"] == 14 + linear and report["lm_head"] == {"bits": 32}

    lost = next(name for name in beside if not re.search(r"\.\d+\.", name))
    cut = next(name for name in beside if name.endswith("norm1.weight"))
    for folder in folders.values():
        edit(folder, lambda tensors, _: [tensors.pop(lost), tensors.update({cut: torch.zeros(3)})])
    merge(folders, out, overwrite=True)
    found, described = verify(out), "the model that config.json describes"
    said = (f"{lost}: missing, {described} has it", f"{cut}: is [3], and [64] in {described}")
    assert len(found.findings) == 2 and not found.notes
    for line, expected in zip(found.findings, said, strict=True):
        assert ".".join(line.split(".")[-5:]).endswith(".".join(expected.split(".")[-4:]))
    whole = json.loads((out / "config.json").read_text())
    check_hostile_configs(out, whole, found.findings)
    write_config(out, whole)
    monkeypatch.setattr(towers, "find_spec", lambda name: None)
    found = verify(out)
    assert not found.findings and "a transformers that has the model" in found.notes[0]


def check_hostile_configs(out, whole, findings):
    vision, text = whole["vision_config"], whole["text_config"]
    depth = next(key for key in ("depth", "num_hidden_layers") if key in vision)
    for change, expected in (
        ({depth: 10**9}, f"vision_config.{depth}: 1000000000 is more than 1024"),
        ({"patch_size": [14, 1 << 25]}, "vision_config.patch_size: 33554432 is more than 16777216"),
        ({"deepstack_visual_indexes": [0] * 1025}, "has a length of 1025, more than 1024"),
        ({"model_type": "whisper"}, "vision_config.model_type: 'whisper' is not supported in"),
        ({"hidden_size": 1 << 20}, "numbers beside the language model, of which only"),
        ({"hidden_size": "many"}, "transformers cannot build the model that it describes"),
    ):
        write_config(out, whole | {"vision_config": vision | change})
        (line,) = verify(out).findings
        assert expected in line, line
    for change, expected in (
        ({"model_type": "whisper"}, f"model_type: 'whisper' is not {whole['model_type']}, that of"),
        ({"vision_config": "clip"}, "vision_config: 'clip' is not an object"),
    ):
        write_config(out, whole | change)
        (line,) = verify(out).findings
        assert line.startswith(f"config.json: {expected}"), line

    unread = {"vision_config": vision | UNREAD, "text_config": text | UNREAD}
    write_config(out, whole | unread)
    assert tuple(towers.findings(Checkpoint.open(out))) == findings

    many = {"num_hidden_layers": 20_000_000, "layer_types": None, "head_dim": 1 << 28}
    both = {"vision_config": vision | {depth: "many"}, "text_config": text | many}
    write_config(out, whole | both)
    found = verify(out).findings
    assert found and all("num_hidden_layers: 20000000 is not a whole" in line for line in found)


@pytest.mark.parametrize(
    "tower",
    [
        *({"model_type": kind} for kind in VISION_LANGUAGE[LLAVA].tower_types),
        {"model_type": "siglip_vision_model", "vision_use_head": False},
    ],
)
def test_every_tower_of_llava_is_known(tower, tmp_path):
    parts = vision_models.MODELS["Llava"]["config"]
    parts |= {"vision_config": parts["vision_config"] | tower}
    config = transformers.LlavaConfig(**parts)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    assert [*towers.findings(Checkpoint.open(tmp_path))] == []
    lost = next(name for name in Checkpoint.open(tmp_path).tensors if "vision_tower" in name)
    edit(tmp_path, lambda tensors, _: tensors.pop(lost))
    (line,) = towers.findings(Checkpoint.open(tmp_path))
    assert line.endswith(": missing, the model that config.json describes has it")


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
        ({"rms_norm_eps": None, "hidden_size": None}, "text_config: missing; mend it"),
        ({"text_config": "qwen2"}, "text_config: 'qwen2' is not an object; mend it"),
        (
            {"architectures": [LLAVA], "model_type": "llava"},
            "text_config: missing; mend it",
        ),
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
    pattern = re.compile(stored_pattern("language_model.model.layers.1.mlp"))
    for prefix in ("model.language_model.", "language_model.model.", "model."):
        assert pattern.fullmatch(f"{prefix}layers.1.mlp")
    assert not pattern.fullmatch("model.layers.11mlp")
    assert stored_pattern("model.layers.1.mlp") == r"model\.layers\.1\.mlp"


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    write_config(folder, config)


def write_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def qwen(tiny_model, tmp_path):
    return vision_models.write("Qwen2_5_VL", tmp_path / "model", tiny_model)


@pytest.fixture
def text(heldout_text, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(heldout_text.read_text()[:2000])
    return file


def test_an_older_file_with_a_tied_head_is_quantized(qwen, text, tmp_path):
    def flatten(config):
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        config |= text | {"model_type": "qwen2_5_vl", "tie_word_embeddings": True}
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
        config |= {"num_labels": "many"}  # is not read

    change_config(qwen, flatten)
    edit(qwen, lambda tensors, _: tensors.pop("lm_head.weight"))
    options = {"samples": 4, "seqlen": 32, "gptq": False, "clip": False}
    quantize(qwen, tmp_path / "out", text, QuantizeOptions.parse(options, "options"))
    assert verify(tmp_path / "out").findings == ()
    written = Checkpoint.open(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    for row in report["layers"]:
        assert f"{row['set']}.{row['layer']}.weight" in written.tensors or row["set"] == "w4a8"
    # The routing of the report has names that the output has.
    Section.parse(written.config[SECTION] | {"routing": report["routing"]})
    globs = [rule["match"] for rule in report["routing"]["layers"]]
    assert all(glob.startswith("model.language_model.layers.") for glob in globs)
    assert written.config["tie_word_embeddings"] is False and "lm_head.weight" in written.tensors
    before = Checkpoint.open(qwen)
    rotation = hadamard(128)
    for name, info in before.tensors.items():
        if language_name(name) is None:
            stored, source = written.get(name), before.get(name)
            assert stored.dtype == source.dtype and info.shape == written.tensors[name].shape
            if "merger.mlp.2" in name:
                source = (rotation.T @ source.double()).to(source.dtype)
            assert torch.equal(stored, source), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl' .* and the language models in Qwen2_5"),
        *(
            ({"architectures": names}, "architectures: .* cannot be quantized; .*'Qwen2_5_VLForCon")
            for names in (["Qwen2VLForConditionalGeneration"], None)
        ),
    ],
)
def test_another_model_of_images_is_refused_by_name(qwen, text, tmp_path, change, message):
    def become(config):
        config |= change
        if "model_type" in change:
            config["architectures"] = ["Qwen2VLForConditionalGeneration"]

    change_config(qwen, become)
    with pytest.raises(UserError, match=message):
        quantize(qwen, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("visual.merger.mlp.2.weight"), "mlp.2 has no weight"),
        (
            lambda tensors: tensors.update({"visual.merger.mlp.2.bias": torch.zeros(64)}),
            r"mlp\.2\.bias: is \[64\], but the stream .* 128 channels",
        ),
        (
            lambda tensors: tensors["visual.patch_embed.proj.weight"].fill_(torch.nan),
            r"patch_embed\.proj\.weight: holds NaN",
        ),
        (
            lambda tensors: tensors.update(
                {"language_model.model.norm.weight": tensors["model.norm.weight"]}
            ),
            "is in the checkpoint twice",
        ),
        (
            lambda tensors: tensors.pop("visual.blocks.1.attn.qkv.weight"),
            r"visual\.blocks\.1\.attn\.qkv\.weight: missing, the model that config\.json describes",
        ),
        (
            lambda tensors: tensors.update({"visual.more.weight": torch.zeros(2)}),
            r"visual\.more\.weight: is not in the model that config\.json describes",
        ),
        (
            lambda tensors: tensors.update({"visual.blocks.0.norm1.weight": torch.zeros(2)}),
            r"blocks\.0\.norm1\.weight: is \[2\], and \[64\] in the model that config",
        ),
    ],
)
def test_a_broken_tower_is_refused_before_work_begins(qwen, text, tmp_path, change, message):
    edit(qwen, lambda tensors, _: change(tensors))
    options = QuantizeOptions.parse({"samples": 4, "seqlen": 32}, "options")
    with pytest.raises(UserError, match=message):
        quantize(qwen, tmp_path / "out", text, options)
    assert not (tmp_path / "out").exists()


OUTER = ("model.language_model.", "language_model.model.", "model.")


def put_below(tensors, outer):
    for name in list(tensors):
        if name.startswith("model."):
            tensors[outer + name.removeprefix("model.")] = tensors.pop(name)


@pytest.mark.parametrize("outer", OUTER)
def test_a_lost_tensor_has_its_name_of_the_file_in_findings(qwen, outer):
    lost = [f"{outer}layers.0.self_attn.q_proj", f"{outer}norm", f"{outer}layers.1"]

    def damage(tensors, config):
        put_below(tensors, outer)
        for name in list(tensors):
            if name.startswith(tuple(lost)):
                del tensors[name]

    edit(qwen, damage)
    checkpoint = Checkpoint.open(qwen)
    found = "\n".join(complete.findings(StoredSet("", checkpoint, {}, checkpoint.tensors)))
    assert f"{lost[0]}: missing; " in found and f"{lost[1]}.weight: missing; " in found
    assert f"{lost[2]}: has no tensors at all; " in found


@pytest.mark.parametrize("outer", OUTER[:2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors[name].fill_(torch.nan), "model.safetensors: {}: holds NaN"),
        (lambda tensors, name: tensors.update({name: torch.zeros(2, 2)}), ": {}: is [2, 2], but"),
        (lambda tensors, name: tensors.update({f"{name}_x": torch.zeros(2)}), ": {}_x: Qwen2For"),
        (lambda tensors, name: tensors.pop(name), "model: {} is missing"),
    ],
)
def test_a_tensor_has_its_name_of_the_file_in_errors(qwen, text, tmp_path, outer, change, message):
    def damage(tensors, config):
        put_below(tensors, outer)
        change(tensors, f"{outer}layers.0.self_attn.q_proj.weight")

    edit(qwen, damage)
    named = re.escape(message.format(f"{outer}layers.0.self_attn.q_proj.weight"))
    options = QuantizeOptions.parse({"samples": 4, "seqlen": 32}, "options")
    with pytest.raises(UserError, match=named):
        quantize(qwen, tmp_path / "out", text, options)


def test_a_model_without_its_processor_is_refused(qwen, text, tmp_path):
    lost = "preprocessor_config.json: missing, .*; copy the files of the original model's processor"
    files = {name: vision_models.finish(w8a8(qwen, tmp_path / name, TOWERS), qwen) for name in "ab"}
    whole = tmp_path / "whole"
    (files["a"] / "preprocessor_config.json").unlink()
    merge(files, whole)  # b has it
    content = json.loads((whole / "preprocessor_config.json").read_text())
    (whole / "preprocessor_config.json").unlink()
    (finding,) = verify(whole).findings
    assert re.match(lost, finding)
    (whole / "processor_config.json").write_text(json.dumps({"patch_size": 14}))
    assert verify(whole).findings == (finding,)
    (whole / "processor_config.json").write_text(json.dumps({"image_processor": content}))
    assert verify(whole).findings == ()

    (files["b"] / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=lost):
        merge(files, tmp_path / "out")
    (qwen / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=lost):
        quantize(qwen, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_commands_for_texts_refuse_it_by_name(qwen, text):
    with pytest.raises(UserError, match=r"Qwen2_5_VL.*calibrate-kv takes models of text alone"):
        calibrate_kv.open_source(qwen)
    with pytest.raises(UserError, match=r"Qwen2_5_VL.*evaluate compares models of text alone"):
        evaluate.check(qwen, qwen, text, 64, (16,))

"""Which files of a folder are read as weights, and which are copied beside them. No torch."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA
from safetensors.numpy import save_file

from vllm_qoq.checkpoint.folder import Checkpoint, read_config, side_files, weights_entry
from vllm_qoq.errors import FormatError

TENSORS = {"x.weight": np.ones((2, 2), np.float32)}
INDEX = "model.safetensors.index.json"


def write(folder, *names):
    """A folder with these files; those with weights hold a tensor."""
    folder.mkdir(exist_ok=True)
    for name in ("config.json", *names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(TENSORS, path)
        elif name.endswith(INDEX):
            path.write_text(json.dumps({"weight_map": {"x.weight": "a.safetensors"}}))
        else:
            path.write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("names", "file"),
    [
        (["model.safetensors"], "model.safetensors"),
        (["model.safetensors", "weights.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["model.safetensors", "consolidated.safetensors"], "model.safetensors"),
        (["model.safetensors", "adapter_model.safetensors"], "model.safetensors"),
        ([INDEX, "a.safetensors", "model.safetensors"], "a.safetensors"),
        ([INDEX, "a.safetensors", "consolidated.safetensors", "b.safetensors"], "a.safetensors"),
        (["gptq_model-4bit-128g.safetensors", "pytorch_model.bin"], None),
        (["model-00001-of-00001.safetensors"], None),
    ],
)
def test_one_choice_of_weights(tmp_path, names, file):
    checkpoint = Checkpoint.open(write(tmp_path / "model", *names))
    assert {info.file for info in checkpoint.tensors.values()} == {file or names[0]}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model-00001-of-00002.safetensors"], f"{INDEX}, which lists them, is missing"),
        (["a.safetensors", "b.safetensors"], f"{INDEX}, which lists them, is missing"),
        (["consolidated.safetensors"], "give the folder with model.safetensors"),
        (["adapter_model.safetensors"], "give the folder with model.safetensors"),
        (["pytorch_model.bin"], "pickle files can run code"),
        ([], "has no .safetensors file"),
    ],
)
def test_no_choice_of_weights_is_refused(tmp_path, names, message):
    folder = write(tmp_path / "model", *names)
    with pytest.raises(FormatError, match=message):
        weights_entry(folder)


def test_names_that_no_model_has_are_refused(tmp_path):
    folder = write(tmp_path / "model")
    name = f"model.layers.{'9' * 5000}.mlp.up_proj.weight"
    save_file({name: TENSORS["x.weight"]}, folder / "model.safetensors")
    with pytest.raises(FormatError, match="a name of 5032 characters") as error:
        Checkpoint.open(folder)
    assert len(str(error.value)) < 300


def test_side_files_are_all_that_belongs_to_a_model_but_weights_and_code(tmp_path):
    kept = [
        *("LICENSE", "additional_chat_templates/tool_use.jinja", "chat_template.jinja"),
        *("generation_config.json", "tokenizer.json", "tokenizer.model"),
    ]
    others = [
        *("model.safetensors", "README.md", ".gitattributes", ".cache/x", "modeling_x.py"),
        *("pytorch_model.bin", "original/params.json", "original/consolidated.00.pth"),
        *("onnx/config.json", "onnx/model.onnx", "adapter_config.json", "params.json"),
        *("checkpoint-5/trainer_state.json", "checkpoint-5/deep/optimizer.pt", "training_args.bin"),
    ]
    folder = write(tmp_path / "model", *kept, *others)
    os.mkfifo(folder / "pipe")
    assert list(map(str, side_files(folder))) == kept


@pytest.mark.parametrize("has_link_as_folder", [False, True])
def test_a_snapshot_in_the_hugging_face_cache_is_a_model(tmp_path, has_link_as_folder):
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123"
    names = ("model.safetensors", "tokenizer.json", "additional_chat_templates/a.jinja")
    write(tmp_path / "real", *names)
    (cache / "blobs").mkdir(parents=True)
    for number, name in enumerate(("config.json", *names)):
        shutil.move(tmp_path / "real" / name, cache / "blobs" / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (2 + name.count("/"))
        (snapshot / name).symlink_to(f"{up}blobs/{number}")
    folder = snapshot
    if has_link_as_folder:
        folder = tmp_path / "link"
        folder.symlink_to(snapshot)
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_links()
    assert list(map(str, side_files(folder))) == sorted(names[1:])


@pytest.mark.parametrize("name", ["tokenizer.json", "extra/notes.txt", "photos"])
@pytest.mark.parametrize("target", ["../secret", "../folder", "/nowhere", "circle"])
def test_a_link_that_leaves_the_folder_is_not_copied(tmp_path, name, target):
    (tmp_path / "secret").write_text("key")
    (tmp_path / "folder").mkdir()
    folder = write(tmp_path / "model", "model.safetensors")
    (folder / name).parent.mkdir(exist_ok=True)
    there = (folder / name).name if target == "circle" else tmp_path / "model" / target
    (folder / name).symlink_to(there)
    with pytest.raises(FormatError, match=rf"{name}: is a symbolic link to .*; "):
        side_files(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_nor_are_config_and_weights_behind_one(tmp_path, name):
    folder = write(tmp_path / "model", "model.safetensors")
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    checkpoint = Checkpoint.open(folder)  # to look at it is no harm
    with pytest.raises(FormatError, match=f"{name}: is a symbolic link to"):
        checkpoint.check_links()


def test_a_null_quantization_config_is_none(tmp_path):
    folder = write(tmp_path / "model", "model.safetensors")
    (folder / "config.json").write_text('{"quantization_config": null}')
    assert read_config(folder) == {} and Checkpoint.open(folder).section is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("org/L@v1", "run `hf download org/L --revision v1 --local-dir L` and give L"),
        ("org/Llama-3.1-8B", "run `hf download org/Llama-3.1-8B --local-dir Llama-3.1-8B` and"),
        ("/typo/model", "not a folder, nothing is there; give"),
        (str(DATA / "heldout.txt"), "not a folder; give the folder that has config.json"),
    ],
)
def test_what_is_no_folder_is_refused_with_the_way_to_one(path, message):
    with pytest.raises(FormatError, match=message.replace(".", r"\.")):
        read_config(Path(path))

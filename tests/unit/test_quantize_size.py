"""What a quantization needs of disk and memory, and where its work folder may be."""

import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file, save_file

from vllm_qoq.quantizer import QuantizeError, gptq, job, size
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.plan import Job
from vllm_qoq.quantizer.sets import SetKind

KINDS = [
    SetKind("w8a8", 128),
    SetKind("w4a8", 128),
    SetKind("w4a8", -1),
    SetKind("w4a16", 128),
    SetKind("w4a16", -1),
    SetKind("w8a8", 128, "w4a8"),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bytes_of_a_layer_are_those_of_its_tensors(kind, dtype):
    weight, base = torch.randn(24, 256), None
    if kind.base is not None:
        base = SetKind("w4a8", 128).grid(weight, dtype, clip=False)
        gptq.round_to_nearest(weight, base)
    grid = kind.grid(weight, dtype, False, base)
    gptq.round_to_nearest(weight, grid)
    stored = sum(tensor.nbytes for tensor in grid.tensors(dtype).values())
    assert size.layer_bytes(kind, 24, 256, dtype.itemsize) == stored


@pytest.fixture
def prepare(tiny_model, tmp_path):
    def run(work_dir=None, out=None, model=tiny_model, **options):
        wanted = QuantizeOptions(**{"samples": 2, "seqlen": 64, **options})
        out = out or tmp_path / "out"
        work = work_dir or tmp_path / "work"
        return job.prepare(Job(model, out, DATA / "calibration.txt", work), wanted)

    return run


def test_output_and_work_folder_have_to_fit_together(prepare, monkeypatch):
    needed = prepare().sizes
    usage = namedtuple("usage", "total used free")
    free = [0]
    monkeypatch.setattr(size.shutil, "disk_usage", lambda path: usage(0, 0, free[0]))
    free[0] = needed.output + needed.work
    prepare()
    free[0] = max(needed.output, needed.work) + 1000  # each of them alone would fit
    with pytest.raises(QuantizeError, match=r"out \(.*\) and .*work \(.*\) need .* on one disk"):
        prepare()


def test_on_two_disks_each_needs_its_part(monkeypatch, tmp_path):
    device, stat = {}, os.stat

    def other_device(path, *args, **kwargs):
        found = list(stat(path, *args, **kwargs))
        found[2] = device.get(path, found[2])
        return os.stat_result(found)

    free = {tmp_path / "a": 100, tmp_path / "b": 50}
    for number, folder in enumerate(free, 1):
        folder.mkdir()
        device[folder] = number
    monkeypatch.setattr(size.os, "stat", other_device)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(size.shutil, "disk_usage", lambda path: usage(0, 0, free[path]))
    size.check_disks([(tmp_path / "a" / "out", 90), (tmp_path / "b" / "work", 50)])
    with pytest.raises(QuantizeError, match=r"b/work \(51 B\) need 51 B.* 50 B are free"):
        size.check_disks([(tmp_path / "a" / "out", 90), (tmp_path / "b" / "work", 51)])


def test_pieces_that_are_there_already_are_not_counted_again(prepare, tmp_path, monkeypatch):
    needed = prepare().sizes
    with job.WorkDir.open(tmp_path / "work", {}, "auto") as work:
        work.save("block-0000", {"x": torch.zeros(1000)}, [])
    usage = namedtuple("usage", "total used free")
    free = needed.output + needed.work - 3000
    monkeypatch.setattr(size.shutil, "disk_usage", lambda path: usage(0, 0, free))
    with pytest.raises(QuantizeError, match="was None"):  # past the disks, to the other run
        prepare()


@pytest.mark.parametrize("place", ["same", "inside", "around", "linked"])
@pytest.mark.parametrize("of", ["out", "model"])
def test_a_work_folder_in_the_output_or_the_model_is_refused(
    prepare, tiny_model, tmp_path, place, of
):
    model = tmp_path / "models" / "model"
    model.parent.mkdir()
    model.symlink_to(tiny_model)
    folder = {"out": tmp_path / "outs" / "out", "model": model}[of]
    (tmp_path / "outs").mkdir()
    (tmp_path / "link").symlink_to(folder)
    work = {
        "same": folder,
        "inside": folder / "work",
        "around": folder.parent if of == "out" else tiny_model.parent,
        "linked": tmp_path / "link",
    }[place]
    with pytest.raises(QuantizeError, match=r"--work-dir"):
        prepare(work, tmp_path / "outs" / "out", model)


def test_sizes_are_those_of_the_model_as_it_is_loaded(prepare, tiny_model, tmp_path):
    """In the dtype of the embedding where config.json has none, without RoPE's constants."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight"):
        tensors[name] = tensors[name].float()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    mixed, plain = prepare(model=model).sizes, prepare().sizes
    assert (mixed.output, mixed.work) == (plain.output, plain.work)


def test_memory_has_its_parts(prepare):
    few, many = prepare(samples=2).sizes, prepare(samples=200).sizes
    assert many.memory["calibration"] == 100 * few.memory["calibration"]
    too_many = prepare(samples=100000)  # the text has fewer pieces of 64 tokens
    pieces = len(too_many.samples)
    assert pieces < 2000
    assert too_many.sizes.memory["calibration"] == pieces * few.memory["calibration"] // 2
    assert set(few.memory) > few.gpu and few.memory["weights"] == 4_196_864
    assert many.output == few.output


def test_a_size_that_cannot_be_rotated_is_refused_before_work(prepare, monkeypatch):
    real = job.check_job

    def other_shape(*arguments):
        plan = real(*arguments)
        return replace(plan, dimensions=replace(plan.dimensions, hidden=34))

    monkeypatch.setattr(job, "check_job", other_shape)
    with pytest.raises(QuantizeError, match=r"size 34 is known; quantize with --no-rotate"):
        prepare()
    prepare(rotate=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.json": "the tokenizer"}, "the tokenizer was"),
        ({"tokenizer_config.json": "the tokenizer"}, "the tokenizer was"),
    ],
)
def test_another_tokenizer_is_another_run(prepare, tiny_model, tmp_path, change, message):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    begin(prepare, model, tmp_path)
    for name in change:
        (model / name).write_text((model / name).read_text() + "\n")
    with pytest.raises(QuantizeError, match=message + ".*--resume never"):
        prepare(model=model)


def test_a_copy_of_the_model_is_the_same_run_and_other_weights_are_not(
    prepare, tiny_model, tmp_path
):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    begin(prepare, model, tmp_path)
    (file,) = model.glob("*.safetensors")
    os.utime(file, (1, 1))
    prepare(model=model)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        tensors = load_file(file)
        tensors[name] = tensors[name] * 1.5
        before = file.read_bytes()
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(QuantizeError, match=r"the model's weights was .*--resume never"):
            prepare(model=model)
        file.write_bytes(before)


@pytest.mark.parametrize("package", ["vllm-qoq", "torch", "transformers", "compressed-tensors"])
def test_another_version_is_another_run(prepare, tiny_model, tmp_path, monkeypatch, package):
    begin(prepare, tiny_model, tmp_path)
    real = job.version
    monkeypatch.setattr(job, "version", lambda name: "9.9" if name == package else real(name))
    if package == "vllm-qoq":
        monkeypatch.setattr(job, "__version__", "9.9")
    with pytest.raises(QuantizeError, match=f"version of {package} was .* and is '9.9' now"):
        prepare()


def begin(prepare, model, folder):
    """A finished piece of the run that `prepare` checks."""
    plan = prepare(model=model)
    wanted = Job(model, folder / "out", DATA / "calibration.txt", folder / "work")
    with job.WorkDir.open(folder / "work", job.fingerprint(wanted, plan), "auto") as work:
        work.save("shared", {"x": torch.zeros(1)}, [])
    prepare(model=model)  # the same goes on

"""`vllm-qoq calibrate-kv`: means of K for models whose weights stay, measured, written, served."""

import json
import shutil
import sys

import pytest
import torch
import warm_process
from biased_models import write_qwen2
from conftest import DATA
from lora_adapters import write_transforms

import vllm_qoq
from vllm_qoq.bench.evaluate.engine import Engine
from vllm_qoq.bench.evaluate.float_model import FloatModel, load_tokenizer
from vllm_qoq.bench.evaluate.scores import combine, score_window
from vllm_qoq.bench.evaluate.windows import cut
from vllm_qoq.checkpoint import inspect, transforms, verify
from vllm_qoq.checkpoint.dequantize import dequantize, row_chunks
from vllm_qoq.checkpoint.float_view import FloatView
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.errors import UserError
from vllm_qoq.models.table import LayerNames
from vllm_qoq.quantizer import changes, rotate

TEXT = DATA / "calibration.txt"
FEW = {"samples": 8, "seqlen": 128}
LENGTH, CHUNK = 128, 16


def means(folder):
    found = Checkpoint.open(folder)
    return {name: found.get(name) for name in found.tensors if name.endswith("k_mean")}


@pytest.fixture(scope="module")
def biased(tiny_model, tmp_path_factory):
    """A Qwen2 in bf16 whose K has a large bias, without and with means of K."""
    folder = tmp_path_factory.mktemp("calibrate-kv")
    plain = write_qwen2(tiny_model, folder / "plain", 80.0)
    vllm_qoq.calibrate_kv(plain, folder / "calibrated", TEXT, **FEW)
    return plain, folder / "calibrated"


@pytest.fixture(scope="module")
def divergence(biased, heldout_text):
    """What a served folder loses: the mean divergence of its next tokens from the model's."""
    tokens = load_tokenizer(biased[0])(heldout_text.read_text()[:10_000]).input_ids
    windows = cut(tokens, bos=None, length=LENGTH, most=3)
    model = FloatModel(biased[0])
    expected = [model.logits(window, windows.first) for window in windows.tokens]
    engines = []  # vLLM cannot build one after another was collected

    def measure(folder, kv_bits):
        engines.append(Engine(folder, (), length=LENGTH, kv_bits=kv_bits, chunk=CHUNK))
        found = [engines[-1].logits(window, windows.first, None) for window in windows.tokens]
        pairs = enumerate(zip(expected, found, strict=True))
        return combine([score_window(*both, windows.targets(i)) for i, both in pairs])

    return lambda folder, kv_bits: measure(folder, kv_bits).divergence.value


def test_four_bits_lose_the_sense_of_a_biased_model_without_its_means_and_little_with_them(
    biased, divergence
):
    plain, calibrated = (divergence(folder, 4) for folder in biased)
    assert plain > 1 and calibrated < 0.05
    # The section asks for 4 bits, and 16 can be measured all the same.
    assert divergence(biased[1], 16) < calibrated / 4


def test_the_copy_is_sound_says_its_cache_and_has_the_weights_as_they_were(biased):
    plain, calibrated = biased
    assert vllm_qoq.verify(calibrated).findings == ()
    report = inspect.inspect(calibrated)
    assert report["kv_cache"] == {"bits": 4, "hadamard": True, "k_mean": True}
    assert report["k_means"] == 2
    before, after = Checkpoint.open(plain), Checkpoint.open(calibrated)
    assert after.tensors.keys() - before.tensors.keys() == means(calibrated).keys()
    for name in before.tensors:
        assert torch.equal(before.get(name), after.get(name)), name
    assert after.config.items() >= before.config.items()
    assert not list(calibrated.parent.glob(".*"))


def test_again_in_its_place_with_other_bits_and_no_other_folder_is_replaced(biased, tmp_path):
    _, calibrated = biased
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(calibrated, first)
    found = vllm_qoq.calibrate_kv(first, second, TEXT, kv_bits=8, kv_hadamard=False, **FEW)
    assert found.kv_cache.to_json() == {"bits": 8, "k_mean": True}
    for name, mean in means(second).items():
        assert torch.equal(mean, means(calibrated)[name])  # as before, of the same keys
    again = vllm_qoq.calibrate_kv(second, first, TEXT, dry_run=True, overwrite=True, **FEW)
    assert again.kv_cache == found.kv_cache  # what the checkpoint says
    config = json.loads((first / "config.json").read_text())
    cache = config["quantization_config"]["kv_cache"]
    cache |= {"bits": 16, "layers": [{"match": "model.layers.1.*", "bits": 8}]}
    (first / "config.json").write_text(json.dumps(config))
    again = vllm_qoq.calibrate_kv(first, tmp_path / "third", TEXT, dry_run=True, **FEW)
    assert again.kv_cache.to_json() == cache
    del config["quantization_config"]
    (first / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no checkpoint of ours.*deletes only what is ours"):
        vllm_qoq.calibrate_kv(second, first, TEXT, overwrite=True, **FEW)


@pytest.mark.parametrize("name", ["nested_dir", "w4a8_dir", "merged_dir"])
def test_sets_of_any_tool_get_the_means_of_the_model_that_they_compute(
    name, tiny_model, tmp_path, request
):
    folder = request.getfixturevalue(name)
    if name == "w4a8_dir":  # as `quantize` makes it, with how it transformed the weights
        folder = shutil.copytree(folder, tmp_path / "in")
        tensors = changes.stored(LayerNames(), {}, {}, rotate.hadamard(64))
        stored = write_transforms(folder, tensors).read_bytes()
    found = vllm_qoq.calibrate_kv(folder, tmp_path / "out", TEXT, **FEW)
    assert found.kv_cache.k_mean and vllm_qoq.verify(tmp_path / "out").findings == ()
    if name == "w4a8_dir":
        assert (tmp_path / "out" / transforms.FILE).read_bytes() == stored
    before, after = Checkpoint.open(folder), Checkpoint.open(tmp_path / "out")
    assert after.section == before.section.model_copy(update={"kv_cache": found.kv_cache})
    vllm_qoq.calibrate_kv(tiny_model, tmp_path / "float", TEXT, **FEW)
    expected = means(tmp_path / "float")
    for tensor, mean in means(tmp_path / "out").items():
        # The sets round the weights, of which 4 bits are the coarsest.
        assert (mean - expected[tensor]).norm() < 0.05 * expected[tensor].norm(), tensor


def test_the_inputs_ratio_of_a_prompts_set_is_in_its_weights(merged_dir):
    _, section, sets = verify.open_merged(merged_dir)
    (other,) = (one for one in sets if one.name != section.routing.prefill)
    layer = next(layer for layer in sorted(other.quantized) if "input_ratio" in other.layers[layer])
    ratio = other.get(f"{layer}.input_ratio")
    folded = FloatView(other).get(f"{layer}.weight")
    (rows, *_) = row_chunks(other.describe(layer))
    plain = dequantize(other, layer, rows)
    torch.testing.assert_close(folded[slice(*rows)], (plain * ratio).bfloat16())


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("w8a8_dir", {}, r"'compressed-tensors' is that of another tool; .*`vllm-qoq merge NAME="),
        ("tiny_model", {"seqlen": 10**6}, r"fewer than one piece of 1000000; give a longer text"),
        ("tiny_model", {"output": DATA / "tiny-llama" / "x"}, "overlaps the input"),
        ("tiny_model", {"text": DATA / "nothing.txt"}, "nothing.txt"),
        ("tiny_model", {"samples": 0}, "samples"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    model, change, message, tmp_path, request
):
    arguments = {"output": tmp_path / "out", "text": TEXT, **FEW, **change}
    with pytest.raises(UserError, match=message):
        vllm_qoq.calibrate_kv(request.getfixturevalue(model), **arguments)
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_is_refused_with_the_folder_to_give(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"model\.gguf: is GGUF.*OUT\.float"):
        vllm_qoq.calibrate_kv(tmp_path / "model.gguf", tmp_path / "out", TEXT)


def test_the_command_says_what_it_wrote(tiny_model, tmp_path):
    out = tmp_path / "out"
    planned = vllm_qoq.calibrate_kv(tiny_model, out, TEXT, samples=2, seqlen=64, dry_run=True)
    assert planned.samples == 2 and not out.exists()
    command = [sys.executable, "-m", "vllm_qoq.cli", "calibrate-kv", tiny_model, "-o", out, "-q"]
    command += ["--text", TEXT, "--samples", 2, "--seqlen", 64]
    done = warm_process.run(list(map(str, command)), timeout=120)
    assert done.returncode == 0, done.stderr
    wrote = f"wrote {out}: 4.2 MB, means of K of 2 layers from 2 pieces of 64"
    assert done.stdout.startswith(wrote)
    assert "mean of K, block" not in done.stderr and "written" not in done.stderr
    assert planned.total_bytes == Checkpoint.open(out).total_bytes

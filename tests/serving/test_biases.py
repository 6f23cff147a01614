"""Models with biases, from `quantize`, `merge` and `import` to vLLM, on one and on two ranks."""

import json
import shutil
import sys

import pytest
import torch
from biased_models import write_llama, write_qwen2
from conftest import DATA, merge
from cpu_kernels import needs_wna16
from engine_process import run_engines
from engines import engine
from qoq_checkpoints import write_plain
from qserve_served import quantized as in_qserve_layout
from safetensors.torch import load_file, save_file

from vllm_qoq.bench.perplexity import text_perplexity
from vllm_qoq.checkpoint import verify
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.cli import main as cli
from vllm_qoq.progress import Progress
from vllm_qoq.quantizer import job
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.plan import Job
from vllm_qoq.quantizer.sets import SetKind

TEXT = DATA / "calibration.txt"
SEQLEN = 256  # of calibration, and of all perplexities
BIASED = [f"self_attn.{name}_proj" for name in "qkvo"]
BIASED += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "heldout.txt"
    text.write_text((DATA / "heldout.txt").read_text()[:6000])
    return text


@pytest.fixture(scope="module")
def llama(tiny_model, tmp_path_factory):
    return write_llama(tiny_model, tmp_path_factory.mktemp("llama") / "float")


@pytest.fixture(scope="module")
def quantized(llama, short, tmp_path_factory):
    """Three sets of the Llama with biases, one nested, and the report."""
    folder = tmp_path_factory.mktemp("biases")
    wanted = Job(llama, folder / "out", TEXT, folder / "work", short)
    quick = {"samples": 4, "seqlen": SEQLEN, "clip": False}
    options = QuantizeOptions(sets=("w8a8", "w4a16", "w4a8"), nested=True, **quick)
    return folder / "out", job.run(wanted, options)


def sound(folder):
    return not verify.structure(folder) and not verify.contents(folder, Progress(quiet=True))


def test_every_set_has_every_bias(quantized):
    out, report = quantized
    assert sound(out)
    tensors = Checkpoint.open(out).tensors
    for name in report["after"]:
        for layer in (0, 1):
            assert all(f"{name}.model.layers.{layer}.{b}.bias" in tensors for b in BIASED)
    before = report["before"]["perplexity"]["kv16"]
    losses = {"w8a8": 1.03, "w4a16": 1.2, "w4a8": 1.2}
    for name, found in report["after"].items():
        assert found["perplexity"]["kv16"] < before * losses[name], name


@pytest.mark.parametrize("name", ["w8a8", pytest.param("w4a16", marks=needs_wna16), "w4a8"])
def test_vllm_adds_every_bias_of_every_set(quantized, short, name):
    """A bias that is lost or added twice changes the perplexity by 8 % and more."""
    out, report = quantized
    llm = engine(out, {"force_set": name}, dtype="float16")
    served = text_perplexity(llm, short.read_text(), SEQLEN)["perplexity"]
    assert served == pytest.approx(report["after"][name]["perplexity"]["kv16"], rel=0.01)


def test_two_ranks_add_a_bias_once(quantized, short, tmp_path):
    """o_proj and down_proj are cut along their inputs: one rank adds the bias."""
    out, report = quantized
    options = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 32 << 20, "dtype": "float16"}
    spec = {"checkpoint": str(out), "options": options, "text": short.read_text(), "max_tokens": 4}
    (split,) = run_engines(tmp_path, [spec], VLLM_CPU_OMP_THREADS_BIND="0|1")
    prompts_in = report["after"]["w8a8"]["perplexity"]["kv16"]
    assert split["perplexity"] == pytest.approx(prompts_in, rel=0.01)
    assert split["counts"]["decode w4a8"] == 3


@pytest.mark.parametrize("sets", [("w4a16",), ("w8a8", "w4a8")])
def test_qwen2_in_one_and_two_sets(tiny_model, tmp_path, sets):
    model = write_qwen2(tiny_model, tmp_path / "qwen2", 20.0)
    wanted = Job(model, tmp_path / "out", TEXT, tmp_path / "work")
    job.run(wanted, QuantizeOptions(sets=sets, samples=4, seqlen=64, gptq=False, clip=False))
    assert sound(tmp_path / "out")
    assert not (tmp_path / "work").exists()
    tensors = Checkpoint.open(tmp_path / "out").tensors
    stored = [name for name in tensors if name.endswith(".bias")]
    assert len(stored) == len(sets) * 2 * 3


def write_w8a8(model, out):
    """int8 per channel, by rounding."""
    shutil.copytree(model, out)
    tensors = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        tensors[name] = tensor
        if name.endswith("_proj.weight"):
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor / scale).round().to(torch.int8)
            tensors[name.replace("weight", "weight_scale")] = scale
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = SetKind("w8a8", 128).config()
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("nest", [False, True])
def test_merged_sets_keep_their_biases(llama, quantized, short, tmp_path, nest):
    float_one = quantized[1]["before"]["perplexity"]["kv16"]
    w8a8 = write_w8a8(llama, tmp_path / "w8a8")
    w4a8 = write_plain(llama, tmp_path / "w4a8")
    options = ("--nest",) if nest else ()
    out = merge(tmp_path / "out", f"w8a8={w8a8}", f"w4a8={w4a8}", *options)
    assert sound(out)
    found = text_perplexity(engine(out, {"force_set": "w8a8"}), short.read_text(), SEQLEN)[
        "perplexity"
    ]
    assert found == pytest.approx(float_one, rel=0.06)  # SmoothQuant is left out


def test_an_imported_model_keeps_its_biases(llama, tmp_path, monkeypatch):
    packed = {}
    for name, tensor in load_file(llama / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if not layer.endswith("_proj"):
            packed[name] = tensor
            continue
        leaves, _ = in_qserve_layout(tensor)
        packed |= {f"{layer}.{leaf}": value for leaf, value in leaves.items()}
    source = tmp_path / "qserve"
    shutil.copytree(llama, source)
    save_file(packed, source / "model.safetensors", metadata={"format": "pt"})
    command = ["vllm-qoq", "import", source, "-o", tmp_path / "out", "--base", llama, "-q"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    assert cli.main() == 0
    assert sound(tmp_path / "out")
    imported, given = Checkpoint.open(tmp_path / "out"), Checkpoint.open(llama)
    biases = {name: given.get(name) for name in given.tensors if name.endswith(".bias")}
    assert len(biases) == 14
    for name, bias in biases.items():
        assert torch.equal(imported.get(f"w4a8.{name}"), bias)

"""An int8 lm_head, shared by all sets: made, verified, loaded, split and served."""

import json
import re
import shutil
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import DATA
from cpu_kernels import needs_exact_int8
from engines import engine, generate
from plugin_units import qoq_config, tensor_parallel, vllm_config
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_qoq.bench import perplexity as served
from vllm_qoq.checkpoint import verify
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.errors import FormatError
from vllm_qoq.numerics.reference import quantize_per_token
from vllm_qoq.numerics.rotation import signs
from vllm_qoq.progress import Progress
from vllm_qoq.quantizer.job import run
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.plan import Job
from vllm_qoq.quantizer.rotate import hadamard
from vllm_qoq.serving.methods.draft_heads import original_head
from vllm_qoq.serving.methods.original_basis import OriginalBasis

VOCABULARY, HIDDEN = 200, 128
SECTION = {"lm_head": {"bits": 8}}


@pytest.fixture(scope="module")
def quantized(tiny_model, tmp_path_factory):
    """A W4A8 checkpoint with an int8 lm_head, a text, and the report."""
    folder = tmp_path_factory.mktemp("int8-head")
    text = folder / "heldout.txt"
    text.write_text((DATA / "heldout.txt").read_text()[:20_000])
    options = QuantizeOptions(sets=("w4a8",), samples=8, seqlen=256, lm_head_bits=8, kv_bits=16)
    job = Job(
        model=tiny_model,
        out=folder / "checkpoint",
        text=DATA / "calibration.txt",
        work_dir=folder / "work",
        eval_text=text,
        sanity_check=False,
        resume="never",
        overwrite=False,
        max_shard_bytes=1 << 30,
        quiet=True,
    )
    return job.out, text, run(job, options)


@needs_exact_int8
def test_it_is_whole_and_served_as_measured(quantized):
    out, text, report = quantized
    assert verify.structure(out) == [] and verify.contents(out, Progress(quiet=True)) == []
    tensors = Checkpoint.open(out).tensors
    weight, scale = tensors["lm_head.weight"], tensors["lm_head.weight_scale"]
    assert weight.dtype == "I8" and scale.shape == (weight.shape[0], 1)
    llm = engine(out, dtype="float16")
    found = served.text_perplexity(llm, text.read_text(), 256)["perplexity"]
    assert found == pytest.approx(report["after"]["w4a8"]["perplexity"]["kv16"], rel=0.003)


def test_it_is_loaded_anew(quantized):
    llm = engine(quantized[0], dtype="float16")
    before = generate(llm)
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    assert generate(llm) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.weight_scale"), "lm_head.weight_scale: .* missing"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].float()}), "expected I8"),
        (
            lambda t: t.update({"lm_head.weight_scale": t["lm_head.weight_scale"][:9].clone()}),
            "has 9 rows",
        ),
    ],
)
def test_verify_finds_what_is_wrong_with_it(quantized, tmp_path, change, message):
    folder = tmp_path / "changed"
    shutil.copytree(quantized[0], folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in set(index["weight_map"].values()):
        tensors |= load_file(folder / file)
        (folder / file).unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (finding,) = verify.structure(folder)
    assert re.search(message, finding)


def head(rank=0, size=1, tied=False):
    """An empty layer of one rank."""
    config = vllm_config()
    config.model_config = SimpleNamespace(
        hf_text_config=SimpleNamespace(tie_word_embeddings=tied), quantization="qoq"
    )
    place = "vllm.model_executor.layers.vocab_parallel_embedding.get_tensor_model_parallel_"
    with (
        tensor_parallel(rank, size, config),
        patch(f"{place}rank", lambda: rank),
        patch(f"{place}world_size", lambda: size),
    ):
        return ParallelLMHead(
            VOCABULARY, HIDDEN, torch.float16, quant_config=qoq_config(**SECTION), prefix="lm_head"
        )


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_every_rank_computes_its_part_of_the_vocabulary(rank, size):
    layer = head(rank, size)
    codes, scale, _ = quantize_per_token(torch.randn(VOCABULARY, HIDDEN))
    codes = codes // 4  # or processors without VNNI cut sums off
    layer.weight.weight_loader(layer.weight, codes)
    layer.weight_scale.weight_loader(layer.weight_scale, scale[:, None])
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, HIDDEN).half()
    logits = layer.quant_method.apply(layer, x)
    x_codes, x_scale, _ = quantize_per_token(x)
    expected = (x_codes * x_scale[:, None]) @ (codes * scale[:, None]).t()
    part = layer.shard_indices
    columns = slice(part.org_vocab_start_index, part.org_vocab_end_index)
    mine = logits[:, : part.num_org_elements].float()
    torch.testing.assert_close(mine, expected[:, columns], rtol=2e-2, atol=2e-2)


def test_a_head_that_drafts_for_the_original_model_reads_it_turned():
    layer, norm = head(), torch.rand(HIDDEN) + 0.5
    rotation = hadamard(HIDDEN).float().cpu()
    weight = torch.randn(VOCABULARY, HIDDEN)
    codes, scale, _ = quantize_per_token(weight * norm @ rotation)
    layer.weight.weight_loader(layer.weight, codes)
    layer.weight_scale.weight_loader(layer.weight_scale, scale[:, None])
    layer.quant_method.process_weights_after_loading(layer)
    basis = OriginalBasis(HIDDEN, torch.float16, is_tracked=True)
    basis.load_weights([("rotation", signs(rotation)), ("norm", norm)])
    basis.quant_method.process_weights_after_loading(basis)
    turned, x = original_head(layer, basis), torch.randn(5, HIDDEN)
    logits = turned.quant_method.apply(turned, x.half())[:, :VOCABULARY].float()
    assert (logits - x @ weight.t()).norm() < 0.05 * (x @ weight.t()).norm()


def test_a_tensor_that_did_not_arrive_is_named():
    layer = head()
    layer.weight.weight_loader(layer.weight, torch.ones(VOCABULARY, HIDDEN, dtype=torch.int8))
    with pytest.raises(FormatError, match=r"did not fill lm_head\.weight_scale"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_scale_that_is_not_finite_and_positive_is_named(scale):
    layer = head()
    layer.weight.weight_loader(layer.weight, torch.ones(VOCABULARY, HIDDEN, dtype=torch.int8))
    scales = torch.ones(VOCABULARY, 1)
    scales[7] = scale
    layer.weight_scale.weight_loader(layer.weight_scale, scales)
    with pytest.raises(FormatError, match=r"lm_head\.weight_scale holds a scale that is not"):
        layer.quant_method.process_weights_after_loading(layer)


def test_the_embedding_as_lm_head_is_refused():
    with pytest.raises(FormatError, match="tie_word_embeddings"):
        head(tied=True)

"""A tiny Qwen3.5 in vLLM: sets that are not nested, with the 4-bit cache, and what is missing."""

import re
import shutil
from types import SimpleNamespace

import engines
import pytest
import torch
from linear_layers import finish
from lora_adapters import TARGETS, write_adapter, write_merged
from no_videos import NoVideos
from plugin_units import HIDDEN, qoq_config, tensor_parallel, vllm_config
from qoq_checkpoints import round_to_nearest
from rtn_checkpoints import edit, w4a16, w8a8
from safetensors.torch import save_file
from tiny_models import write
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

import vllm_qoq
from merge_tools.job import merge
from vllm_qoq.bench.evaluate.engine import Engine
from vllm_qoq.bench.evaluate.float_model import load_tokenizer
from vllm_qoq.checkpoint.float_view import FloatView
from vllm_qoq.checkpoint.folder import INDEX, Checkpoint
from vllm_qoq.checkpoint.verify import open_merged
from vllm_qoq.errors import UserError
from vllm_qoq.quantizer.evaluate import int8_inputs, linears
from vllm_qoq.quantizer.job import quantize
from vllm_qoq.quantizer.load import load_model
from vllm_qoq.quantizer.model import layer_names
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.serving import speculation

NoVideos.use()

LENGTH, FIRST = 64, 8
SETS = ("w8a8", "w4a8", "w4a16")
LINEAR = ("in_proj_qkv", "in_proj_z", "out_proj")

_kept = []  # vLLM cannot build an engine after another was collected in the same process


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    monkeypatch.setattr("vllm_qoq.bench.evaluate.engine._KV_BYTES", 16 << 20)


@pytest.fixture(scope="module")
def checkpoint(tiny_model, heldout_text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    (folder / "text.txt").write_text(heldout_text.read_text()[:2000])
    model = write("Qwen3_5ForCausalLM", folder / "model", tiny_model)
    given = {"sets": list(SETS), "samples": 8, "seqlen": 64, "passes": 1}
    options = QuantizeOptions.parse(given, "options")
    quantize(model, folder / "out", folder / "text.txt", options)
    return folder / "out"


@torch.no_grad()
@pytest.mark.skipif(not engines.current_platform.is_cpu(), reason="reads the worker here")
def test_heads_of_mtp_come_from_the_original_model(checkpoint, tmp_path, monkeypatch):
    """Built and joined to the rotated model; a CPU cannot speculate with a state, in any model."""
    model = shutil.copytree(checkpoint.parent / "model", tmp_path / "model")

    def add_head(tensors, config):
        config["mtp_num_hidden_layers"] = 1
        for name in [name for name in tensors if name.startswith("model.layers.1.")]:
            tensors[name.replace("model.layers.1.", "mtp.layers.0.")] = tensors[name]
        tensors["mtp.fc.weight"] = torch.ones(128, 256)
        for norm in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
            tensors[f"mtp.{norm}.weight"] = torch.ones(128)

    edit(model, add_head)
    monkeypatch.setattr(speculation, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    llm = engines.engine(
        checkpoint,
        {"force_set": "w4a8"},
        speculative_config={"method": "mtp", "model": str(model), "num_speculative_tokens": 1},
        hf_overrides={"mtp_num_hidden_layers": 1},
    )
    head = llm.llm_engine.model_executor.driver_worker.model_runner.drafter.model
    original, hidden = Checkpoint.open(model), torch.randn(5, 128).to(torch.bfloat16)
    embedding, lm_head = (
        original.get(f"{name}.weight").float() for name in ("model.embed_tokens", "lm_head")
    )
    rows = head.model.embed_tokens(torch.arange(len(embedding))).float()
    assert (rows - embedding).norm() < 0.01 * embedding.norm()
    logits = hidden.float() @ lm_head.T
    assert (head.compute_logits(hidden).float() - logits).norm() < 0.02 * logits.norm()
    assert head.model.layers[0].self_attn.qkv_proj.weight.dtype == torch.bfloat16


def test_a_converted_adapter_changes_linear_attention_as_it_does_in_the_model(checkpoint, tmp_path):
    model = checkpoint.parent / "model"
    trained = write_adapter(model, tmp_path / "trained", seed=1, targets=(*TARGETS, *LINEAR))
    vllm_qoq.convert_lora(trained, checkpoint, tmp_path / "converted")
    merged = write_merged(model, trained, tmp_path / "merged")
    tokens = list(range(40, 80))
    exact = AutoModelForCausalLM.from_pretrained(merged).float()(torch.tensor([tokens])).logits
    exact = exact[0, -1].log_softmax(-1)
    options = {"enable_lora": True, "max_lora_rank": 8, "max_num_seqs": 4}
    llm = engines.engine(checkpoint, {"force_set": "w8a8", "lora": "converted"}, **options)
    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=20)

    def gap(path):
        request, prompt = engines.adapter(path), {"prompt_token_ids": tokens}
        (output,) = llm.generate([prompt], sampling, lora_request=[request], use_tqdm=False)
        (found,) = output.outputs[0].logprobs
        return max(abs(entry.logprob - float(exact[token])) for token, entry in found.items())

    assert gap(tmp_path / "converted") < 0.4
    assert min(gap(None), gap(trained)) > 2


def test_each_set_computes_what_its_weights_and_a_4_bit_cache_give(checkpoint, heldout_text):
    window = load_tokenizer(checkpoint)(heldout_text.read_text()[:2000]).input_ids[:LENGTH]
    engine = Engine(checkpoint, SETS, length=LENGTH, kv_bits=4, chunk=16)
    _kept.append(engine)
    found = {name: engine.logits(window, FIRST, name).float().log_softmax(-1) for name in SETS}
    for weights in open_merged(checkpoint)[2]:
        view = FloatView(weights)
        model, names = load_model(view).float(), layer_names(view.config)
        rounded = linears(model, names) if weights.name.endswith("a8") else ()
        with torch.no_grad(), int8_inputs(rounded):
            expected = model(torch.tensor([window]), logits_to_keep=LENGTH - FIRST).logits[0, :-1]
        expected = expected.log_softmax(-1)
        lost = {
            name: float((expected.exp() * (expected - one)).sum(-1).median())
            for name, one in found.items()
        }
        assert lost[weights.name] < 0.005
        assert all(lost[name] > 2 * lost[weights.name] for name in SETS if name != weights.name)


@pytest.mark.parametrize("part", ["in_proj_qkv", "in_proj_z"])
def test_a_projection_that_is_missing_is_named_as_in_the_checkpoint(part, checkpoint, tmp_path):
    lost = f"w4a8.model.layers.0.linear_attn.{part}."

    def lose(tensors, config):
        for name in [name for name in tensors if name.startswith(lost)]:
            del tensors[name]

    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    whole = Checkpoint.open(tmp_path)
    tensors = {name: whole.get(name).clone() for name in whole.tensors}
    for file in {info.file for info in whole.tensors.values()} | {INDEX}:
        (tmp_path / file).unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    edit(tmp_path, lose)
    with pytest.raises(UserError, match=rf"did not fill {re.escape(lost)}.*verify"):
        Engine(tmp_path, SETS, length=LENGTH, kv_bits=4, chunk=16)


def test_each_set_of_a_merged_checkpoint_computes_what_its_own_does(tiny_model, tmp_path):
    """Other tools leave out of a set what is narrow, and vLLM runs in_proj_qkv and _z as one."""

    def in_bf16(tensors, config):
        config["dtype"] = "bfloat16"
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}

    model = write("Qwen3_5ForCausalLM", tmp_path / "model", tiny_model)
    shutil.copy(tiny_model / "generation_config.json", model)
    edit(model, in_bf16)
    skip = ("in_proj_a", "in_proj_b")
    folders = {"a": w8a8(model, tmp_path / "a", skip), "b": w4a16(model, tmp_path / "b", skip)}
    merge(folders, tmp_path / "merged")
    window = list(range(3, 3 + LENGTH))
    singles = {
        name: Engine(folder, (), length=LENGTH, kv_bits=16, chunk=LENGTH)
        for name, folder in folders.items()
    }
    merged = Engine(tmp_path / "merged", tuple(folders), length=LENGTH, kv_bits=16, chunk=LENGTH)
    _kept.extend([*singles.values(), merged])
    alone = {name: engine.logits(window, FIRST, None) for name, engine in singles.items()}
    assert not torch.allclose(alone["a"], alone["b"], atol=0.1)
    for name, expected in alone.items():
        assert torch.equal(merged.logits(window, FIRST, name), expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_gets_its_heads_of_q_k_v_and_the_gate(rank):
    """in_proj_qkv has three parts, of which each is cut for itself."""
    sizes = {"in_proj_qkv": [128, 128, 256], "in_proj_z": [256]}
    random = torch.Generator().manual_seed(3)
    rounded = {
        part: round_to_nearest(torch.randn(sum(rows), HIDDEN, generator=random), 128)
        for part, rows in sizes.items()
    }
    config = qoq_config(
        sets={"w4a8": {"quant_method": "qoq_linear"}}, routing={"prefill": "w4a8", "decode": "w4a8"}
    )
    config.packed_modules_mapping = {"in_proj_qkvz": list(sizes)}
    with tensor_parallel(rank, 2, vllm_config()):
        model = torch.nn.Module()
        model.quant_config, model.block = config, torch.nn.Module()
        model.block.in_proj_qkvz = MergedColumnParallelLinear(
            HIDDEN,
            [128, 128, 256, 256],
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=config,
            prefix="block.in_proj_qkvz",
        )
        stored = {
            f"w4a8.block.{part}.{leaf}": tensor
            for part, leaves in rounded.items()
            for leaf, tensor in leaves.items()
        }
        stacked = {
            ".in_proj_qkv.": (".in_proj_qkvz.", (0, 1, 2)),
            ".in_proj_z.": (".in_proj_qkvz.", 3),
        }
        mapper = WeightsMapper(orig_to_new_stacked=stacked)
        AutoWeightsLoader(model).load_weights(stored.items(), mapper=mapper)
    child = model.block.in_proj_qkvz.w4a8
    for leaf in rounded["in_proj_z"]:
        parts = [one for part, rows in sizes.items() for one in rounded[part][leaf].split(rows)]
        expected = torch.cat([one.chunk(2)[rank] for one in parts])
        assert torch.equal(getattr(child, leaf), expected), leaf
    finish(model)

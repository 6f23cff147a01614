"""Hidden states of a rotated model: turned back where they leave it, or refused."""

import copy
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from plugin_units import HIDDEN, qoq_config, section, tensor_parallel, vllm_config
from qoq_checkpoints import write_plain
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from vllm.config import ModelConfig
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.model_loader import reload
from vllm.model_executor.models.utils import AutoWeightsLoader

from merge_tools.__main__ import main
from vllm_qoq.checkpoint import verify
from vllm_qoq.checkpoint.format import Section
from vllm_qoq.errors import FormatError, UserError
from vllm_qoq.numerics import rotation as basis
from vllm_qoq.progress import Progress
from vllm_qoq.quantizer import rotate
from vllm_qoq.quantizer.model import Dimensions, layer_names
from vllm_qoq.serving.methods import hidden_states
from vllm_qoq.serving.methods.original_basis import OriginalBasis
from vllm_qoq.serving.methods.way_back import way_back

SIZES = {
    "hidden_size": 96,  # a Hadamard matrix that is no power of two
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
}
STORED = {"rotation": "stored"}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**SIZES)),
        (Qwen3ForCausalLM, Qwen3Config(**SIZES, tie_word_embeddings=True)),
    ],
    ids=["llama", "tied-qwen3"],
)
@torch.no_grad()
def test_what_quantize_stores_leads_back_to_the_original_hidden_states(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval().double()
    model.model.norm.weight.copy_(torch.rand(96) * 2 + 0.1)
    content = config.to_dict() | {"model_type": config.model_type}
    names, dimensions = layer_names(content), Dimensions.of(content)
    tokens = torch.randint(0, 64, (1, 20))
    before = model.model(tokens, output_hidden_states=True)
    rotate.untie(model, names)
    original_head = copy.deepcopy(model.lm_head)
    stored = rotate.way_back(model, names, dimensions)
    rotate.rotate_stream(model, names, dimensions)
    after = model.model(tokens, output_hidden_states=True)

    way = basis_of(stored["stream.rotation"], stored["stream.norm"])
    last = way(after.last_hidden_state)
    torch.testing.assert_close(last, before.last_hidden_state, rtol=1e-5, atol=1e-5)
    # What EAGLE-3 takes from inside the model, side by side.
    turned, original = (torch.cat(x.hidden_states[:-1], dim=-1) for x in (after, before))
    torch.testing.assert_close(way.stream(turned), original)
    logits = model.lm_head(way.head_input(last))
    torch.testing.assert_close(logits, original_head(last), rtol=1e-5, atol=1e-5)


def basis_of(rotation, norm):
    """What a model of the dtype of `norm` has, once it is loaded."""
    way = OriginalBasis(len(norm), norm.dtype, is_tracked=True)
    way.load_weights([("rotation", rotation), ("norm", norm)])
    way.quant_method.process_weights_after_loading(way)
    return way


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [96, 256])
def test_what_is_turned_is_rounded_like_the_stream_and_never_overflows(dtype, size):
    """With a channel as large as models have: the sum of signs would be infinite in float16."""
    rotation, norm = basis.signs(rotate.hadamard(size).cpu()), torch.rand(size) + 0.5
    way, stream = basis_of(rotation, norm.to(dtype)), torch.randn(5, size).double()
    stream[:, 7] = 30000
    turned = (stream @ rotation.double() / size**0.5).to(dtype)
    exact = turned.double() @ rotation.double().T / size**0.5
    found = way.stream(turned)
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps
    assert (found.double() - exact).abs().max() < 2 * step * stream[:, 7].max()
    last = way(turned / 30000 * size**0.5)
    expected = exact / 30000 * size**0.5 * norm.to(dtype).double()
    torch.testing.assert_close(last.double(), expected, rtol=2 * step, atol=8 * step)


def test_one_wrong_sign_is_found():
    stored = basis.signs(rotate.hadamard(512))
    assert basis.finding(stored) is None
    stored[300, 7] *= -1
    assert "not orthogonal" in basis.finding(stored)
    stored[0, 0] = 0
    assert "something else than -1 and 1" in basis.finding(stored)
    with pytest.raises(ValueError, match="several magnitudes"):
        basis.signs(rotate.hadamard(8) * torch.rand(8).double())


def test_the_section_says_where_the_rotation_is():
    parsed = Section.parse(section(stream=STORED))
    assert parsed.stream.is_stored and parsed.to_json()["stream"] == STORED
    assert (
        Section.parse(section()).stream is None
        and "stream" not in parsed.parse(section()).to_json()
    )
    with pytest.raises(FormatError, match="stream"):
        Section.parse(section(stream={"rotation": "other"}))
    with pytest.raises(FormatError, match="reserved"):
        Section.parse(section(sets={"stream": section()["sets"]["w8a8"]}))


@pytest.fixture
def merge_tools(monkeypatch, capsys):
    """`merge_tools(COMMAND, ...)` runs here: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["merge_tools", *map(str, arguments), "--quiet"])
        return main(), *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def plain_dir(tiny_model, tmp_path_factory):
    """An input of a merge whose stream is rotated, as far as its tensors say."""
    out = write_plain(tiny_model, tmp_path_factory.mktemp("plain") / "plain")
    change(out, "", **{"stream.rotation": basis.signs(rotate.hadamard(HIDDEN))})
    change(out, "", **{"stream.norm": torch.rand(HIDDEN).bfloat16()})
    return out


def change(folder, drop, **tensors):
    """Drop a tensor and put others into the only file of the checkpoint."""
    (file,) = folder.glob("*.safetensors")
    kept = {name: tensor.clone() for name, tensor in load_file(file).items() if name != drop}
    save_file(kept | tensors, file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def test_a_merge_keeps_the_way_back(plain_dir, tmp_path, merge_tools):
    out = tmp_path / "merged"
    code, _, err = merge_tools("merge", f"w4a8={plain_dir}", "-o", out)
    assert code == 0, err
    assert json.loads((out / "config.json").read_text())["quantization_config"]["stream"] == STORED
    assert verify.structure(out) == [] == verify.contents(out, Progress(quiet=True))
    assert "rotation stored" in merge_tools("inspect", out)[1]

    damaged = tmp_path / "damaged"
    shutil.copytree(plain_dir, damaged)
    change(damaged, "", **{"stream.rotation": torch.ones(HIDDEN, HIDDEN, dtype=torch.int8)})
    code, _, err = merge_tools("merge", f"w4a8={damaged}", "-o", tmp_path / "never")
    assert code == 2 and "stream.rotation: has rows that are not orthogonal" in err
    assert not (tmp_path / "never").exists()


def test_a_final_norm_that_another_tool_folded_is_noticed(tiny_model, tmp_path, merge_tools):
    plain = write_plain(tiny_model, tmp_path / "plain")
    change(plain, "", **{"model.norm.weight": torch.ones(HIDDEN).bfloat16()})
    for source, expected in ((plain, {"rotation": "unknown"}), (None, None)):
        out = tmp_path / f"merged-{expected is None}"
        source = source or write_plain(tiny_model, tmp_path / "trained")
        code, _, err = merge_tools("merge", f"w4a8={source}", "-o", out)
        assert code == 0, err
        written = json.loads((out / "config.json").read_text())["quantization_config"]
        assert written.get("stream") == expected


@pytest.mark.parametrize(
    ("drop", "tensors", "message"),
    [
        ("stream.norm", {}, "stream.norm: config.json announces it"),
        ("", {"stream.norm": torch.ones(HIDDEN // 2)}, "expected BF16 or F16 or F32"),
        ("", {"stream.norm": torch.full((HIDDEN,), torch.nan)}, "NaN"),
        ("", {"stream.rotation": torch.ones(HIDDEN, HIDDEN)}, "expected I8 [256, 256]"),
        ("", {"stream.rotation": torch.ones(HIDDEN, 8, dtype=torch.int8)}, "expected I8"),
        ("", {"stream.rotation": torch.ones(HIDDEN, HIDDEN, dtype=torch.int8)}, "orthogonal"),
        ("", {"stream.shift": torch.ones(3)}, "stream.shift: is not announced"),
    ],
)
def test_verify_finds_a_damaged_way_back(plain_dir, tmp_path, drop, tensors, message):
    out = tmp_path / "checkpoint"
    shutil.copytree(plain_dir, out)
    config = json.loads((out / "config.json").read_text())
    one = {"w4a8": config["quantization_config"]}
    routing = {"prefill": "w4a8", "decode": [{"set": "w4a8"}]}
    config["quantization_config"] = section(sets=one, routing=routing, stream=STORED)
    (out / "config.json").write_text(json.dumps(config))
    (file,) = out.glob("*.safetensors")
    own = {(f"w4a8.{n}" if "_proj." in n else n): t.clone() for n, t in load_file(file).items()}
    save_file(own, file, metadata={"format": "pt"})
    assert verify.structure(out) == []
    change(out, drop, **tensors)
    found = verify.structure(out) or verify.contents(out, Progress(quiet=True))
    assert any(message in finding for finding in found), found


class Root(torch.nn.Module):
    """As vLLM's pooling models are built: the layers, then the pooler."""

    def __init__(self, quant_config, has_pooler=True):
        super().__init__()
        self.quant_config = quant_config
        self.model = torch.nn.Module()
        self.model.o_proj = RowParallelLinear(
            HIDDEN, HIDDEN, bias=False, quant_config=quant_config, prefix="model.o_proj"
        )
        torch.nn.Module().pooler = torch.nn.Identity()  # another model's
        if has_pooler:
            self.pooler = torch.nn.Identity()

    def forward(self, hidden):
        return hidden


@pytest.fixture
def pooling(tiny_model):
    model = ModelConfig(str(tiny_model), runner="pooling", convert="embed", dtype="float32")
    return vllm_config(model_config=model)


def test_the_root_of_a_pooling_model_turns_hidden_states_back(pooling):
    config = qoq_config(stream=STORED)
    signs, norm = basis.signs(rotate.hadamard(HIDDEN)), torch.rand(HIDDEN)
    with tensor_parallel(0, 1, pooling):
        root = Root(config)
        AutoWeightsLoader(root).load_weights([("stream.rotation", signs), ("stream.norm", norm)])
        root.stream.quant_method.process_weights_after_loading(root.stream)
    hidden = torch.randn(7, HIDDEN)
    torch.testing.assert_close(root(hidden), hidden @ signs.float().T / HIDDEN**0.5 * norm)


def test_the_way_back_is_loaded_anew(pooling):
    rotation, hidden = basis.signs(rotate.hadamard(HIDDEN)), torch.randn(7, HIDDEN)
    norms = torch.rand(2, HIDDEN)
    with tensor_parallel(0, 1, pooling):
        root = Root(qoq_config(stream=STORED))
        reload.record_metadata_for_reloading(root)

        def load(norm):
            tensors = [("stream.rotation", rotation), ("stream.norm", norm)]
            AutoWeightsLoader(root).load_weights(tensors)

        load(norms[0])
        root.stream.quant_method.process_weights_after_loading(root.stream)
        before = root(hidden)
        reload.initialize_layerwise_reload(root)
        load(norms[1])
        reload.finalize_layerwise_reload(root, pooling.model_config)
    torch.testing.assert_close(root(hidden), before / norms[0] * norms[1])


@pytest.mark.parametrize("leaf", ["rotation", "norm", ""])
def test_a_way_back_that_was_not_loaded_is_refused(pooling, leaf):
    tensors = {"rotation": basis.signs(rotate.hadamard(HIDDEN)), "norm": torch.rand(HIDDEN)}
    message = f"did not fill stream.{leaf}"
    if not leaf:
        tensors["rotation"] = torch.ones_like(tensors["rotation"])
        message = "not orthogonal"
    tensors.pop(leaf, None)
    with tensor_parallel(0, 1, pooling):
        root = Root(qoq_config(stream=STORED))
        AutoWeightsLoader(root).load_weights((f"stream.{n}", t) for n, t in tensors.items())
        with pytest.raises(FormatError, match=message):
            root.stream.quant_method.process_weights_after_loading(root.stream)


def test_a_model_whose_exit_is_not_found_is_refused(pooling):
    with tensor_parallel(0, 1, pooling):
        root = Root(qoq_config(stream=STORED), has_pooler=False)
        with pytest.raises(UserError, match=r"was not found .*--no-rotate"):
            AutoWeightsLoader(root).load_weights([])
    later = torch.nn.Module()
    later.model, later.pooler = root.model, torch.nn.Identity()
    assert not hasattr(later, "stream")  # nobody waits any more


def test_generation_leaves_the_way_back_on_the_disk():
    with tensor_parallel(0, 1, vllm_config()):
        root = Root(qoq_config(stream=STORED))
        mapper = root.quant_config.get_cache_scale_mapper()
    with tensor_parallel(0, 1, vllm_config()):
        other = Root(qoq_config()).quant_config.get_cache_scale_mapper()
    assert not hasattr(root, "stream") and not root._forward_hooks
    assert mapper._map_name("stream.rotation") is None
    assert mapper._map_name("model.stream.weight") == "model.stream.weight"
    assert other._map_name("stream.rotation") == "stream.rotation"  # refused by vLLM's loader


def engine_of(runner="generate", method=None, folder="none", head="head", stages=1, **model):
    names = {"runner_type": runner, "convert_type": "none", "enable_prompt_embeds": False}
    names |= {"is_multimodal_model": False, "model": str(folder), "revision": None}
    names |= {"quantization": "qoq", "get_hidden_size": lambda: HIDDEN}
    configs = {"hf_config": SimpleNamespace(), "hf_text_config": SimpleNamespace()}
    heads = SimpleNamespace(
        model=str(head),
        quantization="qoq" if head == folder else None,
        hf_config=SimpleNamespace(),
        get_hidden_size=lambda: HIDDEN,
    )
    drafts = SimpleNamespace(method=method, draft_model_config=heads)
    return SimpleNamespace(
        model_config=SimpleNamespace(**names | configs | model),
        speculative_config=drafts if method else None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
    )


@pytest.mark.parametrize(
    ("rotation", "engine", "message"),
    [
        ("unknown", {"method": "eagle"}, "'eagle' needs"),
        ("unknown", {"method": "eagle3"}, "'eagle3' needs"),
        ("unknown", {"method": "mtp"}, "use 'ngram' or 'draft_model'"),
        ("unknown", {"method": "medusa"}, "'medusa' needs"),
        ("stored", {"method": "dflash"}, "'dflash' needs"),
        ("stored", {"method": "extract_hidden_states"}, "--no-rotate"),
        ("stored", {"method": "eagle", "stages": 2}, "in 2 pipeline stages.*--tensor-parallel"),
        ("stored", {"enable_prompt_embeds": True}, "--enable-prompt-embeds needs"),
    ],
)
def test_other_exits_and_entries_of_a_rotated_stream_are_refused(rotation, engine, message):
    stream = {"rotation": rotation}
    with pytest.raises(UserError, match=message):
        hidden_states.check_engine(Section.parse(section(stream=stream)), engine_of(**engine))
    hidden_states.check_engine(Section.parse(section()), engine_of(**engine))


def test_heads_of_mtp_are_not_in_a_rotated_checkpoint(tmp_path):
    engine = engine_of(method="mtp", folder=tmp_path, head=tmp_path)
    with pytest.raises(UserError, match=r"has no heads of MTP.*name the original model"):
        hidden_states.check_engine(Section.parse(section(stream=STORED)), engine)
    hidden_states.check_engine(Section.parse(section()), engine)


def test_an_encoder_is_served_where_its_outputs_were_rotated_along():
    engine = engine_of(is_multimodal_model=True)
    hidden_states.check_engine(Section.parse(section(stream=STORED)), engine)
    with pytest.raises(UserError, match="serve a model of text alone"):
        hidden_states.check_engine(Section.parse(section(stream={"rotation": "unknown"})), engine)


@pytest.mark.parametrize(
    "method", ["ngram", "suffix", "draft_model", "eagle", "eagle3", "mtp", "medusa", None]
)
def test_drafts_that_need_no_hidden_states_or_turned_ones_are_served(method):
    hidden_states.check_engine(Section.parse(section(stream=STORED)), engine_of(method=method))


def test_pooling_is_refused_where_the_way_back_is_unknown(tmp_path):
    old, unknown = section(), section(stream={"rotation": "unknown"})
    report = tmp_path / "quantization_report.json"
    for options, written, refused in (
        ({"rotate": True}, old, True),
        ({"rotate": False}, old, False),
        ({}, old, False),
        ({"rotate": True}, section(stream=STORED), False),
        ({}, unknown, True),
    ):
        report.write_text(json.dumps({"options": options}))
        pooling = engine_of("pooling", folder=tmp_path)
        hidden_states.check_engine(Section.parse(written), engine_of(folder=tmp_path))
        if refused:
            with pytest.raises(UserError, match="again with vllm-qoq quantize"):
                hidden_states.check_engine(Section.parse(written), pooling)
        else:
            hidden_states.check_engine(Section.parse(written), pooling)
    report.write_text("{")
    with pytest.raises(UserError, match=r"quantization_report\.json"):
        hidden_states.check_engine(Section.parse(old), engine_of("pooling", folder=tmp_path))


def test_a_classifier_of_rows_of_lm_head_reads_the_stream_as_it_is():
    reranker = SimpleNamespace(classifier_from_token=["no", "yes"], method="from_2_way_softmax")
    config = engine_of("pooling", convert_type="classify", hf_config=reranker)
    stored = Section.parse(section(stream=STORED))
    hidden_states.check_engine(stored, config)
    assert way_back(stored, config, torch.nn.Identity(), "") is None
    with pytest.raises(UserError, match="--lm-head-bits 16"):
        hidden_states.check_engine(Section.parse(section(lm_head={"bits": 8})), config)


def test_the_way_back_of_a_mistral_model_is_loaded(pooling):
    """Its loader makes `model.norm` of every `norm`."""
    from vllm.model_executor.models.mistral import MistralForCausalLM

    tensors = {"rotation": basis.signs(rotate.hadamard(HIDDEN)), "norm": torch.rand(HIDDEN)}
    model = SimpleNamespace(mistral_mapping=MistralForCausalLM.mistral_mapping)
    renamed = [
        MistralForCausalLM.maybe_remap_mistral(model, f"stream.{name}", tensor)
        for name, tensor in tensors.items()
    ]
    assert renamed[1][0] == "stream.model.norm"
    with tensor_parallel(0, 1, pooling):
        root = Root(qoq_config(stream=STORED))
        loaded = AutoWeightsLoader(root).load_weights(renamed)
        assert loaded == {"stream.rotation", "stream.norm"}
        root.stream.quant_method.process_weights_after_loading(root.stream)
        with pytest.raises(FormatError, match=r"stream\.other: is not known"):
            AutoWeightsLoader(root).load_weights([("stream.other", tensors["norm"])])
    assert torch.equal(root.stream.norm, tensors["norm"])

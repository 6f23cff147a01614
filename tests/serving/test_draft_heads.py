"""Heads that draft beside a rotated model: what they take from it is turned, in either runner."""

import contextlib
import importlib
import inspect
import json
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
from plugin_units import qoq_config, section, tensor_parallel, vllm_config
from safetensors.torch import save_file
from torch import nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.v1.spec_decode.eagle import EagleProposer

from vllm_qoq.checkpoint.format import Section
from vllm_qoq.errors import UserError
from vllm_qoq.numerics import rotation as basis
from vllm_qoq.quantizer import rotate
from vllm_qoq.serving.methods import draft_heads, hidden_states
from vllm_qoq.serving.methods.original_basis import OriginalBasis
from vllm_qoq.serving.methods.way_back import way_back
from vllm_qoq.serving.speculation import check_speculation
from vllm_qoq.serving.vllm_versions import drafter_in_the_making, handed_to

HIDDEN, VOCAB = 96, 64
STORED = {"rotation": "stored"}
ROTATION = rotate.hadamard(HIDDEN).float().cpu()


class Target(nn.Module):
    """A model as far as heads look at it."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(VOCAB, HIDDEN, params_dtype=torch.float32)
        self.lm_head = ParallelLMHead(VOCAB, HIDDEN, params_dtype=torch.float32)
        self.rope = nn.Module()
        self.rope.register_buffer("cache", torch.ones(3))


class Head(nn.Module):
    def __init__(self, target, **shared):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens, self.model.rope = target.embed_tokens, target.rope
        self.lm_head = target.lm_head
        for name, module in shared.items():
            setattr(self, name, module)


@pytest.fixture
def built():
    reduce = "vllm.model_executor.layers.vocab_parallel_embedding.tensor_model_parallel_all_reduce"
    with tensor_parallel(0, 1, vllm_config()), patch(reduce, lambda rows: rows):
        yield


@pytest.fixture
def norm():
    return torch.rand(HIDDEN) + 0.5


@pytest.fixture
def way(norm):
    found = OriginalBasis(HIDDEN, torch.float32, is_tracked=True)
    found.load_weights([("rotation", basis.signs(ROTATION)), ("norm", norm)])
    found.quant_method.process_weights_after_loading(found)
    return found


def original(target, norm):
    """Fill the target with what a rotation makes of random matrices, which are returned."""
    embedding, lm_head = torch.randn(2, VOCAB, HIDDEN).unbind()
    target.embed_tokens.weight.data[:VOCAB] = embedding @ ROTATION
    target.lm_head.weight.data[:VOCAB] = lm_head * norm @ ROTATION
    target.lm_head.quant_method.process_weights_after_loading(target.lm_head)
    return embedding, lm_head


def test_what_a_head_shares_is_that_of_the_original_model(built, way, norm):
    target, hidden = Target(), torch.randn(7, HIDDEN)
    embedding, lm_head = original(target, norm)
    head = Head(target)
    draft_heads.turn_shared(head, target, way)
    rows = head.model.embed_tokens(torch.arange(VOCAB))
    logits = head.lm_head.quant_method.apply(head.lm_head, hidden)[:, :VOCAB]
    torch.testing.assert_close(rows, embedding, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, hidden @ lm_head.T, rtol=1e-4, atol=1e-4)
    # The model keeps its own, which are the same tensors.
    of_model = target.lm_head.quant_method.apply(target.lm_head, hidden)[:, :VOCAB]
    rotated = hidden @ target.lm_head.weight[:VOCAB].T
    torch.testing.assert_close(of_model, rotated, rtol=1e-4, atol=1e-4)
    assert head.lm_head.weight is target.lm_head.weight and "stream" not in target.lm_head._modules
    assert head.model.rope is target.rope and head.lm_head.shard_indices.num_org_elements == VOCAB


def test_adapters_of_the_model_are_not_the_heads(built, way, norm):
    target = Target()
    embedding, _ = original(target, norm)
    with_adapters = nn.Module()
    with_adapters.base_layer = target.embed_tokens
    target.embed_tokens = with_adapters
    head = Head(target)
    draft_heads.turn_shared(head, target, way)
    torch.testing.assert_close(
        head.model.embed_tokens(torch.arange(VOCAB)), embedding, rtol=1e-4, atol=1e-4
    )


def test_what_a_head_shares_otherwise_is_refused(built, way):
    target = Target()
    target.first = nn.Linear(3, 3)
    with pytest.raises(UserError, match=r"takes first \(Linear\) from the model"):
        draft_heads.turn_shared(Head(target, first=target.first), target, way)


def test_an_lm_head_that_lost_channels_is_not_shared(built, way, tmp_path):
    """In a head that brings its own, nothing has to be divided."""
    zero = torch.ones(HIDDEN)
    zero[5] = 0
    way.norm.data.copy_(zero)
    target = Target()
    with pytest.raises(UserError, match=r"goes from 0 to 1 \(stream\.norm\).*an lm_head"):
        draft_heads.turn_shared(Head(target), target, way)
    way.is_tracked = False  # dummy numbers
    draft_heads.turn_shared(Head(target), target, way)
    way.is_tracked = True
    own = ParallelLMHead(VOCAB, HIDDEN)
    draft_heads.turn_shared(Head(target, lm_head=own), target, way)

    # The front end says so, where both are folders.
    folders = tmp_path / "model", tmp_path / "head", tmp_path / "own"
    tensors = {"stream.norm": zero}, {"fc": zero}, {"lm_head.weight": zero}
    for folder, held in zip(folders, tensors, strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file(held, folder / "model.safetensors", {"format": "pt"})
    engine = engine_of("eagle", *folders[:2])
    stored = Section.parse(section(stream=STORED))
    with pytest.raises(UserError, match=r"goes from 0 to 1 \(stream\.norm in .*model\)"):
        hidden_states.check_engine(stored, engine)
    hidden_states.check_engine(stored, engine_of("eagle", folders[0], folders[2]))
    hidden_states.check_engine(stored, engine_of("medusa", *folders[:2]))
    with pytest.raises(UserError, match="goes from 0 to 1"):
        hidden_states.check_engine(stored, engine_of("mtp", folders[0], folders[2]))


def engine_of(method, model, head, quantization=None):
    heads = SimpleNamespace(model=str(head), quantization=quantization)
    heads.hf_config, heads.get_hidden_size = SimpleNamespace(), lambda: HIDDEN
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(model),
            get_hidden_size=lambda: HIDDEN,
            quantization="qoq",
            revision=None,
            convert_type="none",
            is_hybrid=False,
            runner_type="generate",
            enable_prompt_embeds=False,
            is_multimodal_model=False,
        ),
        speculative_config=SimpleNamespace(method=method, draft_model_config=heads),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )


def test_what_is_no_head_of_the_model_is_refused():
    stored, engine = Section.parse(section(stream=STORED)), engine_of("eagle3", "OUT", "HEAD")
    hidden_states.check_engine(stored, engine)
    head = engine.speculative_config.draft_model_config
    head.get_hidden_size = lambda: 2 * HIDDEN
    with pytest.raises(UserError, match=rf"HEAD is for .* size of {2 * HIDDEN}, .*OUT has"):
        hidden_states.check_engine(stored, engine)
    head.hf_config.target_hidden_size = HIDDEN
    hidden_states.check_engine(stored, engine)
    with pytest.raises(UserError, match="OTHER is a checkpoint of vllm-qoq, not a head of eagle3"):
        hidden_states.check_engine(stored, engine_of("eagle3", "OUT", "OTHER", "qoq"))


def test_quantized_heads_of_mtp_are_refused():
    check_speculation(engine_of("mtp", "OUT", "ORIGINAL"))
    with pytest.raises(UserError, match=r"ORIGINAL is quantized \(fp8\)"):
        check_speculation(engine_of("mtp", "OUT", "ORIGINAL", "fp8"))


def speculator_class():
    return importlib.import_module("vllm.v1.worker.gpu.spec_decode.eagle.speculator")


class Recorder:
    """A drafter with the `propose` of one of vLLM's, which tells what it gets."""

    def __init__(self, propose, uses_aux=False):
        signature = inspect.signature(propose)
        names = [name for name in signature.parameters if name != "self"]

        def record(*args, **kwargs):
            self.got = signature.bind(None, *args, **kwargs).arguments
            return "drafts"

        record.__signature__ = signature.replace(
            parameters=[signature.parameters[name] for name in names]
        )
        self.names, self.propose, self.model = names, record, nn.Module()
        self.eagle3_use_aux_hidden_state = uses_aux
        self.load_model = lambda target_model: None


@pytest.mark.parametrize("kind", ["eagle", "eagle3", "medusa", "v2-eagle", "v2-eagle3"])
def test_what_vllm_hands_to_a_head_is_turned(way, norm, kind):
    hidden, streams = torch.randn(5, HIDDEN), torch.randn(3, 5, HIDDEN)
    rotated, images = (hidden / norm) @ ROTATION, torch.randn(2, 2 * HIDDEN)
    turned_images = (images.view(2, 2, HIDDEN) @ ROTATION.T).flatten(1)
    if kind == "medusa":
        module = pytest.importorskip("vllm.v1.spec_decode.medusa")  # up to 0.32
        drafter, handed = Recorder(module.MedusaProposer.propose), {"target_hidden_states": rotated}
    elif kind.startswith("v2"):
        drafter = Recorder(speculator_class().EagleSpeculator.propose)
        aux = list(streams @ ROTATION) if kind == "v2-eagle3" else None
        handed = {"last_hidden_states": rotated, "aux_hidden_states": aux}
        handed["mm_inputs"] = ([images], "mask")
    else:
        drafter = Recorder(EagleProposer.propose, kind == "eagle3")
        states = torch.cat(list(streams @ ROTATION), -1) if kind == "eagle3" else rotated
        handed = {"target_hidden_states": states, "mm_embed_inputs": ([images], "mask")}
    required = {name: None for name in drafter.names if name not in handed}
    with patch.object(draft_heads, "drafter_in_the_making", lambda: drafter):
        draft_heads.serve(nn.Module(), way)
    assert drafter.propose(**required | handed) == "drafts"
    got, close = drafter.got, torch.testing.assert_close
    if kind == "v2-eagle3":
        close(torch.stack(got["aux_hidden_states"]), streams, rtol=1e-4, atol=1e-4)
    elif kind == "eagle3":
        close(got["target_hidden_states"], torch.cat(list(streams), -1), rtol=1e-4, atol=1e-4)
    else:
        close(got[next(iter(handed))], hidden, rtol=1e-4, atol=1e-4)
    for name in ("mm_embed_inputs", "mm_inputs"):
        if name in handed:
            close(got[name][0][0], turned_images, rtol=1e-4, atol=1e-4)
            assert got[name][1] == "mask"


def test_a_head_loads_and_then_shares_what_is_turned(built, way, norm):
    target, drafter = Target(), Recorder(EagleProposer.propose)

    def load_model(target_model):
        drafter.model = Head(target_model)

    drafter.load_model = load_model
    with patch.object(draft_heads, "drafter_in_the_making", lambda: drafter):
        draft_heads.serve(target, way)
    drafter.load_model(target)
    assert isinstance(drafter.model.model.embed_tokens, draft_heads.OriginalEmbedding)


@pytest.mark.parametrize(
    ("module", "runner", "attribute"),
    [
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "drafter"),
        ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "speculator"),
    ],
)
def test_what_drafts_is_found_while_the_model_is_loaded(module, runner, attribute):
    """Both runners keep it, and load their model in a method of this name."""
    module = importlib.import_module(module)
    own = MagicMock(**{"drafter": None, "speculator": None} | {attribute: "what drafts"})
    own.parallel_config.enable_eplb = False
    found = []

    class Loaded(Exception):
        pass

    def load_model(**_):
        found.append(drafter_in_the_making())
        raise Loaded

    with (
        patch.object(module, "get_model_loader", lambda _: SimpleNamespace(load_model=load_model)),
        patch.object(module, "DeviceMemoryProfiler", contextlib.nullcontext),
        pytest.raises(Loaded),
    ):
        getattr(module, runner).load_model(own)
    assert found == ["what drafts"] and drafter_in_the_making() is None


def test_a_vllm_that_keeps_what_drafts_elsewhere_is_refused(way):
    class Unknown:
        def propose(self, states):
            raise NotImplementedError

    assert handed_to(Unknown()) is None
    for found in (None, Unknown()):
        with (
            patch.object(draft_heads, "drafter_in_the_making", lambda found=found: found),
            pytest.raises(UserError, match=r"was not found in this version of vLLM.*--no-rotate"),
        ):
            draft_heads.serve(nn.Module(), way)


def test_the_basis_is_kept_for_a_head_of_the_last_stage_alone(tiny_model):
    speculative = SimpleNamespace(method="eagle")
    model = SimpleNamespace(get_hidden_size=lambda: HIDDEN, dtype=torch.float32)
    config = SimpleNamespace(
        speculative_config=speculative,
        model_config=model,
        load_config=SimpleNamespace(load_format="auto"),
    )
    stored, root = Section.parse(section(stream=STORED)), nn.Module()
    with patch.object(
        draft_heads, "drafter_in_the_making", lambda: Recorder(EagleProposer.propose)
    ):
        found = way_back(stored, config, root, "model.layers.0")
    assert found.keeps_tensors() and isinstance(root.stream, OriginalBasis)
    assert not root._forward_hooks  # the model's own steps stay as they are
    assert way_back(Section.parse(section()), config, root, "") is None


def test_layers_of_heads_from_a_float_model_are_float():
    """vLLM builds heads of MTP with the model's quantization config."""
    heads = SimpleNamespace(model="ORIGINAL", quantization=None)
    config = qoq_config()
    built = vllm_config()
    with tensor_parallel(0, 1, built):

        class Root(nn.Module):
            def __init__(self, index):
                super().__init__()
                prefix = f"model.layers.{index}.o_proj"
                self.layer = ColumnParallelLinear(
                    256, 256, bias=False, quant_config=config, prefix=prefix
                )

        target = Root(0)
        assert not isinstance(target.layer.quant_method, UnquantizedLinearMethod)
        built.speculative_config = SimpleNamespace(method="mtp", draft_model_config=heads)
        assert isinstance(Root(1).layer.quant_method, UnquantizedLinearMethod)
        heads.quantization = "qoq"  # heads in the checkpoint itself, of which sets have some
        assert not isinstance(Root(2).layer.quant_method, UnquantizedLinearMethod)
        del target

"""Every tensor of a model is accounted for when it is loaded, those that all sets share too."""

import shutil

import pytest
import torch
from engines import engine, generate
from expert_layers import EXPERTS, PREFIX, SHAPES, rank_of, routed
from expert_layers import Block as Experts
from expert_layers import load as load_experts
from loaded_layers import Block, load, stored
from plugin_units import qoq_config, scheme, tensor_parallel, vllm_config
from safetensors.torch import load_file, save_file

from vllm_qoq.errors import FormatError

NAN, INFINITY = float("nan"), float("inf")


class Model(Block):
    """The block between what no set owns."""

    def __init__(self, quant_config):
        super().__init__(quant_config)
        self.block.norm = torch.nn.LayerNorm(8, bias=False)
        self.embed = torch.nn.Embedding(4, 8)
        self.head = torch.nn.Linear(8, 4, bias=False)
        self.head.weight = self.embed.weight  # tied


SHARED = {"block.norm.weight": torch.ones(8), "embed.weight": torch.randn(4, 8)}


def loaded(changes):
    """The model with the checkpoint as `changes` leave it, up to what vLLM does last."""
    with tensor_parallel(0, 1, vllm_config()):
        model = Model(qoq_config())
        weights = SHARED | stored(8, "w8a8.") | stored(4, "w4a16.") | changes
        load(model, {name: t for name, t in weights.items() if t is not None})
        model.quant_method.process_weights_after_loading(model)
        for layer in (model.block.qkv_proj, model.block.down_proj):
            for name in layer.quant_method.sets:
                weights = getattr(layer, name)
                weights.check_loaded(layer.prefix, layer.quant_method.parts)
                weights.check_values(layer.prefix)
    return model


def with_value(name, place, value):
    """The tensor `name` of the checkpoint with one other number."""
    weights = SHARED | stored(8, "w8a8.") | stored(4, "w4a16.")
    tensor = weights[name].clone()
    tensor.view(-1)[place] = value
    return {name: tensor}


def test_a_whole_checkpoint_passes_and_leaves_nothing_behind():
    model = loaded({})
    assert torch.equal(model.block.norm.weight, torch.ones(8))
    assert torch.equal(model.embed.weight, SHARED["embed.weight"])
    assert not hasattr(model, "quant_method")
    assert not hasattr(model.embed.weight, "weight_loader")


@pytest.mark.parametrize("lost", SHARED)
def test_a_lost_shared_tensor_is_named(lost):
    with pytest.raises(FormatError, match=rf"did not fill {lost}.*vllm-qoq verify"):
        loaded({lost: None})


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_a_shared_tensor_that_is_not_finite_is_named(name, value):
    with pytest.raises(FormatError, match=rf"^{name} holds NaN or infinity.*vllm-qoq verify"):
        loaded(with_value(name, 3, value))


@pytest.mark.parametrize("shape", [(9,), (8, 8), ()])
def test_a_shared_tensor_of_another_shape_is_named(shape):
    with pytest.raises(FormatError, match=r"^block\.norm\.weight has shape .* and \[8\] in"):
        loaded({"block.norm.weight": torch.ones(shape)})


def test_integers_are_no_norm():
    with pytest.raises(FormatError, match=r"^block\.norm\.weight .*torch\.int8"):
        loaded({"block.norm.weight": torch.ones(8, dtype=torch.int8)})


@pytest.mark.parametrize("leaf", ["w8a8.block.k_proj.weight", "w4a16.block.down_proj.weight_scale"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[:-1],
        lambda t: t[:, :-1],
        lambda t: torch.cat([t, t]),
        lambda t: torch.cat([t, t], 1),
        lambda t: t[0],
        lambda t: t.float() if t.dtype == torch.int8 else t.to(torch.int8),
    ],
    ids=["row-less", "column-less", "rows-twice", "columns-twice", "vector", "other-kind"],
)
def test_a_tensor_of_a_set_that_does_not_fit_is_named(leaf, change):
    tensors = stored(8, "w8a8.") | stored(4, "w4a16.")
    with pytest.raises(FormatError, match=rf"proj: {leaf} is torch\.\w+ \[.*vllm-qoq verify"):
        loaded({leaf: change(tensors[leaf]).contiguous()})


@pytest.mark.parametrize("set_name", ["w8a8", "w4a16"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (NAN, "NaN or infinity"),
        (INFINITY, "NaN or infinity"),
        (0.0, "a scale that is not positive"),
        (-0.5, "a scale that is not positive"),
    ],
)
def test_a_scale_of_a_set_is_named(set_name, value, message):
    change = with_value(f"{set_name}.block.k_proj.weight_scale", 5, value)
    with pytest.raises(
        FormatError, match=rf"qkv_proj: weight_scale of set '{set_name}' holds {message}"
    ):
        loaded(change)


EXPERT = f"{PREFIX}.2.up_proj.weight"


def loaded_experts(change, rank=0, size=1, is_expert_parallel=False, **unpadded):
    """Experts that no set quantizes; `change` gets what the checkpoint has and gives what is left.

    The memory of a real model holds what was there before. `unpadded` are sizes of the model where
    vLLM's are larger.
    """
    unquantized = scheme(8) | {"ignore": ["re:.*experts.*"]}
    weights = {
        f"{PREFIX}.{expert}.{projection}.weight": torch.randn(shape).bfloat16()
        for expert in range(EXPERTS)
        for projection, shape in SHAPES.items()
    }
    with rank_of(rank, size, is_expert_parallel):
        model = routed(size, sets={"w8a8": unquantized, "w4a16": unquantized})
        vars(model.experts.moe_config).update(unpadded)
        for parameter in model.parameters():
            parameter.data.fill_(7)
        load_experts(model, change(weights))
        model.quant_method.process_weights_after_loading(model)
        return model.experts


@pytest.mark.parametrize("is_expert_parallel", [False, True], ids=["tensor", "expert"])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_experts_that_all_sets_share_are_accounted_for(rank, size, is_expert_parallel):
    where = {"rank": rank, "size": size, "is_expert_parallel": is_expert_parallel}
    experts = loaded_experts(dict, **where)
    assert all(parameter.isfinite().all() for parameter in experts.parameters())

    def lose(weights):
        return {name: tensor for name, tensor in weights.items() if name != EXPERT}

    if is_expert_parallel and size == 2 and rank == 0:
        loaded_experts(lose, **where)  # the expert is another rank's
        return
    with pytest.raises(FormatError, match=rf"did not fill {EXPERT}:.*vllm-qoq verify"):
        loaded_experts(lose, **where)


@pytest.mark.parametrize("size", [1, 2])
def test_half_an_expert_that_all_sets_share_is_named(size):
    def halve(weights):
        return weights | {EXPERT: weights[EXPERT][: len(weights[EXPERT]) // 2]}

    with pytest.raises(FormatError, match=rf"^{EXPERT} .*filled in part"):
        loaded_experts(halve, size=size)


def test_padding_of_experts_that_all_sets_share_is_left_alone():
    def cut(weights):
        return {
            name: (t[:200, :192] if "down" in name else t[:192, :200]).neg().contiguous()
            for name, t in weights.items()
        }

    sizes = {"hidden_dim_unpadded": 200, "intermediate_size_per_partition_unpadded": 192}
    experts = loaded_experts(cut, **sizes)
    assert (experts.w13_weight[:, 192:256] == 7).all() and (experts.w2_weight[:, 200:] == 7).all()
    with pytest.raises(FormatError, match=rf"did not fill {EXPERT}"):
        loaded_experts(
            lambda weights: cut(weights | {EXPERT: torch.full((256, 256), NAN)}), **sizes
        )


def test_what_a_router_keeps_on_the_layer_of_experts_is_none_of_theirs():
    def unquantized(**more):
        quant_config = scheme(8) | {"ignore": ["re:.*experts.*"]}
        return Experts(qoq_config(sets={"w8a8": quant_config, "w4a16": quant_config}), 1, **more)

    bias = torch.nn.Parameter(torch.zeros(EXPERTS))
    with rank_of(0, 1):
        model = unquantized(e_score_correction_bias=bias)
        assert "e_score_correction_bias" in dict(model.experts.named_parameters())
        load_experts(model, {f"{PREFIX}.0.up_proj.weight": torch.ones(256, 256)})
        assert torch.equal(bias, torch.zeros(EXPERTS)) and not hasattr(bias, "weight_loader")


def test_an_expert_that_all_sets_share_and_that_is_not_finite_is_named():
    def spoil(weights):
        weights[EXPERT][3, 5] = NAN
        return weights

    with pytest.raises(FormatError, match=rf"^{EXPERT} holds NaN"):
        loaded_experts(spoil)


@pytest.mark.parametrize(
    ("change", "what"), [(lambda t: t.repeat(2, 1), r"\[512, 256\]"), (torch.Tensor.char, "int8")]
)
def test_an_expert_that_all_sets_share_and_that_does_not_fit_is_named(change, what):
    with pytest.raises(FormatError, match=rf"^{EXPERT} .*{what}.*vllm-qoq verify"):
        loaded_experts(lambda weights: weights | {EXPERT: change(weights[EXPERT])})


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_an_engine_does_not_start_without_a_norm(nested_dir, tmp_path, lost):
    folder = shutil.copytree(nested_dir, tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=f"did not fill {lost}"):
        engine(folder)


@pytest.mark.parametrize("checkpoint", ["nested_dir", "w4a8_per_channel_dir", "two_sets_dir"])
def test_weights_are_loaded_anew_into_an_engine(request, checkpoint):
    llm = engine(request.getfixturevalue(checkpoint))
    before = generate(llm)
    for _ in range(2):
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        assert generate(llm) == before

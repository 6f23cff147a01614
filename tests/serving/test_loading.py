"""Loading through vLLM's own loaders, at a mocked tensor-parallel size.

The oracle is vLLM itself: the same tensors loaded into a layer of the in-tree
config, at the same rank. Each set's parameters have to be equal to that.
"""

from types import SimpleNamespace

import pytest
import torch
from loaded_layers import BF16, Block, load, stored
from plugin_units import (
    HEAD,
    HEADS,
    HIDDEN,
    in_tree_config,
    qoq_config,
    scheme,
    tensor_parallel,
    vllm_config,
)
from vllm.model_executor.layers.linear import (
    RowParallelLinear,
)

from vllm_qoq.errors import FormatError, UserError
from vllm_qoq.routing.table import RoutingError

SETS = {"w8a8": 8, "w4a16": 4}


def linears(model):
    return {
        name: getattr(model.block, name)
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "column", "replicated")
    }


def check_loaded(model):
    for layer in linears(model).values():
        for name in layer.quant_method.sets:
            getattr(layer, name).check_loaded(layer.prefix, layer.quant_method.parts)


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_every_set_gets_the_slices_that_vllm_loads(rank, size):
    config = vllm_config()
    with tensor_parallel(rank, size, config):
        routed = Block(qoq_config())
        load(routed, stored(8, "w8a8.") | stored(4, "w4a16."))
        check_loaded(routed)
    for name, bits in SETS.items():
        with tensor_parallel(rank, size, vllm_config()):
            single = Block(in_tree_config(bits))
            load(single, stored(bits))
        for layer_name, layer in linears(single).items():
            ours = dict(getattr(linears(routed)[layer_name], name).named_parameters())
            for leaf, parameter in layer.named_parameters():
                assert torch.equal(ours[leaf], parameter), f"{name} {layer_name} {leaf}"


@pytest.mark.parametrize("rank", [0, 1])
def test_each_set_has_its_own_bias(rank):
    with tensor_parallel(rank, 2, vllm_config()):
        model = Block(qoq_config(), bias=True)
        weights = stored(8, "w8a8.", bias=True) | stored(4, "w4a16.", bias=True)
        load(model, weights)
        check_loaded(model)
    for name in SETS:
        up, gate = (weights[f"{name}.block.{part}_proj.bias"] for part in ("up", "gate"))
        rows = slice(256 * rank, 256 * (rank + 1))
        expected = torch.cat([gate[rows], up[rows]])
        assert torch.equal(getattr(model.block.gate_up_proj, name).bias, expected)
        whole = weights[f"{name}.block.down_proj.bias"]
        assert torch.equal(getattr(model.block.down_proj, name).bias, whole)


@pytest.mark.parametrize(
    "lost",
    [
        "w8a8.block.k_proj.weight",
        "w4a16.block.v_proj.weight_scale",
        "w4a16.block.down_proj.weight_packed",
        "w8a8.block.up_proj.weight_scale",
        "w8a8.block.replicated.weight",
    ],
)
def test_a_lost_tensor_is_named(lost):
    with tensor_parallel(0, 2, vllm_config()):
        model = Block(qoq_config())
        weights = stored(8, "w8a8.") | stored(4, "w4a16.")
        del weights[lost]
        load(model, weights)
        with pytest.raises(FormatError, match=lost.replace(".", r"\.") + r" \(1 tensors"):
            check_loaded(model)


def test_a_zero_bias_of_a_layer_without_one_is_ignored_and_another_is_refused():
    for value in (0, 1):
        with tensor_parallel(0, 1, vllm_config()):
            model = Block(qoq_config())
            bias = {"w8a8.block.q_proj.bias": torch.full((HEADS * HEAD,), float(value))}
            weights = stored(8, "w8a8.") | stored(4, "w4a16.") | bias
            if value:
                with pytest.raises(FormatError, match="bias"):
                    load(model, weights)
            else:
                load(model, weights)


def test_input_ratio_is_loaded_once_per_fused_layer_and_sliced_for_row_parallel():
    layers = ["block.[qkv]_proj", "block.down_proj"]
    ratio = {
        f"w4a16.block.{part}_proj.input_ratio": torch.arange(1, HIDDEN + 1) / 7
        for part in ("q", "k", "v")
    }
    ratio["w4a16.block.down_proj.input_ratio"] = torch.arange(1, 513) / 7
    weights = stored(8, "w8a8.") | stored(4, "w4a16.") | ratio

    def block():
        return Block(qoq_config(input_ratio={"w4a16": layers}))

    with tensor_parallel(1, 2, vllm_config()):
        model = block()
        load(model, weights)
        check_loaded(model)
    assert torch.equal(model.block.qkv_proj.w4a16.input_ratio, torch.arange(1, 257) / 7)
    assert torch.equal(model.block.down_proj.w4a16.input_ratio, torch.arange(257, 513) / 7)
    assert model.block.qkv_proj.w8a8.input_ratio is None

    differing = weights | {"w4a16.block.k_proj.input_ratio": torch.ones(HIDDEN)}
    with (
        tensor_parallel(1, 2, vllm_config()),
        pytest.raises(FormatError, match=r"qkv_proj.*differ"),
    ):
        load(block(), differing)

    del weights["w4a16.block.k_proj.input_ratio"]
    with tensor_parallel(1, 2, vllm_config()):
        model = block()
        load(model, weights)
        with pytest.raises(FormatError, match=r"w4a16\.block\.k_proj\.input_ratio"):
            check_loaded(model)


def test_input_ratio_on_part_of_a_fused_layer_is_refused():
    with tensor_parallel(0, 1, vllm_config()), pytest.raises(FormatError, match="q_proj but not"):
        Block(qoq_config(input_ratio={"w4a16": ["block.q_proj"]}))


def test_only_reachable_sets_are_created_and_the_others_are_not_read():
    config = vllm_config(additional_config={"qoq": {"force_set": "w4a16"}})
    with tensor_parallel(0, 1, config):
        model = Block(qoq_config())
        load(model, stored(8, "w8a8.") | stored(4, "w4a16."))
        check_loaded(model)
    assert {name.split(".")[2] for name, _ in model.named_parameters()} == {"w4a16"}


def test_a_set_that_leaves_a_layer_unquantized_keeps_its_own_weight():
    sets = {"w8a8": scheme(8), "w4a16": scheme(4) | {"ignore": ["lm_head", "block.down_proj"]}}
    weights = stored(8, "w8a8.") | stored(4, "w4a16.")
    for leaf in ("weight_packed", "weight_scale", "weight_shape"):
        del weights[f"w4a16.block.down_proj.{leaf}"]
    weights["w4a16.block.down_proj.weight"] = torch.randn(HIDDEN, 512).bfloat16()
    with tensor_parallel(1, 2, vllm_config()):
        model = Block(qoq_config(sets=sets))
        load(model, weights)
        check_loaded(model)
    expected = weights["w4a16.block.down_proj.weight"][:, 256:]
    assert torch.equal(model.block.down_proj.w4a16.weight, expected)


def test_a_layer_that_no_set_quantizes_is_vllms_own():
    ignore = ["lm_head", "block.column"]
    sets = {name: scheme(bits) | {"ignore": ignore} for name, bits in SETS.items()}
    with tensor_parallel(0, 1, vllm_config()):
        model = Block(qoq_config(sets=sets))
    assert [name for name, _ in model.block.column.named_parameters()] == ["weight"]


def test_a_size_that_does_not_divide_is_refused_with_layer_set_and_remedy():
    with (
        tensor_parallel(0, 8, vllm_config()),
        pytest.raises(FormatError, match=r"block\.row, set 'w4a16'.*--tensor-parallel-size"),
    ):
        RowParallelLinear(
            HIDDEN, HIDDEN, bias=False, prefix="block.row", quant_config=qoq_config(), **BF16
        )


def test_a_layer_rule_that_matches_nothing_is_refused():
    routing = {
        "prefill": "w8a8",
        "decode": "w8a8",
        "layers": [{"match": "blok.*", "decode": "w4a16"}],
    }
    with tensor_parallel(0, 1, vllm_config()):
        config = qoq_config(routing=routing)
        Block(config)
        with pytest.raises(RoutingError, match=r"'blok\.\*'.*block\."):
            config.policy().check_rules()


def test_an_engine_refuses_adapters_in_another_basis_too():
    config = vllm_config()
    config.lora_config = SimpleNamespace()
    config.model_config = SimpleNamespace(architectures=["LlamaForCausalLM"], model="MODEL")
    with tensor_parallel(0, 1, config), pytest.raises(UserError, match=r"MODEL -o CONV.*converted"):
        Block(qoq_config(stream={"rotation": "unknown"}))


def test_a_quantized_lm_head_is_refused():
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    group = scheme(8)["config_groups"]["group_0"]
    head = {"config_groups": {"group_0": group | {"targets": ["re:.*lm_head"]}}, "ignore": []}
    sets = {"w8a8": scheme(8), "w4a16": scheme(8) | head}
    with tensor_parallel(0, 1, vllm_config()):
        config = qoq_config(sets=sets)
        layer = ParallelLMHead.__new__(ParallelLMHead)
        torch.nn.Module.__init__(layer)
        with pytest.raises(FormatError, match=r"lm_head.*'w4a16'"):
            config.get_quant_method(layer, "lm_head")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"force_set": "w9"}, "force_set is 'w9'.*w8a8, w4a16"),
        ({"forced": "w8a8"}, "additional-config: qoq: there is no option 'forced'"),
        ({"routing": {"prefill": "w8a8"}}, "routing.decode"),
        ({"force_set": "w8a8", "routing": {"prefill": "w8a8", "decode": "w8a8"}}, "not both"),
    ],
)
def test_bad_options_are_refused_with_the_key(options, message):
    config = vllm_config(additional_config={"qoq": options})
    with tensor_parallel(0, 1, config), pytest.raises(RoutingError, match=message):
        Block(qoq_config())

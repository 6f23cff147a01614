"""Loading experts through vLLM's own loaders, at a mocked rank; the oracle is vLLM itself."""

from types import SimpleNamespace

import pytest
import torch
from expert_layers import EXPERTS, INNER, PREFIX, Block, load, rank_of, routed, single, stored
from plugin_units import ROUTING, qoq_config, scheme
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.warmup import deep_gemm_warmup

from vllm_qoq.errors import FormatError, UserError
from vllm_qoq.numerics import EXPERT_MULTIPLE
from vllm_qoq.routing.table import RoutingError
from vllm_qoq.serving.methods.qoq_experts import QoQExpertsMethod
from vllm_qoq.serving.methods.routed_experts import FlexMoEMethod, _check_parallel

SETS = {"w8a8": 8, "w4a16": 4}
WHOLE = stored(8, "w8a8.") | stored(4, "w4a16.")
FLOAT = scheme(8) | {"ignore": ["re:.*experts.*"]}

# vLLM's kernels for W8A8 may ask for other things than ours, depending on the version.
QOQ = {
    "w8a8": {"quant_method": "qoq_linear", "ignore": ["lm_head"], "group_size": -1},
    "w4a16": {"quant_method": "qoq_linear", "ignore": ["lm_head"]},
}


def check_loaded(model):
    method = model.experts.quant_method
    for name in method.sets:
        method.experts(name).check_loaded(PREFIX)
        method.experts(name).check_values(PREFIX)


@pytest.mark.parametrize("is_expert_parallel", [False, True], ids=["tensor", "expert"])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_every_set_gets_the_slices_that_vllm_loads(rank, size, is_expert_parallel):
    with rank_of(rank, size, is_expert_parallel):
        model = routed(size)
        load(model, WHOLE)
        check_loaded(model)
    for name, bits in SETS.items():
        with rank_of(rank, size, is_expert_parallel):
            alone = single(bits, size)
            load(alone, stored(bits))
        ours = dict(getattr(model.experts, name).named_parameters())
        theirs = dict(alone.experts.named_parameters())
        assert ours.keys() == theirs.keys()
        for leaf, parameter in theirs.items():
            if "g_idx" not in leaf:  # vLLM 0.26 leaves it as it was in memory, and does without
                assert torch.equal(ours[leaf], parameter), f"{name} {leaf}"


@pytest.mark.parametrize(
    "lost",
    [
        f"w8a8.{PREFIX}.0.gate_proj.weight",
        f"w8a8.{PREFIX}.3.down_proj.weight_scale",
        f"w4a16.{PREFIX}.2.up_proj.weight_packed",
        f"w4a16.{PREFIX}.1.down_proj.weight_scale",
        f"w4a16.{PREFIX}.3.gate_proj.weight_shape",
    ],
)
def test_a_lost_tensor_is_named(lost):
    with rank_of(0, 1):
        model = routed()
        load(model, {name: tensor for name, tensor in WHOLE.items() if name != lost})
        with pytest.raises(FormatError, match=lost.replace(".", r"\.") + r" \(1 tensors"):
            check_loaded(model)


def test_a_rank_misses_its_own_experts_only():
    lost = f"w8a8.{PREFIX}.{EXPERTS - 1}.up_proj.weight"
    weights = {name: tensor for name, tensor in WHOLE.items() if name != lost}
    for rank in (0, 1):
        with rank_of(rank, 2, is_expert_parallel=True):
            model = routed(2)
            load(model, weights)
            if rank == 0:
                check_loaded(model)
                continue
            with pytest.raises(FormatError, match=lost.replace(".", r"\.")):
                check_loaded(model)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"w8a8.{PREFIX}.1.up_proj.weight", lambda tensor: tensor[:128]),
        (f"w8a8.{PREFIX}.1.up_proj.weight", lambda tensor: tensor.bfloat16()),
        (f"w8a8.{PREFIX}.2.down_proj.weight_scale", lambda tensor: tensor[:7]),
        (f"w4a16.{PREFIX}.0.down_proj.weight_packed", lambda tensor: tensor[:, :3]),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name, change):
    with rank_of(0, 1), pytest.raises(FormatError, match=name.replace(".", r"\.")):
        load(routed(), WHOLE | {name: change(WHOLE[name]).contiguous()})


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("name", "dim"),
    [
        (f"w8a8.{PREFIX}.1.up_proj.weight", 0),
        (f"w8a8.{PREFIX}.1.gate_proj.weight", 1),
        (f"w8a8.{PREFIX}.0.down_proj.weight", 1),
        (f"w8a8.{PREFIX}.3.up_proj.weight_scale", 0),
        (f"w8a8.{PREFIX}.3.down_proj.weight_scale", 0),
        (f"w4a16.{PREFIX}.2.down_proj.weight_packed", 1),
        (f"w4a16.{PREFIX}.2.down_proj.weight_scale", 1),
    ],
)
def test_half_a_tensor_does_not_pass_for_the_slice_of_a_rank(name, dim, rank):
    half = WHOLE[name].narrow(dim, 0, WHOLE[name].shape[dim] // 2).contiguous()
    with rank_of(rank, 2), pytest.raises(FormatError, match=name.replace(".", r"\.")):
        load(routed(2), WHOLE | {name: half})


@pytest.mark.parametrize(("value", "what"), [(0, "not positive"), (float("nan"), "NaN")])
def test_a_scale_that_cannot_be_is_found(value, what):
    name = f"w8a8.{PREFIX}.1.up_proj.weight_scale"
    with rank_of(0, 1):
        model = routed()
        load(model, WHOLE | {name: torch.full_like(WHOLE[name], value)})
        with pytest.raises(FormatError, match=rf"w13_weight_scale of set 'w8a8' holds .*{what}"):
            check_loaded(model)


def test_a_tensor_without_a_set_is_refused():
    with rank_of(0, 1), pytest.raises(FormatError, match=r"0\.gate_proj\.weight.*once for each"):
        load(routed(), stored(8))


def test_sets_out_of_reach_are_not_loaded():
    only = {"routing": {"prefill": "w8a8", "decode": "w8a8"}}
    with rank_of(0, 1):
        model = routed(**only)
        load(model, WHOLE)
        check_loaded(model)
        assert not hasattr(model.experts, "w4a16")


def test_a_layer_rule_keeps_experts_out_of_a_set():
    rules = ROUTING | {"layers": [{"match": PREFIX, "decode": "w8a8"}]}
    with rank_of(0, 1):
        model = routed(routing=rules)
        load(model, WHOLE)
        check_loaded(model)
        assert list(model.experts.quant_method.sets) == ["w8a8"]
        model.experts.quant_method.policy.check_rules()
    with rank_of(0, 1):
        other = ROUTING | {"layers": [{"match": f"{PREFIX}.0.*", "decode": "w8a8"}]}
        with pytest.raises(RoutingError, match=r"experts\.0\.\*' matches no quantized layer"):
            routed(routing=other).experts.quant_method.policy.check_rules()


def test_experts_that_no_set_quantizes_are_shared_unless_the_section_lists_them():
    sets = {"w8a8": FLOAT, "w4a16": FLOAT}
    with rank_of(0, 1):
        shared = routed(sets=sets)
        assert type(shared.experts.quant_method) is UnquantizedFusedMoEMethod
    with rank_of(0, 1):
        own = routed(sets=sets, float_experts=["*.experts"])
        assert isinstance(own.experts.quant_method, FlexMoEMethod)


def test_a_set_may_leave_experts_in_float():
    floats = {
        f"w8a8.{name.rpartition('.')[0]}.weight": torch.randn(tensor.shape).bfloat16()
        for name, tensor in stored(8).items()
        if name.endswith("weight")
    }
    refused = {"w8a8": FLOAT, "w4a16": scheme(4)}
    with rank_of(0, 1):
        method = routed(sets=refused, routing={"prefill": "w8a8", "decode": "w8a8"})
        load(method, floats | stored(4, "w4a16."))
        check_loaded(method)
        assert "w8a8" in dict(method.experts.named_children())


def test_warm_up_runs_compute_with_every_set_and_steps_with_one():
    def chosen(metadata, mode=CUDAGraphMode.NONE):
        facts = {"attn_metadata": metadata, "cudagraph_runtime_mode": mode}
        context = SimpleNamespace(**facts, additional_kwargs={})
        return [experts.set_name for experts in method._choose(context, 3)[0]]

    with rank_of(0, 1):
        method = routed().experts.quant_method
        assert chosen(None) == ["w8a8", "w4a16"]
        assert chosen({"layer": SimpleNamespace(max_query_len=1)}) == ["w4a16"]
        assert chosen({"layer": SimpleNamespace(max_query_len=3)}) == ["w8a8"]


def test_experts_of_an_engine_that_serves_are_not_loaded_anew():
    with rank_of(0, 1):
        model = routed()
        model.experts.quant_method._is_finished = True
        with pytest.raises(UserError, match="start the engine again"):
            load(model, WHOLE)


def test_experts_that_move_between_ranks_are_refused():
    with (
        rank_of(0, 2, is_expert_parallel=True, has_eplb=True),
        pytest.raises(UserError, match="start without --enable-eplb"),
    ):
        routed(2)


def test_engines_that_share_experts_run_one_set():
    parallel = SimpleNamespace(enable_eplb=False, dp_size=2)
    layer = SimpleNamespace(moe_config=SimpleNamespace(moe_parallel_config=parallel))
    with pytest.raises(UserError, match="--data-parallel-size 2"):
        FlexMoEMethod(layer, PREFIX, {}, None, SimpleNamespace(reachable=lambda _: SETS))


def test_engines_that_share_experts_run_a_nested_set_with_its_base():
    parallel = SimpleNamespace(enable_eplb=False, dp_size=2)
    layer = SimpleNamespace(moe_config=SimpleNamespace(moe_parallel_config=parallel))
    _check_parallel(layer, PREFIX, ["w8a8"])  # the base is loaded, and no step runs in it


def test_sets_that_answer_the_runner_differently_are_refused(monkeypatch):
    with rank_of(0, 1):
        method = routed().experts.quant_method
        for name, what, values in (
            ("is_monolithic", "choose the experts", (True, False)),
            ("has_unpadded_output", "outputs without padding", (False, True)),
            ("topk_indices_dtype", "experts' numbers", (None, torch.int64)),
        ):
            for choice, value in zip(method.sets.values(), values, strict=True):
                monkeypatch.setattr(type(choice.method), name, value)
            with pytest.raises(FormatError, match=f"'w8a8' and 'w4a16' .*{what}.*force_set"):
                method._check_alike()
            monkeypatch.undo()
            method._check_alike()


def test_a_method_that_vllm_refuses_is_named_with_its_set():
    sets = {"w8a8": scheme(8), "w4a16": scheme(4, num_bits=3)}
    with rank_of(0, 1):
        with pytest.raises(FormatError, match=rf"{PREFIX}: .*experts of set 'w4a16'.*force_set"):
            routed(sets=sets)
        model = routed(sets=sets, routing={"prefill": "w8a8", "decode": "w8a8"})
        assert list(model.experts.quant_method.sets) == ["w8a8"]


@pytest.mark.parametrize("size", [2, 4])
def test_slices_that_qoq_experts_cannot_have_are_refused_with_a_remedy(size):
    with rank_of(0, size):
        if INNER // size % EXPERT_MULTIPLE == 0:
            routed(size, sets=QOQ)
            return
        words = rf"^{PREFIX}: moe_intermediate_size is 64 on each of 4 .*--enable-expert-parallel"
        with pytest.raises(FormatError, match=words):
            routed(size, sets=QOQ)


@pytest.mark.parametrize("key", ["swiglu_limit", "swiglu_alpha", "swiglu_beta"])
def test_an_activation_that_qoq_experts_do_not_compute_is_refused(key):
    with rank_of(0, 1), pytest.raises(FormatError, match=rf"activation has {key} 7\.0.*`ignore`"):
        Block(qoq_config(sets=QOQ), 1, **{key: 7.0})


def test_a_set_that_changes_the_sizes_of_the_layer_is_refused(monkeypatch):
    fp8 = pytest.importorskip("vllm.model_executor.layers.fused_moe.oracle.fp8")
    if not hasattr(fp8, "pad_tp_shard_to_weight_blocks"):
        pytest.skip("this vLLM does not fill slices up to whole blocks")
    ask = CompressedTensorsConfig.get_quant_method

    def padding(config, layer, prefix):
        if config.quant_format == "pack-quantized":
            fp8.pad_tp_shard_to_weight_blocks(layer.moe_config, [256, 256])
        return ask(config, layer, prefix)

    monkeypatch.setattr(CompressedTensorsConfig, "get_quant_method", padding)
    with rank_of(0, 2):
        with pytest.raises(FormatError, match=rf"{PREFIX}: .*'w4a16'.*without --moe-backend"):
            routed(2)
        only = routed(2, routing={"prefill": "w8a8", "decode": "w8a8"})
        assert only.experts.intermediate_size_per_partition == INNER // 2
        load(only, WHOLE)
        check_loaded(only)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("no kernels")])
def test_what_is_no_refusal_is_not_called_one(error, monkeypatch):
    def fail(*_):
        raise error

    with rank_of(0, 1):
        model = routed()
        load(model, WHOLE)
        method = model.experts.quant_method
        monkeypatch.setattr(method.sets["w8a8"].method, "process_weights_after_loading", fail)
        with pytest.raises(type(error)) as raised:
            method.process_weights_after_loading(model.experts)
    assert raised.value is error


def test_a_lack_of_memory_while_loading_is_not_a_tensor_that_does_not_fit(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(RoutedExperts, "weight_loader", fail)
    with rank_of(0, 1), pytest.raises(torch.OutOfMemoryError):
        load(routed(), WHOLE)


def test_vllm_compiles_kernels_ahead_for_the_set_that_has_them(monkeypatch):
    class DeepGemm:
        """vLLM's class of kernels that it compiles ahead."""

    def finish(method, config, kernel):
        """A method that has loaded, as it would be on a GPU."""

        def process(_):
            method.moe_quant_config = config
            method.moe_kernel = SimpleNamespace(impl=SimpleNamespace(fused_experts=kernel))
            method.moe_kernel.output_is_reduced = lambda: False
            method.moe_kernel.is_monolithic = False

        monkeypatch.setattr(method, "process_weights_after_loading", process)
        monkeypatch.setattr(type(method), "topk_indices_dtype", None)
        monkeypatch.setattr(type(method), "mk_can_overlap_shared_experts", False)

    blocks = SimpleNamespace(quant_dtype=torch.float8_e4m3fn, block_shape=[128, 128])
    monkeypatch.setattr(deep_gemm_warmup, "DeepGemmExperts", DeepGemm)
    monkeypatch.setattr(
        deep_gemm_warmup, "get_mk_alignment_for_contiguous_layout", lambda: [128, 128]
    )
    with rank_of(0, 1):
        model = routed(sets={"w4a16": scheme(4), "w8a8": scheme(8)})
        load(model, WHOLE)
        method, runner = model.experts.quant_method, model.block.experts
        finish(method.sets["w4a16"].method, SimpleNamespace(block_shape=None), None)
        finish(method.sets["w8a8"].method, blocks, DeepGemm())
        assert not deep_gemm_warmup._fused_moe_grouped_gemm_may_use_deep_gemm(runner)
        method.process_weights_after_loading(model.experts)
        assert deep_gemm_warmup._fused_moe_grouped_gemm_may_use_deep_gemm(runner)
    experts = method.experts("w8a8")
    found = deep_gemm_warmup._extract_data_from_fused_moe_module(runner)[:4]
    leaves = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
    for tensor, leaf in zip(found, leaves, strict=True):
        assert tensor is getattr(experts, leaf)
    assert not hasattr(method.experts("w4a16"), "w13_weight")


def test_a_qoq_set_is_served_with_its_experts_and_without():
    qoq, sets = QOQ["w4a16"], {"w8a8": scheme(8)}
    with rank_of(0, 1):
        method = routed(sets=QOQ).experts.quant_method
        assert isinstance(method.experts("w4a16").method, QoQExpertsMethod)
    with rank_of(0, 1):
        with pytest.raises(FormatError, match=r"experts in groups of 64 \(it does -1 and 128\)"):
            routed(sets=sets | {"w4a16": qoq | {"group_size": 64}})
        ignoring = sets | {"w4a16": qoq | {"ignore": ["*.experts.*"]}, "w8a8": FLOAT}
        model = routed(sets=ignoring, float_experts=["*.experts"])
        assert isinstance(model.experts.quant_method, FlexMoEMethod)

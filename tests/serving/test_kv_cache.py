"""Turning the quantized KV cache on: config, the swap of real attention layers, refusals, pages.

Also run against the sources of the oldest and the newest vLLM (tests/serving/test_vllm_sources.py).
"""

import pickle
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from conftest import DATA
from plugin_units import section, tensor_parallel, vllm_config
from vllm.config import ModelConfig, SpeculativeConfig
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
    compute_nixl_compatibility_hash,
)
from vllm.model_executor.layers.attention import Attention, EncoderOnlyAttention, MLAAttention
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.platforms.interface import Platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_qoq.checkpoint.format import KVSection, Section
from vllm_qoq.checkpoint.kv_config import KVCache
from vllm_qoq.errors import FormatError, UserError
from vllm_qoq.numerics.kv_layout import slot_bytes
from vllm_qoq.serving.kv.backend import PREFERRED_BLOCK_SIZE, QuantizedKVBackend, head_pages
from vllm_qoq.serving.kv.cache import backend_name
from vllm_qoq.serving.kv.cpu import CPUK8V4Backend, CPUKV4Backend, CPUKV8Backend
from vllm_qoq.serving.plugin.config import QoQConfig
from vllm_qoq.serving.vllm_versions import backends_size_pages

KV4 = {"bits": 4}
RULED = {"bits": 4, "layers": [{"match": "model.layers.0.*", "bits": 16}], "hadamard": True}
TINY_MODEL = DATA / "tiny-llama"
HEAD, KV_HEADS, BLOCK = 128, 2, 32


@pytest.fixture(scope="module")
def model_config():
    """What attention layers and backends ask a model's config for, from a real one."""
    return ModelConfig(str(TINY_MODEL), max_model_len=512)


@pytest.fixture
def engine_config(model_config):
    """A config with --additional-config and a block size, as vLLM has when it builds layers."""

    def make(qoq=None, **cache):
        config = vllm_config(additional_config={"qoq": qoq} if qoq else {})
        config.model_config = model_config
        config.cache_config.block_size = BLOCK
        config.scheduler_config.disable_hybrid_kv_cache_manager = False
        for key, value in cache.items():
            setattr(config.cache_config, key, value)
        return config

    return make


def kv_config(kv_cache):
    return QoQConfig.from_config({"quant_method": "qoq", "kv_cache": kv_cache})


def attention(quant_config, config, index=0, layer_class=Attention, **changes):
    """An attention layer of a model, made as vLLM makes it."""
    options = {"num_heads": 4, "head_size": HEAD, "scale": 0.1, "num_kv_heads": KV_HEADS} | changes
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with tensor_parallel(0, 1, config):
            return layer_class(
                **options,
                cache_config=config.cache_config,
                quant_config=quant_config,
                prefix=f"model.layers.{index}.self_attn.attn",
            )
    finally:
        torch.set_default_dtype(default)


def spec_of(layer, config):
    """The layer's spec as the runner gets it, whoever sizes the pages in this vLLM."""
    spec = layer.get_kv_cache_spec(config)
    if backends_size_pages():
        from vllm.v1.worker.utils import customize_attention_spec

        return customize_attention_spec(layer.get_attn_backend(), spec)
    return spec


def test_the_section_keeps_what_it_says_of_the_cache():
    assert Section.parse(section(kv_cache=RULED)).to_json()["kv_cache"] == RULED
    assert Section.parse(section(kv_cache=KV4)).to_json()["kv_cache"] == KV4
    assert KVSection.parse({"quant_method": "qoq", "kv_cache": RULED}).kv_cache.hadamard


@pytest.mark.parametrize(
    ("kv_cache", "named"),
    [
        ({"bits": 5}, "kv_cache.bits"),
        ({"bits": "k4v8"}, "kv_cache.bits.*4, 8, 16 or 'k8v4'"),
        ({"bits": 4, "group": 64}, "kv_cache.group"),
        ({}, "kv_cache.bits"),
        ({"bits": 4, "layers": [{"match": "*"}]}, "kv_cache.layers.0.bits"),
        ({"bits": 4, "layers": [{"match": "*", "bits": 8, "k": 4}]}, "kv_cache.layers.0.k"),
    ],
)
def test_a_wrong_key_is_named(kv_cache, named):
    with pytest.raises(FormatError, match=named):
        Section.parse(section(kv_cache=kv_cache))
    with pytest.raises(FormatError, match=named):
        kv_config(kv_cache)


def test_what_layers_can_be_in_is_said_the_smallest_first():
    rules = [{"match": "a", "bits": bits} for bits in (8, 16, "k8v4")]
    assert KVCache.model_validate({"bits": 4, "layers": rules}).all_bits() == "4,k8v4,8,16"
    assert KVCache(bits="k8v4").all_bits() == "k8v4"


def test_the_first_rule_that_matches_decides():
    rules = [{"match": "*.1.*", "bits": 8}, {"match": "model.*", "bits": 16}]
    kv_cache = KVCache.model_validate({"bits": 4, "layers": rules})
    assert [kv_cache.bits_of(name) for name in ("model.1.attn", "model.2.attn", "x")] == [8, 16, 4]
    assert kv_cache.unmatched(["model.2.attn"]) == ["*.1.*"]


@pytest.mark.parametrize(
    ("bits", "backend"), [(4, CPUKV4Backend), (8, CPUKV8Backend), ("k8v4", CPUK8V4Backend)]
)
def test_a_layer_gets_the_backend_and_the_pages_of_its_bits(engine_config, bits, backend):
    config, quant_config = engine_config(), kv_config({"bits": bits})
    layer = attention(quant_config, config)
    assert issubclass(layer.attn_backend, backend)
    assert layer.attn_backend.full_cls_name() == backend.full_cls_name()
    assert layer.backend is AttentionBackendEnum.CUSTOM
    assert isinstance(layer.impl, backend.get_impl_cls()) and layer.impl.bits == bits
    assert layer.impl.scale == 0.1 and layer.impl.sliding_window is None
    spec = spec_of(layer, config)
    assert isinstance(spec, FullAttentionSpec)
    assert spec.page_size_bytes == BLOCK * KV_HEADS * slot_bytes(HEAD, bits)
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_asking_again_changes_nothing(engine_config):
    config, quant_config = engine_config(), kv_config(KV4)
    layer = attention(quant_config, config)
    impl = layer.impl
    assert quant_config.get_quant_method(layer, layer.layer_name) is None
    layer.process_weights_after_loading(torch.bfloat16)
    assert layer.impl is impl


def test_a_quarter_of_the_bytes(engine_config):
    config = engine_config()
    kv4, plain = (
        attention(quant_config, config, index)
        for index, quant_config in enumerate([kv_config(KV4), None])
    )
    ratio = spec_of(plain, config).page_size_bytes / spec_of(kv4, config).page_size_bytes
    assert ratio == pytest.approx(512 / 136)


def test_a_window_keeps_its_kind_of_spec_and_small_pages(engine_config):
    config = engine_config()
    layer = attention(kv_config(KV4), config, per_layer_sliding_window=48)
    spec = spec_of(layer, config)
    assert isinstance(spec, SlidingWindowSpec) and spec.sliding_window == 48
    assert spec.page_size_bytes == spec.block_size * KV_HEADS * slot_bytes(HEAD, 4)
    assert layer.impl.sliding_window == 48


@pytest.mark.parametrize("is_hybrid_manager_off", [False, True])
def test_vllm_groups_windows_and_full_attention_in_small_pages(
    engine_config, is_hybrid_manager_off
):
    config, quant_config = engine_config(), kv_config(KV4)
    config.scheduler_config.disable_hybrid_kv_cache_manager = is_hybrid_manager_off
    layers = [
        attention(quant_config, config, index, per_layer_sliding_window=window)
        for index, window in enumerate([None, 48, None, 48])
    ]
    specs = {layer.layer_name: spec_of(layer, config) for layer in layers}
    groups = groups_of(config, specs)
    assert sum(len(group.layer_names) for group in groups) == 4
    assert len(groups) == (1 if is_hybrid_manager_off else 2)
    for group in groups:
        tokens = group.kv_cache_spec.block_size * KV_HEADS
        assert group.kv_cache_spec.page_size_bytes == tokens * slot_bytes(HEAD, 4)


def test_vllm_groups_layers_of_different_bits(engine_config):
    config, quant_config = engine_config(), kv_config({**RULED, "hadamard": False})
    layers = [attention(quant_config, config, index) for index in range(3)]
    names = [layer.attn_backend.get_name() for layer in layers]
    assert names == ["CPU_ATTN", *[backend_name(quant_config.kv_cache().kv_cache)] * 2]
    specs = {layer.layer_name: spec_of(layer, config) for layer in layers}
    (group,) = groups_of(config, specs)
    expected = BLOCK * KV_HEADS * (4 * HEAD + 2 * slot_bytes(HEAD, 4))
    assert group.kv_cache_spec.page_size_bytes == expected


@pytest.mark.parametrize(
    "other",
    [
        {"bits": 8},
        {"bits": "k8v4"},
        {"bits": 16},
        {**KV4, "hadamard": True},
        {**KV4, "layers": [{"match": "model.layers.1.*", "bits": 8}]},
    ],
)
def test_nixl_refuses_a_peer_with_another_cache(engine_config, other):
    """Pages of 4 bits with and without a rotation of K are equally long."""

    def compatibility(kv_cache):
        config = engine_config()
        quant_config = kv_config(kv_cache)
        for index in range(2):
            attention(quant_config, config, index)
        # As NIXL's connector does where it registers the cache.
        first = get_current_attn_backends(config)[0].get_name()
        return compute_nixl_compatibility_hash(config, first, **options)

    asked = signature(compute_nixl_compatibility_hash).parameters
    options = {"cross_layers_blocks": False} if "cross_layers_blocks" in asked else {}  # 0.26
    assert compatibility(KV4) == compatibility(dict(KV4)) != compatibility(other)


def groups_of(config, specs):
    """How vLLM's engine core groups the layers, with the groups' pages."""
    is_moved = find_spec("vllm.v1.core.kv_cache_planning") is not None  # 0.33
    name = "vllm.v1.core.kv_cache_planning" if is_moved else "vllm.v1.core.kv_cache_utils"
    if hasattr(config.cache_config, "kv_cache_layout"):
        config.cache_config.kv_cache_layout = "LBHNC"
    return import_module(name).get_kv_cache_groups(config, specs)


def test_blocks_of_sixty_four_tokens_are_preferred_and_others_served():
    assert CPUKV4Backend.get_preferred_block_size(16) == PREFERRED_BLOCK_SIZE == 64
    assert CPUKV4Backend.get_preferred_block_size(128) == 128
    assert [CPUKV4Backend.supports_block_size(size) for size in (8, 16, 48, 24)] == [
        *(False, True, True, False)
    ]


def test_vllm_makes_blocks_of_sixty_four_tokens_on_a_gpu(engine_config):
    """Without --block-size. The CPU platform has its own rule and takes 128."""
    for is_given, expected in ((False, 64), (True, BLOCK)):
        config = engine_config(user_specified_block_size=is_given)
        attention(kv_config(KV4), config)
        Platform.update_block_size_for_backend(config)
        assert config.cache_config.block_size == expected


def test_a_head_is_contiguous_however_far_apart_blocks_are():
    shape = QuantizedKVBackend.get_kv_cache_shape.__func__(CPUKV4Backend, 3, 16, 2, 64)
    assert shape == (3, 2, 16, slot_bytes(64, 4))
    wide = torch.zeros(3, 2, 2, 16, shape[3], dtype=torch.uint8)  # another layer between blocks
    pages = head_pages(wide[:, 1])
    assert pages.shape == (3, 2, 16 * shape[3]) and pages.data_ptr() == wide[:, 1].data_ptr()
    with pytest.raises(RuntimeError, match="view"):
        head_pages(torch.zeros(3, 16, 2, shape[3]).transpose(1, 2))  # tokens before heads


def test_options_replace_the_bits_of_every_layer(engine_config):
    quant_config = kv_config(RULED)
    layer = attention(quant_config, engine_config({"kv_bits": 8}))
    assert layer.impl.bits == 8 and layer.impl.use_hadamard
    plain = attention(kv_config(KV4), engine_config({"kv_bits": 8}, cache_dtype="auto"))
    assert plain.impl.bits == 8 and not plain.impl.use_hadamard
    mixed = attention(kv_config(RULED), engine_config({"kv_bits": "k8v4"}))
    assert mixed.impl.bits == "k8v4" and mixed.impl.use_hadamard
    untouched = attention(kv_config({"bits": 16}), engine_config())
    assert untouched.attn_backend.get_name() == "CPU_ATTN"


def test_a_checkpoint_that_was_prepared_for_four_bits_can_be_served_in_sixteen(engine_config):
    for quant_config in (QoQConfig.from_config(section(kv_cache=KV4)), kv_config(KV4)):
        config = engine_config({"kv_bits": 16}, cache_dtype="bfloat16")
        assert attention(quant_config, config).attn_backend.get_name() == "CPU_ATTN"


def test_linear_layers_of_a_model_without_sets_stay_as_they_are(engine_config):
    # "calm" is what `vllm-qoq perplexity` asks of every model.
    with tensor_parallel(0, 1, engine_config({"kv_bits": 4, "force_load": "calm"})):
        quant_config = QoQConfig()
        layer = ReplicatedLinear(64, 64, quant_config=quant_config, prefix="a")
        assert isinstance(layer.quant_method, UnquantizedLinearMethod)
        assert quant_config.get_quant_method(torch.nn.Embedding(2, 2), "b") is None
    assert torch.float32 in quant_config.get_supported_act_dtypes()


@pytest.mark.parametrize(
    ("kv_cache", "options", "message"),
    [
        (None, {}, "no quantized weights.*kv_bits"),
        (KV4, {"force_set": "w8a8"}, "force_set.*no sets"),
        (KV4, {"force_load": "busy"}, "force_load.*no sets"),
        (KV4, {"kv_bits": 3}, "qoq.kv_bits"),
        (KV4, {"kv_bits": "k4v8"}, "qoq.kv_bits.*'k8v4'"),
    ],
)
def test_a_model_without_sets_has_only_its_cache_to_quantize(
    engine_config, kv_cache, options, message
):
    quant_config = QoQConfig() if kv_cache is None else kv_config(kv_cache)
    with pytest.raises(UserError, match=message):
        attention(quant_config, engine_config(options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_dtype": "bfloat16"}, "--kv-cache-dtype bfloat16; leave it out, or .*kv_bits.*16"),
        ({"block_size": 24, "user_specified_block_size": True}, "--block-size 24.*multiple of 16"),
    ],
)
def test_settings_of_the_cache_that_contradict_are_refused(engine_config, changes, message):
    with pytest.raises(UserError, match=message):
        attention(kv_config(KV4), engine_config(**changes))


def with_speculation(config, device="cuda"):
    config.device_config.device_type = device
    speculative = SpeculativeConfig.__new__(SpeculativeConfig)
    speculative.method, speculative.num_speculative_tokens = "ngram", 8
    config.speculative_config = speculative


def with_context_parallelism(config):
    config.parallel_config.decode_context_parallel_size = 2


def with_another_device(config):
    config.device_config.device_type = "xpu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_speculation, r"8 speculated tokens on a GPU.*num_speculative_tokens.* to 7 or less"),
        (with_context_parallelism, "decode-context-parallel"),
        (with_another_device, "not on xpu.*kv_bits"),
    ],
)
def test_engines_that_are_not_served_are_refused(engine_config, change, message):
    config = engine_config()
    change(config)
    with pytest.raises(UserError, match=message), tensor_parallel(0, 1, config):
        kv_config(KV4).kv_cache()


def test_a_cpu_verifies_any_number_of_tokens(engine_config):
    config = engine_config()
    with_speculation(config, "cpu")
    with tensor_parallel(0, 1, config):
        assert kv_config(KV4).kv_cache().kv_cache.bits == 4


def test_a_model_asks_for_its_own_layers_alone(engine_config):
    """The layers of a draft model are in vLLM's table, too, and those of its model are in its."""
    config, quant_config, of_draft = engine_config(), kv_config(KV4), kv_config(KV4)
    attention(quant_config, config)
    quant_config.kv_cache().check_layers()
    attention(None, config, index=1)  # a float head, which has no config
    quant_config.kv_cache().check_layers()
    attention(of_draft, config, index=2)
    of_draft.kv_cache().check_layers()
    other = kv_config(KV4)
    for index, owner in ((3, other), (4, None)):
        attention(owner, config, index=index)
    with pytest.raises(UserError, match=r"layers\.4.*does not offer its attention"):
        other.kv_cache().check_layers()


def test_hybrid_models_need_a_vllm_whose_backends_size_pages(engine_config):
    config = engine_config()
    config.model_config = SimpleNamespace(model="MIX", is_hybrid=True, is_mm_prefix_lm=False)
    with tensor_parallel(0, 1, config):
        if backends_size_pages():
            assert kv_config(KV4).kv_cache() is not None
            return
        with pytest.raises(UserError, match=r"hybrid models such as MIX.*0\.32.*kv_bits"):
            kv_config(KV4).kv_cache()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_size": 80}, "head size 80"),
        ({"head_size_v": 64}, "64 and 128"),
        ({"alibi_slopes": [0.1] * 4}, "ALiBi"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"layer_class": EncoderOnlyAttention}, "EncoderOnlyAttention"),
    ],
)
def test_attention_that_is_not_served_is_refused_with_the_layer(engine_config, changes, message):
    expected = f"model.layers.3.self_attn.attn.*{message}.*kv_cache.layers"
    with pytest.raises(UserError, match=expected):
        attention(kv_config(KV4), engine_config(), index=3, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"logits_soft_cap": 30.0}, "capped at 30"), ({"sinks": torch.zeros(4)}, "sinks")],
)
def test_scores_that_see_a_mean_of_k_are_served_without_one(engine_config, changes, message):
    impl = attention(kv_config(KV4), engine_config(), **changes).impl
    assert impl.soft_cap == changes.get("logits_soft_cap", 0)
    assert impl.sinks is changes.get("sinks")
    expected = f"model.layers.3.*mean of K with .*{message}.*--no-k-mean.*kv_cache.layers"
    with pytest.raises(UserError, match=expected):
        attention(kv_config({"bits": 4, "k_mean": True}), engine_config(), index=3, **changes)


def test_a_shared_cache_is_refused(engine_config):
    config, quant_config = engine_config(), kv_config(KV4)
    target = attention(quant_config, config).layer_name
    with pytest.raises(UserError, match=f"shared with {target}"):
        attention(quant_config, config, index=1, kv_sharing_target_layer_name=target)


def test_mla_is_refused(engine_config):
    config, quant_config = engine_config(), kv_config(KV4)
    layer = MLAAttention.__new__(MLAAttention)
    with tensor_parallel(0, 1, config), pytest.raises(UserError, match=r"a\.attn.*MLAAttention"):
        quant_config.get_quant_method(layer, "a.attn")


def test_hadamard_needs_a_power_of_two(engine_config):
    kv_cache = {"bits": 4, "hadamard": True}
    with pytest.raises(UserError, match="Hadamard rotation of head size 96"):
        attention(kv_config(kv_cache), engine_config(), head_size=96)
    assert attention(kv_config(KV4), engine_config(), head_size=96).impl.head_size == 96


def test_a_layer_that_hides_from_quantization_is_noticed_before_weights_are_loaded(engine_config):
    config, quant_config = engine_config(), kv_config(KV4)
    attention(quant_config, config)
    with tensor_parallel(0, 1, config):
        attention(None, config, index=1)
        with pytest.raises(UserError, match=r"model\.layers\.1\..* does not offer"):
            quant_config.get_cache_scale_mapper()


def test_a_rule_that_matches_no_layer_is_refused(engine_config):
    rules = [{"match": "model.layer.0.*", "bits": 16}]
    quant_config, config = kv_config({"bits": 4, "layers": rules}), engine_config()
    attention(quant_config, config)
    with pytest.raises(UserError, match=r"'model\.layer\.0\.\*' matches no.*model\.layers\.0"):
        quant_config.get_cache_scale_mapper()


def test_windows_and_rules_together_need_a_vllm_that_packs_pages(engine_config):
    config, quant_config = engine_config(), kv_config({**RULED, "hadamard": False})
    if backends_size_pages():
        attention(quant_config, config, index=1, per_layer_sliding_window=48)
        return
    with pytest.raises(UserError, match=r"0\.32"):
        attention(quant_config, config, index=1, per_layer_sliding_window=48)

"""The mean of K in vLLM's attention layers: where it loads, which heads a rank gets, refusals."""

import re

import pytest
import torch
from conftest import DATA
from plugin_units import section, tensor_parallel, vllm_config
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.model_loader import reload

from vllm_qoq.errors import FormatError
from vllm_qoq.numerics import kv_layout, reference_attention
from vllm_qoq.serving.kv.k_mean import shard
from vllm_qoq.serving.plugin.config import QoQConfig

HEAD, SCALE, BLOCK = 64, 0.125, 16
WITH_MEAN = {"bits": 4, "k_mean": True}
LAYER = "model.layers.{}.self_attn"


@pytest.fixture(scope="module")
def engine_config():
    config = vllm_config()
    config.model_config = ModelConfig(str(DATA / "tiny-llama"), max_model_len=512)
    config.scheduler_config.disable_hybrid_kv_cache_manager = False
    return config


def attach(quant_config, config, layers=2, kv_heads=2):
    """Attention layers that vLLM makes with `quant_config`."""
    return [
        Attention(
            *(2 * kv_heads, HEAD, SCALE, kv_heads),
            cache_config=config.cache_config,
            quant_config=quant_config,
            prefix=LAYER.format(index) + ".attn",
        )
        for index in range(layers)
    ]


def kv_config(kv_cache):
    return QoQConfig.from_config({"quant_method": "qoq", "kv_cache": kv_cache})


@pytest.fixture
def layer(engine_config):
    with tensor_parallel(0, 1, engine_config):
        (layer,) = attach(kv_config(WITH_MEAN), engine_config, layers=1)
        yield layer
    engine_config.compilation_config.static_forward_context.clear()


@pytest.fixture
def renamed(engine_config):
    """`renamed(KV_CACHE)`: what vLLM calls the means of two layers; None for what it leaves out."""

    def rename(kv_cache, options=None):
        engine_config.additional_config = {"qoq": options or {}}
        with tensor_parallel(0, 1, engine_config):
            quant_config = QoQConfig.from_config(section(kv_cache=kv_cache))
            attach(quant_config, engine_config)
            mapper = quant_config.get_cache_scale_mapper()
        engine_config.compilation_config.static_forward_context.clear()

        def mapped(name):
            (found,) = [new for new, _ in mapper.apply([(name, torch.empty(0))])] or [None]
            return found

        names = [mapped(LAYER.format(index) + ".k_mean") for index in (0, 1, 7)]
        # The model hands what is renamed to its decoder, which renames once more.
        assert [name and mapped(name) for name in names] == names
        assert mapped("model.layers.0.self_attn.k_proj.weight").endswith("k_proj.weight")
        return names

    yield rename
    engine_config.additional_config = {}


def test_a_mean_goes_to_the_attention_layer_of_its_projections(renamed):
    there = [LAYER.format(index) + ".attn.k_mean" for index in (0, 1, 7)]
    assert renamed(WITH_MEAN) == renamed(WITH_MEAN, {"kv_bits": 8}) == there
    # Layer 7 may be another pipeline rank's.
    spared = {**WITH_MEAN, "layers": [{"match": LAYER.format(0) + ".*", "bits": 16}]}
    assert renamed(spared) == [None, *there[1:]]
    assert renamed(WITH_MEAN, {"kv_bits": 16}) == [None, None, None]


def test_what_the_section_does_not_announce_is_refused_by_name(renamed):
    """A folder is refused before that; vLLM downloads a model of the Hub while it loads it."""
    name = re.escape(LAYER.format(0) + ".k_mean")
    with pytest.raises(FormatError, match=rf'^{name}: is not announced .*"k_mean": true'):
        renamed({"bits": 4})


def test_layers_of_sixteen_bits_and_caches_without_means_have_none(engine_config):
    with tensor_parallel(0, 1, engine_config):
        spared = {**WITH_MEAN, "layers": [{"match": LAYER.format(0) + ".*", "bits": 16}]}
        first, second = attach(kv_config(spared), engine_config)
        engine_config.compilation_config.static_forward_context.clear()
        (plain,) = attach(kv_config({"bits": 4}), engine_config, layers=1)
    engine_config.compilation_config.static_forward_context.clear()
    assert [hasattr(x, "k_mean") for x in (first, second, plain)] == [False, True, False]
    assert second.k_mean.dtype == torch.float32 and second.k_mean.shape == (2, HEAD)


def test_a_mean_that_no_file_has_is_named(layer):
    load = layer.k_mean.weight_loader
    for mean in (None, torch.full((2, HEAD), torch.inf)):
        if mean is not None:
            load(layer.k_mean, mean)
        with pytest.raises(FormatError, match=r"layers\.0\.self_attn\.k_mean: .* announces it"):
            layer.process_weights_after_loading(torch.bfloat16)
    load(layer.k_mean, torch.full((2, HEAD), -3e38))
    with pytest.raises(FormatError, match=r"self_attn\.k_mean: holds 3e\+38, beyond the 65504"):
        layer.process_weights_after_loading(torch.bfloat16)
    load(layer.k_mean, torch.randn(2, HEAD))
    layer.process_weights_after_loading(torch.bfloat16)


def test_a_mean_is_loaded_anew(layer, engine_config):
    """As by `reload_weights`, after which steps and graphs read the tensor that they had."""
    reload.record_metadata_for_reloading(layer)
    layer.k_mean.weight_loader(layer.k_mean, torch.randn(2, HEAD))
    before, mean = layer.k_mean.data_ptr(), torch.randn(2, HEAD)
    reload.initialize_layerwise_reload(layer)
    layer.k_mean.weight_loader(layer.k_mean, mean)
    reload.finalize_layerwise_reload(layer, engine_config.model_config)
    assert torch.equal(layer.k_mean, mean) and layer.k_mean.data_ptr() == before


@pytest.mark.parametrize(
    "mean",
    [
        torch.zeros(3, HEAD),
        torch.zeros(1, HEAD),
        torch.zeros(2, HEAD // 2),
        torch.zeros(2 * HEAD),
        torch.zeros(0, HEAD),
        torch.zeros(2, HEAD, dtype=torch.bfloat16),
    ],
    ids=lambda mean: f"{mean.dtype}-{list(mean.shape)}",
)
def test_a_mean_of_another_shape_is_refused(layer, mean):
    with pytest.raises(FormatError, match=r"self_attn\.k_mean: is .* expected float32 \[KV heads"):
        layer.k_mean.weight_loader(layer.k_mean, mean)


@pytest.mark.parametrize(("kv_heads", "ranks"), [(4, 1), (4, 2), (2, 2), (2, 4), (1, 4)])
def test_a_rank_gets_the_means_of_the_heads_whose_keys_it_makes(engine_config, kv_heads, ranks):
    numbered = torch.arange(kv_heads).repeat_interleave(HEAD).float()
    for rank in range(ranks):
        with tensor_parallel(rank, ranks, engine_config):
            local = max(1, kv_heads // ranks)
            (layer,) = attach(kv_config(WITH_MEAN), engine_config, layers=1, kv_heads=local)
            qkv = QKVParallelLinear(1, HEAD, 2 * kv_heads * ranks, kv_heads, bias=False)
            qkv.weight.weight_loader(qkv.weight, numbered[:, None], "k")
        engine_config.compilation_config.static_forward_context.clear()
        layer.k_mean.weight_loader(layer.k_mean, numbered.view(kv_heads, HEAD))
        first = qkv.num_heads * HEAD
        keys = qkv.weight[first : first + qkv.num_kv_heads * HEAD]
        assert torch.equal(layer.k_mean, keys.view(qkv.num_kv_heads, HEAD))


def test_two_ranks_attend_as_one():
    torch.manual_seed(0)
    tokens, heads, kv_heads, bits = 40, 8, 4, 4
    query, mean = torch.randn(tokens, heads, HEAD), torch.randn(kv_heads, HEAD) * 30
    key, value = torch.randn(2, tokens, kv_heads, HEAD)
    key += mean
    past, blocks = 30, torch.arange(3, dtype=torch.int32)[None]

    def attend(query, key, value, mean):
        size = BLOCK * kv_layout.slot_bytes(HEAD, bits)
        pages = torch.zeros(3, key.shape[1], size, dtype=torch.uint8)
        reference_attention.update(pages, key, value, torch.arange(tokens), bits, k_mean=mean)
        return reference_attention.attention(
            *(query[past:], key[past:], value[past:], pages, blocks),
            *(torch.tensor([tokens]), torch.tensor([0, tokens - past])),
            scale=SCALE,
            bits=bits,
            k_mean=mean,
        )

    parts = [
        attend(
            query.chunk(2, 1)[rank],
            key.chunk(2, 1)[rank],
            value.chunk(2, 1)[rank],
            shard(mean, kv_heads // 2, rank, 2),
        )
        for rank in range(2)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), attend(query, key, value, mean))

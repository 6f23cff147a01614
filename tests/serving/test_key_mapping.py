"""Tensor names on their way from the checkpoint into vLLM's modules."""

import pytest
import torch
from plugin_units import qoq_config, tensor_parallel, vllm_config
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import WeightsMapper

from vllm_qoq.errors import FormatError
from vllm_qoq.serving.plugin import flex_models as models
from vllm_qoq.serving.plugin.config import QoQConfig

LLAMA = WeightsMapper(
    orig_to_new_stacked={".q_proj": (".qkv_proj", "q"), ".up_proj": (".gate_up_proj", 1)}
)


def mapper(config, vllm=None):
    with tensor_parallel(0, 1, vllm or vllm_config()):
        config.policy()
        config._used = {"w8a8", "w4a16"} if vllm is None else {"w4a16"}
        return config.get_cache_scale_mapper()


@pytest.mark.parametrize(
    ("stored", "module", "shard"),
    [
        ("w8a8.layers.0.attn.q_proj.weight", "layers.0.attn.qkv_proj.w8a8.weight", "q"),
        ("w4a16.layers.9.up_proj.weight_packed", "layers.9.gate_up_proj.w4a16.weight_packed", 1),
        ("w4a16.layers.9.down_proj.input_ratio", "layers.9.down_proj.w4a16.input_ratio", None),
        ("model.norm.weight", "model.norm.weight", None),
        ("model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.attn.k_scale", None),
    ],
)
def test_names_reach_the_module_of_their_set(stored, module, shard):
    # vLLM merges a model's own mapper with the quantization config's in this order.
    combined = LLAMA | mapper(qoq_config())
    assert combined._map_name_with_shard(stored) == (module, shard)


def test_sets_that_are_not_used_are_dropped():
    combined = mapper(qoq_config(), vllm_config(additional_config={"qoq": {"force_set": "w4a16"}}))
    assert combined._map_name("w8a8.model.layers.0.mlp.up_proj.weight") is None
    assert combined._map_name("w4a16.a.b.weight") == "a.b.w4a16.weight"


def test_override_hook_never_raises_for_other_peoples_checkpoints():
    for config in ({}, {"quant_method": "fp8"}, {"quant_method": None}, {"sets": 3}):
        assert QoQConfig.override_quantization_method(config, None, hf_config=None) is None


def test_config_errors_name_the_key():
    with pytest.raises(FormatError, match=r"quantization_config\.routing"):
        QoQConfig.from_config({"quant_method": "qoq", "sets": {"a": {"quant_method": "gptq"}}})


def test_module_lists_that_gptq_and_awq_read_from_headers_lose_the_prefix():
    config = qoq_config()
    names = ["w8a8.model.layers.0.q_proj", "w4a16.model.layers.0.k_proj", "model.norm"]
    assert config._of_set("w4a16", names) == ["model.layers.0.k_proj", "model.norm"]


def test_every_architecture_has_a_lazy_twin_named_after_the_vllm_version():
    models.register_models()
    twin = ModelRegistry.models["FlexQuantLlamaForCausalLM"]
    assert twin.class_name.endswith(models._VERSION)
    assert not any(name.startswith("FlexQuantFlexQuant") for name in ModelRegistry.models)
    loaded = twin.load_model_cls()
    assert loaded is twin.load_model_cls()
    assert loaded.__name__ == "FlexQuantLlamaForCausalLM"
    assert issubclass(loaded, ModelRegistry.models["LlamaForCausalLM"].load_model_cls())


def test_twin_renames_before_a_loader_that_knows_nothing_of_sets():
    """An architecture with a loader of its own: names are looked up in a flat dict."""

    class OldStyle(torch.nn.Module):
        def __init__(self, *, vllm_config, prefix):
            super().__init__()

        def load_weights(self, weights):
            return {name.replace("q_proj", "qkv_proj") for name, _ in weights}

    class Registered:
        def load_model_cls(self):
            return OldStyle

    ModelRegistry.models["OldStyleForCausalLM"] = Registered()
    try:
        config = vllm_config()
        config.quant_config = qoq_config()
        mapper(config.quant_config)
        twin = models._twin("OldStyleForCausalLM")(vllm_config=config)
        loaded = twin.load_weights([("w8a8.a.q_proj.weight", torch.ones(1))])
        assert loaded == {"a.qkv_proj.w8a8.weight"}
    finally:
        del ModelRegistry.models["OldStyleForCausalLM"]
        models._twin.cache_clear()

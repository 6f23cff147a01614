"""The quantization method `qoq` in vLLM's words."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_qoq.checkpoint.format import (
    QUANT_METHOD,
    STREAM,
    TRANSFORMS,
    KVSection,
    Section,
    split_name,
)
from vllm_qoq.errors import FormatError, as_engine_error
from vllm_qoq.models.vision import stored_pattern
from vllm_qoq.routing.table import Phase, RoutingError
from vllm_qoq.serving.kv.cache import QuantizedKVCache, check_without_sets
from vllm_qoq.serving.methods.fusion import install as install_fusion
from vllm_qoq.serving.methods.hidden_states import check_engine
from vllm_qoq.serving.methods.int8_head import Int8HeadMethod
from vllm_qoq.serving.methods.qoq_linear import fused_parts
from vllm_qoq.serving.methods.qoq_residual import QoQResidualConfig, QoQResidualMethod
from vllm_qoq.serving.methods.qoq_residual_experts import QoQResidualExpertsMethod
from vllm_qoq.serving.methods.routed_experts import (
    ExpertsMethod,
    FlexMoEMethod,
    named_refusals,
    same_sizes,
)
from vllm_qoq.serving.methods.routed_linear import FlexLinearMethod, SetMethod
from vllm_qoq.serving.methods.set_config import set_config
from vllm_qoq.serving.methods.way_back import WayBack, way_back
from vllm_qoq.serving.methods.weight_set import UNTRACKED_LOADERS
from vllm_qoq.serving.plugin import front_end, refusal
from vllm_qoq.serving.plugin.adapters import check_adapters, refuse_experts
from vllm_qoq.serving.plugin.load_check import begin_load
from vllm_qoq.serving.plugin.root import model_in_the_making, owner_in_the_making
from vllm_qoq.serving.plugin.shared_files import new_stem
from vllm_qoq.serving.routing.policy import Policy
from vllm_qoq.serving.signals import queue
from vllm_qoq.serving.speculation import check_speculation, has_float_heads
from vllm_qoq.serving.vllm_versions import (
    RoutedExperts,
    UnquantizedFusedMoEMethod,
    map_name,
)

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

# In these attributes, vLLM's own configs keep module names that they read from the checkpoint.
_MODULE_LISTS = ("modules_in_block_to_quantize", "modules_to_not_convert")


class QoQConfig(QuantizationConfig):
    """The config of one model: it holds a config for every set, vLLM's or ours.

    It asks each of them for its part of a layer.

    Without a `Section` there are no sets. Then linear layers stay as they are, and only the KV
    cache is quantized: by the `KVSection` of the model, or by `kv_bits` of `--additional-config`
    where the model has no section at all, for which vLLM makes this without arguments.
    """

    def __init__(self, section: Section | KVSection | None = None) -> None:
        super().__init__()
        self.section = section if isinstance(section, Section) else None
        self.checkpoint_kv_cache = section.kv_cache if section is not None else None
        sets = self.section.sets if self.section is not None else {}
        self.set_names = tuple(sets)
        self.set_configs = {name: set_config(name, config) for name, config in sets.items()}
        for config in self.set_configs.values():
            if isinstance(config, QoQResidualConfig):
                config.attach(self.set_configs[config.residual_set.base])
        self.counter_stem = new_stem()
        self._front_end = os.getpid()
        refusal.repeat_at_exit(self.counter_stem)
        self._has_load_writer = False
        self._policy: Policy | None = None
        self._kv_cache: QuantizedKVCache | None = None
        self._mappers: list[WeightsMapper] = []
        self._way_back: WayBack | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._target: weakref.ref[nn.Module] | None = None
        self._of_float_heads: set[str] = set()
        self._used: set[str] = set()
        self._unreachable: list[tuple[str, str]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Make what the front end sends to its engines, with whether it will tell their load."""
        own = {"_has_load_writer": self._has_load_writer or queue.is_writer_here()}
        return vars(self) | own | {"_model": None, "_target": None}

    @classmethod
    def get_name(cls) -> str:
        """Name the method as vLLM's command line and config.json do."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """List the activation dtypes that all sets support."""
        common = {torch.bfloat16, torch.float16, torch.float32}
        for config in self.set_configs.values():
            common &= set(config.get_supported_act_dtypes())
        return sorted(common, key=str)

    @classmethod
    def get_min_capability(cls) -> int:
        """Ask for Turing; sets that need more ask for it themselves."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Name no more files to read, because everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QoQConfig:
        """Read the section of config.json; FormatError says what is wrong."""
        if "kv_cache" in config and "sets" not in config:
            return cls(KVSection.parse(config))
        return cls(Section.parse(config))

    def maybe_update_config(self, model_name: str, **kwargs: Any) -> None:
        """Let the sets read the checkpoint's headers, as GPTQ and AWQ do.

        vLLM calls this where the engine is configured. EngineError says what the engine cannot do.
        """
        with as_engine_error():
            front_end.prepare(self)
        for name, config in self.set_configs.items():
            config.maybe_update_config(model_name, **kwargs)
            for attribute in _MODULE_LISTS:
                modules = getattr(config, attribute, None)
                if modules:
                    setattr(config, attribute, self._of_set(name, modules))

    def get_cache_scale_mapper(self) -> WeightsMapper:
        """Rename tensors for vLLM's loader: `w8a8.LAYER.weight` to `LAYER.w8a8.weight`.

        vLLM asks the instance for this mapper before any other renaming. Sets
        that the routing cannot reach are dropped. `LAYER.k_mean` goes to the attention layer.
        """
        from vllm.model_executor.models.utils import WeightsMapper

        self.kv_cache().check_layers()
        self._begin_load()
        rules: dict[re.Pattern[str], Any] = {}
        in_use = self._sets_in_use()
        # A layer rule may keep single layers out of a set that others use.
        for name, layer in self._unreachable:
            stored = stored_pattern(layer)
            rules[re.compile(rf"^{name}\.{stored}(\.\d+\.[^.]+)?\.[^.]+$")] = None
        for name in self.set_names:
            if name in in_use:
                rules[re.compile(rf"^({name})\.(.+)\.([^.]+)$")] = r"\2.\1.\3"
            else:
                rules[re.compile(rf"^{name}\.")] = None
        is_turned = self.section is not None and self.section.stream is not None
        if is_turned and not (self._way_back is not None and self._way_back.keeps_tensors()):
            rules[re.compile(rf"^{STREAM}\.")] = None  # generation does without
        rules[re.compile(rf"^{TRANSFORMS}\.")] = None  # of a folder without an index
        rules |= self.kv_cache().loading_rules()
        inherited = QuantizationConfig.get_cache_scale_mapper().orig_to_new_regex
        return WeightsMapper(orig_to_new_regex={**rules, **inherited})

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Follow a model whose layers have other names in vLLM than in the checkpoint.

        A model of images and text gives its mapper, and then its language model gives another.
        """
        self._mappers.append(hf_to_vllm_mapper)
        for config in self.set_configs.values():
            config.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Choose the method of `layer`: routed if a set quantizes it, vLLM's own otherwise."""
        if self._is_of_float_heads(prefix):
            return _float_method(layer)
        self._remember_model()
        kv_cache = self.kv_cache()
        if isinstance(layer, Attention | MLAAttention):
            kv_cache.attach(layer, prefix)
            return None
        kv_cache.watch(layer, prefix, owner_in_the_making(layer))
        if self.section is None:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if self.section.lm_head is not None and isinstance(layer, ParallelLMHead):
            return self._int8_head(prefix)
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        methods = self._ask_sets(layer, prefix)
        if not isinstance(layer, LinearBase):
            return self._unrouted(layer, prefix, methods)
        if all(isinstance(choice.method, UnquantizedLinearMethod) for choice in methods.values()):
            return UnquantizedLinearMethod()
        return self._routed(layer, prefix, methods)

    def _is_of_float_heads(self, prefix: str) -> bool:
        """Whether the layer `prefix` is of heads of MTP, which are built with this config.

        They come from another checkpoint than the model, which is built before them.
        """
        root = model_in_the_making()
        if root is None:  # weights are loaded, after which vLLM asks about attention again
            return prefix in self._of_float_heads
        target = self._target() if self._target is not None else None
        if target is None:
            self._target = weakref.ref(root)
        is_other = target is not None and root is not target
        if not is_other or not has_float_heads(get_current_vllm_config()):
            return False
        self._of_float_heads.add(prefix)
        return True

    def _remember_model(self) -> None:
        self._model = None
        model = model_in_the_making()
        if model is None:  # weights are loaded anew, outside of any configuration
            return
        if get_current_vllm_config().load_config.load_format not in UNTRACKED_LOADERS:
            self._model = weakref.ref(model)

    def _begin_load(self) -> None:
        """Begin the check of a model that was just built; one that serves already has had it."""
        model = self._model() if self._model is not None else None
        self._model = None
        if model is not None:
            begin_load(model)

    def kv_cache(self) -> QuantizedKVCache:
        """Give the KV cache of the engine, which is decided when the first layer asks for it."""
        if self._kv_cache is None:
            refusal.leave(self.counter_stem, self._front_end)
            vllm_config = get_current_vllm_config()
            if self.section is None:
                check_without_sets(self.checkpoint_kv_cache, vllm_config)
            self._kv_cache = QuantizedKVCache(self.checkpoint_kv_cache, vllm_config, self._map_name)
        return self._kv_cache

    def policy(self) -> Policy:
        """Give the routing in force, which is made when the first layer asks for it."""
        if self._policy is None:
            assert self.section is not None
            vllm_config = get_current_vllm_config()
            check_adapters(self.section, vllm_config)
            check_speculation(vllm_config)
            check_engine(self.section, vllm_config)
            install_fusion(vllm_config.compilation_config)
            self._policy = Policy(
                self.section,
                vllm_config,
                self.counter_stem,
                self._map_name,
                has_load_writer=self._has_load_writer or queue.is_writer_here(),
            )
        return self._policy

    def _routed(
        self, layer: LinearBase, prefix: str, methods: dict[str, SetMethod]
    ) -> FlexLinearMethod:
        policy, parts = self.policy(), self._parts(prefix)
        if self._way_back is None:
            assert self.section is not None
            self._way_back = way_back(
                self.section, get_current_vllm_config(), model_in_the_making(), prefix
            )
        route = policy.route(prefix, parts)
        if policy.has_graphs():
            _check_nested(prefix, policy.pairs(route), {n: m.base for n, m in methods.items()})
        reachable = policy.reachable(route)
        # The base's weights are a part of a nested set's.
        reachable |= {base for name in reachable if (base := methods[name].base) is not None}
        chosen = {name: methods[name] for name in self._use(reachable, parts)}
        return FlexLinearMethod(prefix, parts, chosen, route, policy)

    def _experts(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        """Choose the method of a mixture of experts, of which a set quantizes all or none."""
        assert self.section is not None
        policy = self.policy()
        if get_current_vllm_config().lora_config is not None:
            refuse_experts(prefix)
        route = policy.routing.route([prefix])
        reachable = policy.reachable(route)
        methods, is_own = self._ask_sets_for_experts(layer, prefix, reachable)
        if not is_own and not self.section.has_float_experts(prefix):
            return next(iter(methods.values())).method
        policy.route(prefix, [prefix])
        if policy.has_graphs():
            _check_nested(prefix, policy.pairs(route), {n: m.base for n, m in methods.items()})
        # The base's weights are a part of a nested set's.
        reachable |= {base for name in reachable if (base := methods[name].base) is not None}
        chosen = {name: methods[name] for name in self._use(reachable, [prefix])}
        return FlexMoEMethod(layer, prefix, chosen, route, policy)

    def _use(self, reachable: frozenset[str], parts: list[str]) -> list[str]:
        """Note which sets the layer made of `parts` uses, so that no others are loaded."""
        self._used |= reachable
        if self.policy().routing.layers:
            skipped = [name for name in self.set_names if name not in reachable]
            self._unreachable += [(name, part) for name in skipped for part in parts]
        return [name for name in self.set_names if name in reachable]

    def _ask_sets_for_experts(
        self, layer: RoutedExperts, prefix: str, reachable: Collection[str]
    ) -> tuple[dict[str, ExpertsMethod], bool]:
        """Ask the sets for their methods, and whether any of them quantizes the experts."""
        methods, is_quantized = {}, False
        for name in self.set_names:
            try:
                # compressed-tensors refuses schemes by a RuntimeError.
                with named_refusals(prefix, name, RuntimeError), same_sizes(layer, prefix, name):
                    method, state = self._ask(name, layer, prefix)
            except FormatError:
                if name in reachable:
                    raise
                is_quantized = True  # what is refused is how it does
                continue
            method = method or UnquantizedFusedMoEMethod(layer.moe_config)
            methods[name] = ExpertsMethod(method, state, base=self._base_of(name, method))
            is_quantized |= not isinstance(method, UnquantizedFusedMoEMethod)
        return methods, is_quantized

    def _ask(
        self, name: str, layer: nn.Module, prefix: str
    ) -> tuple[QuantizeMethodBase | None, dict[str, Any]]:
        """Ask one set for its method, and take from the layer what the set left there."""
        config = self.set_configs[name]
        config.packed_modules_mapping = self.packed_modules_mapping
        before = dict(vars(layer))
        method = config.get_quant_method(layer, prefix)
        state = {key: value for key, value in vars(layer).items() if key not in before}
        for key in state:  # such as `scheme`, which every set would overwrite
            delattr(layer, key)
        return method, state

    def _ask_sets(self, layer: nn.Module, prefix: str) -> dict[str, SetMethod]:
        parts = self._parts(prefix)
        methods = {}
        for name in self.set_names:
            method, state = self._ask(name, layer, prefix)
            assert self.section is not None
            ratios = [part for part in parts if self.section.has_input_ratio(name, part)]
            if ratios and len(ratios) != len(parts):
                raise FormatError(
                    f"quantization_config.input_ratio.{name} lists {ratios[0]} but not all of "
                    f"{', '.join(parts)}, which read one input"
                )
            base = self._base_of(name, method)
            methods[name] = SetMethod(method, state, has_input_ratio=bool(ratios), base=base)
        return methods

    def _unrouted(
        self, layer: nn.Module, prefix: str, methods: dict[str, SetMethod]
    ) -> QuantizeMethodBase | None:
        """Treat embeddings and lm_head as in an unquantized model, or refuse them."""
        for name, choice in methods.items():
            if choice.method is not None and "Unquantized" not in type(choice.method).__name__:
                raise FormatError(
                    f"{prefix} ({type(layer).__name__}) is quantized in set {name!r}, but only "
                    "linear layers and experts can be routed; quantize the set again with this "
                    "layer ignored"
                )
        return next(iter(methods.values())).method

    def _int8_head(self, prefix: str) -> Int8HeadMethod:
        vllm_config = get_current_vllm_config()
        if getattr(vllm_config.model_config.hf_text_config, "tie_word_embeddings", False):
            raise FormatError(
                "quantization_config.lm_head: the model's lm_head is its embedding "
                "(tie_word_embeddings), which is not quantized; take lm_head out of the section"
            )
        return Int8HeadMethod(prefix, vllm_config.load_config.load_format)

    def _base_of(self, name: str, method: QuantizeMethodBase | None) -> str | None:
        assert self.section is not None
        is_residual = isinstance(method, QoQResidualMethod | QoQResidualExpertsMethod)
        return self.section.base_of(name) if is_residual else None

    def _sets_in_use(self) -> set[str]:
        if self.section is not None:
            self.policy()
        return self._used

    def _parts(self, prefix: str) -> list[str]:
        return fused_parts(prefix, self.packed_modules_mapping)

    def _map_name(self, name: str) -> str:
        for mapper in self._mappers:
            name = map_name(mapper, name)
        return name

    def _of_set(self, name: str, modules: list[str]) -> list[str]:
        """Take the names of a set from those read from the checkpoint, without the set's prefix."""
        split = (split_name(module, self.set_names) for module in modules)
        return [module for owner, module in split if owner in (None, name)]


def _float_method(layer: nn.Module) -> QuantizeMethodBase | None:
    """Give the method that `layer` has in a model that is not quantized."""
    if isinstance(layer, LinearBase):
        return UnquantizedLinearMethod()
    if isinstance(layer, RoutedExperts):
        return UnquantizedFusedMoEMethod(layer.moe_config)
    return None


def _check_nested(
    prefix: str, pairs: Iterable[tuple[Phase, str, str]], bases: Mapping[str, str | None]
) -> None:
    """Raise RoutingError unless each pair is one GEMM, in which a flag chooses inside a graph.

    bases  nested set -> its base, None for a set of its own
    """
    for phase, calm, busy in pairs:
        if bases[calm] != busy and bases[busy] != calm:
            raise RoutingError(
                f"routing.load: in {phase.name.lower()} steps {prefix} goes from {calm!r} to "
                f"{busy!r} when the engine is busy, and CUDA graphs follow only from one set of a "
                "nested pair to the other (quantize --nested, merge --nest); use nested sets, or "
                "--enforce-eager"
            )

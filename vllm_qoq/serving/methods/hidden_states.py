"""The way back for hidden states that leave a model whose residual stream is rotated.

The section's `stream` says that it is.

Generation uses them for lm_head alone, into which the rotation is folded, so nothing happens there.
A pooling model hands its last hidden states to a pooler. There the checkpoint's rotation and the
weight of the original final norm are loaded, and a forward hook of the root module turns the
hidden states back: outside what vLLM compiles, and inside what its CUDA graphs capture. What vLLM
makes of rows of lm_head (`classifier_from_token`) is in the basis of the stream and needs the
hidden states as they are.

Everything else that hands hidden states to others or takes them is refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, model_parallel_is_initialized
from vllm.model_executor.utils import set_weight_attrs
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from vllm_qoq.checkpoint.format import STREAM, Section, Stream, stream_shapes
from vllm_qoq.errors import FormatError, UserError
from vllm_qoq.numerics import rotation as basis
from vllm_qoq.serving.methods.after_loading import AfterLoading
from vllm_qoq.serving.methods.weight_set import UNTRACKED_LOADERS

_REPORT = "quantization_report.json"
_REMEDY = "quantize the model with --no-rotate"
# The methods of speculative decoding whose drafts are made of tokens alone.
_DRAFTS_OF_TOKENS = ("ngram", "ngram_gpu", "suffix", "draft_model")
_POOLER = "pooler"


def stream_of(section: Section, vllm_config: VllmConfig) -> Stream | None:
    """Say what is known of the stream, also of checkpoints older than the section's key."""
    model = vllm_config.model_config
    if section.stream is not None or model is None:
        return section.stream
    try:
        report = get_hf_file_to_dict(_REPORT, model.model, model.revision)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{_REPORT}: {error}; download the checkpoint again") from None
    options = report.get("options") if isinstance(report, dict) else None
    is_rotated = isinstance(options, dict) and options.get("rotate") is True
    return Stream(rotation="unknown") if is_rotated else None


def check_engine(section: Section, vllm_config: VllmConfig) -> None:
    """Raise UserError where the engine needs original hidden states and cannot have them."""
    reads_head, exits = _reads_lm_head(vllm_config), list(_exits(section, vllm_config))
    if reads_head and section.lm_head is not None:
        raise UserError(
            "classifier_from_token reads rows of lm_head, which this checkpoint has in int8; "
            "quantize the model with --lm-head-bits 16"
        )
    needs_original = is_pooling(vllm_config) and not reads_head
    stream = stream_of(section, vllm_config) if exits or needs_original else None
    if stream is None:
        return
    for what, remedy in exits:
        raise UserError(
            f"the hidden states of this checkpoint are rotated, and {what} needs the original "
            f"model's; {remedy}, or {_REMEDY}"
        )
    if needs_original and not stream.is_stored:
        raise UserError(
            "the hidden states of this checkpoint are rotated, and it does not say how, so "
            "embeddings and scores would mean nothing; quantize the original model again with "
            "vllm-qoq quantize"
        )


def is_pooling(vllm_config: VllmConfig) -> bool:
    """Whether hidden states are what the engine is asked for."""
    model = vllm_config.model_config
    return model is not None and model.runner_type == "pooling"


def way_back(
    section: Section, vllm_config: VllmConfig, root: nn.Module | None, prefix: str
) -> WayBack | None:
    """Make the way back for the model `root`, which is being built; None where none is needed."""
    is_stored = section.stream is not None and section.stream.is_stored
    if not is_stored or not is_pooling(vllm_config) or _reads_lm_head(vllm_config):
        return None
    return WayBack(vllm_config, root, prefix)


class WayBack:
    """A hook of the root of a model, which turns back what the root returns.

    prefix  a layer of the model, for messages
    """

    def __init__(self, vllm_config: VllmConfig, root: nn.Module | None, prefix: str) -> None:
        model = vllm_config.model_config
        self.is_tracked = vllm_config.load_config.load_format not in UNTRACKED_LOADERS
        self.hidden_size, self.dtype = model.get_hidden_size(), model.dtype
        self._prefix = prefix
        self._root: weakref.ref[nn.Module] | None = None
        if root is not None and _is_last_rank():
            self._attach(root)

    def keeps_tensors(self) -> bool:
        """Whether this rank loads the tensors of the stream; call when all modules exist.

        UserError for a model in which the exit was not found.
        """
        if not _is_last_rank():
            return False
        root = self._root() if self._root is not None else None
        if not hasattr(root, _POOLER):
            raise UserError(
                "the hidden states of this checkpoint are rotated, and where they leave this "
                f"model class was not found ({self._prefix}); serve it as a model of vLLM "
                f"(--model-impl vllm), or {_REMEDY}"
            )
        return True

    def _attach(self, root: nn.Module) -> None:
        if hasattr(root, STREAM):
            raise UserError(f"{type(root).__name__} has an attribute {STREAM!r}; {_REMEDY}")
        if type(root).__call__ is not nn.Module.__call__:
            return  # it would be compiled without the hook, and is refused when loading begins
        root.add_module(STREAM, OriginalBasis(self.hidden_size, self.dtype, self.is_tracked))
        root.register_forward_hook(_turn_back)
        self._root = weakref.ref(root)


class OriginalBasis(nn.Module):
    """A module that turns last hidden states of a rotated model into the original model's.

    rotation  int8 [H, H]  as in the checkpoint
    norm      [H]          in the model's dtype
    """

    signs: torch.Tensor  # the rotation in the model's dtype

    def __init__(self, hidden_size: int, dtype: torch.dtype, is_tracked: bool) -> None:
        super().__init__()
        shapes = stream_shapes(hidden_size)
        self.rotation = self._parameter(torch.zeros(shapes["rotation"], dtype=torch.int8))
        self.norm = self._parameter(torch.ones(shapes["norm"], dtype=dtype))
        self.quant_method = _Finish(is_tracked)
        self.loaded: set[str] = set()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Turn hidden states [num_tokens, H]; the dtype stays."""
        return basis.last_hidden_state(hidden, self.signs, self.norm)

    def finish(self, is_tracked: bool) -> None:
        """Check what was loaded; FormatError names the tensor."""
        for leaf in ("rotation", "norm") if is_tracked else ():
            if leaf not in self.loaded:
                raise FormatError(
                    f"the checkpoint did not fill {STREAM}.{leaf}, which its "
                    f"quantization_config.{STREAM} announces; run `vllm-qoq verify` on the "
                    "checkpoint"
                )
        if is_tracked and (message := basis.finding(self.rotation)):
            raise FormatError(f"{STREAM}.rotation: {message}; download the checkpoint again")
        self.register_buffer("signs", self.rotation.to(self.norm.dtype), persistent=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors, which vLLM names below this module; returns the names of the parameters.

        vLLM's Mistral models make `model.norm` of every `norm`.
        """
        loaded = set()
        for name, tensor in weights:
            leaf = name.removeprefix("model.")
            if leaf not in ("rotation", "norm"):
                raise FormatError(f"{STREAM}.{name}: is not known; download the checkpoint again")
            parameter: Any = self.get_parameter(leaf)
            parameter.weight_loader(parameter, tensor)
            loaded.add(leaf)
        return loaded

    def _parameter(self, content: torch.Tensor) -> Parameter:
        parameter = Parameter(content, requires_grad=False)
        set_weight_attrs(parameter, {"weight_loader": self._load})
        return parameter

    # vLLM's loading anew exchanges the argument that is named `param`.
    def _load(self, param: Parameter, tensor: torch.Tensor) -> None:
        leaf = "rotation" if param.dtype == torch.int8 else "norm"
        is_int8 = tensor.dtype == torch.int8
        if tensor.shape != param.shape or is_int8 != (leaf == "rotation"):
            raise FormatError(
                f"{STREAM}.{leaf}: is {tensor.dtype} {list(tensor.shape)}, the model needs "
                f"{param.dtype} {list(param.shape)}"
            )
        param.data.copy_(tensor)
        self.loaded.add(leaf)


class _Finish(AfterLoading):
    """Makes vLLM's loader say when everything is loaded."""

    def __init__(self, is_tracked: bool) -> None:
        self.is_tracked = is_tracked

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Let `OriginalBasis` check and prepare its tensors."""
        assert isinstance(layer, OriginalBasis)
        layer.finish(self.is_tracked)


def _turn_back(root: nn.Module, _: object, hidden: object) -> torch.Tensor:
    """Turn back what the root returns, as its forward hook."""
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(f"{type(root).__name__} returned {type(hidden).__name__}, not a tensor")
    return root.get_submodule(STREAM)(hidden)


def _exits(section: Section, vllm_config: VllmConfig) -> Iterator[tuple[str, str]]:
    """List what takes hidden states from the model or puts some in, and what to do instead."""
    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    if speculative is not None and speculative.method not in _DRAFTS_OF_TOKENS:
        yield (
            f"speculative decoding with the method {speculative.method!r}",
            "use 'ngram' or 'draft_model', which need no hidden states",
        )
    if model is not None and model.enable_prompt_embeds:
        yield "--enable-prompt-embeds", "leave it out"
    # `quantize`, which stores the rotation, rotates what an encoder puts into the stream, too.
    is_stored = section.stream is not None and section.stream.is_stored
    if model is not None and model.is_multimodal_model and not is_stored:
        yield f"the encoder of {model.model}", "serve a model of text alone"


def _reads_lm_head(vllm_config: VllmConfig) -> bool:
    """Whether vLLM makes a classifier of rows of lm_head, which are in the stream's basis."""
    model = vllm_config.model_config
    if model is None or model.convert_type != "classify":
        return False
    keys = ("classifier_from_token", "method")
    configs = (model.hf_config, model.hf_text_config)
    return any(getattr(config, key, None) is not None for config in configs for key in keys)


def _is_last_rank() -> bool:
    return not model_parallel_is_initialized() or bool(get_pp_group().is_last_rank)

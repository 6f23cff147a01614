"""Measuring the float model and every set: perplexity, and a few generated tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_qoq.checkpoint.kv_config import Bits, short_name
from vllm_qoq.models.table import LayerNames
from vllm_qoq.progress import Clock
from vllm_qoq.quantizer import QuantizeError, evaluate
from vllm_qoq.quantizer.model import Module, blocks
from vllm_qoq.quantizer.sets import SetKind, dequantized
from vllm_qoq.quantizer.weights import assign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_TOKENS, NEW_TOKENS = 16, 16
_REMEDY = "check the model in its own dtype, then switch single steps off to find the cause"


@dataclass(frozen=True)
class SetCheck:
    """A measurement of the model and of each set; it is empty without windows and prompts.

    windows        token ids to measure the perplexity on
    prompts        token ids to continue
    kv_bits        precisions of the KV cache to measure with, simulated below 16
    kv_hadamard    whether the cache rotates keys
    has_int8_head  whether the quantized model rounds the lm_head's inputs
    """

    tokenizer: PreTrainedTokenizerBase
    windows: list[list[int]]
    prompts: list[list[int]]
    kv_bits: tuple[Bits, ...]
    kv_hadamard: bool
    has_int8_head: bool
    quiet: bool

    def measure(
        self, model: Module, label: str, k_means: Mapping[int, torch.Tensor] | None = None
    ) -> dict[str, Any]:
        """Measure `perplexity` by KV cache ("kv16", "kv4") and make `generated` texts."""
        found: dict[str, Any] = {}
        if self.windows:
            found["perplexity"] = {
                short_name(bits): self._perplexity(model, bits, label, k_means)
                for bits in self.kv_bits
            }
        if self.prompts:
            found["generated"] = [self._continue(model, prompt, label) for prompt in self.prompts]
        return found

    def measure_set(
        self,
        model: Module,
        names: LayerNames,
        kind: SetKind,
        layers: Iterable[Mapping[str, torch.Tensor]],
        k_means: Mapping[int, torch.Tensor] | None,
    ) -> dict[str, Any]:
        """Measure one set, like `measure`. The transformed `model` gets the weights of the set.

        layers   the tensors of each block, named SET.LAYER.LEAF
        k_means  float32 [kv_heads, head_dim] by the index of the block, which the cache leaves out
        """
        if not (self.windows or self.prompts):
            return {}
        for index, (block, tensors) in enumerate(zip(blocks(model, names), layers, strict=True)):
            layers_of = names.of_block(index).linears
            for name, weight in dequantized(tensors, kind, layers_of):
                layer = block.get_submodule(name)
                assign(layer, "weight", weight.to(layer.weight.device))
        rounded = list(evaluate.linears(model, names)) if kind.has_int8_activations else []
        if self.has_int8_head:
            rounded.append(model.get_submodule(names.head))
        with evaluate.int8_inputs(rounded):
            return self.measure(model, kind.name, k_means)

    def _perplexity(
        self, model: Module, bits: Bits, label: str, k_means: Mapping[int, torch.Tensor] | None
    ) -> float:
        of = f"{label}, {short_name(bits).upper()}"
        clock = Clock(f"perplexity of {of}", len(self.windows), self.quiet)
        found = evaluate.perplexity(
            model,
            self.windows,
            kv_bits=bits,
            done=clock,
            kv_hadamard=self.kv_hadamard,
            k_means=k_means,
        )
        if not math.isfinite(found):
            raise QuantizeError(f"{label}: perplexity {found}; {_REMEDY}")
        return found

    @torch.no_grad()
    def _continue(self, model: Module, prompt: list[int], label: str) -> str:
        tokens = list(prompt)
        device = evaluate.device_of(model)
        for _ in range(NEW_TOKENS):
            logits = model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits
            if not logits.isfinite().all():
                raise QuantizeError(f"{label}: the model computes NaN or infinity; {_REMEDY}")
            tokens.append(int(logits[0, -1].argmax()))
        return str(self.tokenizer.decode(tokens[len(prompt) :]))

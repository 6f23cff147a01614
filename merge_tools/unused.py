"""Tensors that a checkpoint has and its model does not use, which a merge leaves out and names.

These are constants that vLLM computes itself, second copies of a tied embedding, and biases of
zeros where another set has none. Sets that say differently whether lm_head is the embedding are
brought together.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from merge_tools import MergeError
from merge_tools.meaning import is_tied
from merge_tools.survey import is_same_tensor
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.errors import FormatError
from vllm_qoq.models.config import CONFIG

_ROTARY = re.compile(r"(?:.*\.)?rotary(?:_pos)?_emb\.(?:inv_freq|cos_cached|sin_cached)")
_HEAD = re.compile(r"(?:.*\.)?lm_head\.weight")
_EMBEDDING = re.compile(r"(?!.*(?:vision|visual)).*(?:embed_tokens|wte)\.weight")
_COPY = "a copy of the embedding, which is the lm_head"

LeftOutTensor = tuple[str, str, str]
"""A set, one of its tensors, and why that was left out."""


def leave_out(source: StoredSet) -> tuple[StoredSet, list[LeftOutTensor]]:
    """Leave out of a set what its own model does not use; returns the rest and what was left out.

    Reads a tied head. Raises FormatError if the set has a head of its own where config.json says
    that the embedding is the head.
    """
    reasons = dict(_unused(source))
    found = [(source.name, tensor, reason) for tensor, reason in reasons.items()]
    return _without(source, reasons), found


def settle(
    sources: Mapping[str, StoredSet], prefill: str
) -> tuple[dict[str, StoredSet], list[LeftOutTensor]]:
    """Give every set a head where the set `prefill` has one, and take it away where it has none.

    Reads the heads. Raises MergeError for a head that is another matrix.
    """
    left_out: list[LeftOutTensor] = []
    settled = dict(sources)
    for name, source in sources.items():
        if name != prefill:
            settled[name], tensors = _like(sources[prefill], source)
            left_out += [(name, tensor, _COPY) for tensor in tensors]
    return settled, left_out


def leave_out_zero_biases(
    sources: Mapping[str, StoredSet],
) -> tuple[dict[str, StoredSet], list[LeftOutTensor]]:
    """Leave out the biases of zeros that another set proves unneeded. Reads the biases."""
    zeros = list(_zero_biases(list(sources.values())))
    kept = {
        name: _without(source, {tensor for owner, tensor in zeros if owner == name})
        for name, source in sources.items()
    }
    return kept, [(name, tensor, "a bias of zeros") for name, tensor in zeros]


def _unused(source: StoredSet) -> Iterator[tuple[str, str]]:
    tied = is_tied(source.checkpoint.config)
    for tensor, info in source.tensors.items():
        if _ROTARY.fullmatch(tensor):
            yield tensor, f"vLLM computes it from {CONFIG}"
        elif tied and _HEAD.fullmatch(tensor):
            embedding = _embedding(source)
            if embedding is None:
                continue
            if not is_same_tensor(source, tensor, embedding):
                raise FormatError(
                    f"{source.checkpoint.path}: {info.file}: {tensor}: differs from {embedding}, "
                    f"but {CONFIG} says tie_word_embeddings: true, so vLLM would not read it; say "
                    "false there if the model needs it, else delete it"
                )
            yield tensor, _COPY


def _like(prefill: StoredSet, source: StoredSet) -> tuple[StoredSet, list[str]]:
    """Make the head of `source` like `prefill`'s; returns the set and the tensors left out."""
    tied = [is_tied(one.checkpoint.config) for one in (prefill, source)]
    embedding = _embedding(source)
    if tied[0] == tied[1] or embedding is None:
        return source, []
    if tied[0]:
        heads = [tensor for tensor in source.tensors if _HEAD.fullmatch(tensor)]
        for tensor in heads:
            if not is_same_tensor(source, tensor, embedding):
                raise MergeError(
                    f"{tensor}: is the embedding in {prefill.name} (tie_word_embeddings) and "
                    f"another matrix in {source.name}; quantize both from the same model"
                )
        return _without(source, heads), heads
    heads = [tensor for tensor in prefill.tensors if _HEAD.fullmatch(tensor)]
    aliases = {tensor: source.tensors[embedding] for tensor in heads}
    return replace(source, tensors={**source.tensors, **aliases}), []


def _embedding(source: StoredSet) -> str | None:
    return next((tensor for tensor in source.tensors if _EMBEDDING.fullmatch(tensor)), None)


def _zero_biases(sources: Sequence[StoredSet]) -> Iterator[tuple[str, str]]:
    """Find biases of zeros in layers that no set quantizes and that lack a bias in another set."""
    quantized = frozenset().union(*(source.quantized for source in sources))
    for source in sources:
        for layer, leaves in source.layers.items():
            others = [one.layers.get(layer, {}) for one in sources]
            is_alone = all("weight" in one for one in others) and any(
                "bias" not in one for one in others
            )
            if layer in quantized or "bias" not in leaves or not is_alone:
                continue
            tensor = f"{layer}.bias"
            if not source.get(tensor).any():
                yield source.name, tensor


def _without(source: StoredSet, tensors: Collection[str]) -> StoredSet:
    if not tensors:
        return source
    kept = {name: info for name, info in source.tensors.items() if name not in tensors}
    return replace(source, tensors=kept)

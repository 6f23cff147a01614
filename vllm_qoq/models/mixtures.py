"""The layers of a model by what they do, also where its blocks differ, from its `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm_qoq.models.blocks import Mixture
from vllm_qoq.models.table import Experts, LayerNames, architecture_of
from vllm_qoq.models.tensors import expected_tensors


def names_of(config: Mapping[str, Any]) -> LayerNames | None:
    """Name the layers of the model that `config` describes; None where they are not known.

    Raises FormatError as `expected_tensors` does.
    """
    model = architecture_of(config)
    if model is None or model.names is None or (model.experts is None and not model.kinds):
        return model.names if model is not None else None
    sizes = expected_tensors(config)
    names = replace(model.names, kinds=tuple(sizes.kinds))
    if model.experts is None:
        return names
    mixture = _mixture(model.experts, sizes.experts, sizes.experts_of_token)
    return replace(names, mixtures=tuple(mixture if sparse else None for sparse in sizes.is_sparse))


def _mixture(experts: Experts, count: int, each: int) -> Mixture:
    of_shared = {name for mlp in experts.shared_mlps for name in (*mlp.readers, mlp.down)}
    gates = (name for name in experts.shared if name not in of_shared)
    return Mixture(
        experts=tuple(experts.mlp.below(f"{experts.prefix}.{i}") for i in range(count)),
        shared=experts.shared_mlps,
        routers=(experts.router, *gates),
        each=each,
    )

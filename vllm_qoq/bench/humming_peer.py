# mypy: disable-error-code="import-not-found, import-untyped"
"""The kernels of humming (PyPI: humming-kernels), int4 weights and int8 inputs, as in vLLM.

humming compiles a kernel per layer and range of tokens. Left alone it compiles all of a layer's
ranges at the first call, 16 kernels or so. Here each number of tokens names its kernel, the one
that humming would choose, and all are compiled before anything is measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch


def layer(weight: torch.Tensor, group_size: int) -> Any:
    """Make a layer of humming that holds a weight, bf16 [N, K] on the GPU, as int4.

    group_size  128, or 0 for a scale per channel
    """
    from humming.layer import HummingLayer

    n, k = weight.shape
    made = HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config=_weight_config(group_size),
        input_config=_input_config(),
        torch_dtype=torch.bfloat16,
    ).cuda()
    made.load_from_unquantized(weight)
    made.transform()
    return made


def arguments(x: torch.Tensor, made: Any) -> dict[str, Any]:
    """Make the arguments of a call of a layer for x, bf16 [M, K]: codes, scales, kernel."""
    from humming import ops

    codes, scale = ops.quant_input(inputs=x, dtype="int8", group_size=None)
    # The kernel is given in a list of ranges of M, as humming has them. Given alone, it would not
    # be loaded where another thread has compiled it.
    kernels = json.dumps([[0, 1 << 30, _kernel(made, x.shape[0])]])
    return {"inputs": codes, "input_scale": scale, "tuning_config": kernels}


def compilations(
    group_size: int, shapes: Sequence[tuple[int, int]], tokens: Sequence[int]
) -> list[Callable[[], object]]:
    """List calls that compile what layers (N, K) need for numbers of tokens, in any thread.

    Each compiles one kernel.

    humming keeps what is compiled, in memory and under ~/.humming, and loads it at the first use.
    """
    from humming.kernel.humming import HummingKernel
    from humming.layer import HummingLayerMethod
    from humming.schema import BaseInputSchema, BaseWeightSchema

    configs: dict[str, dict[str, Any]] = {}
    for n, k in shapes:
        empty = torch.nn.Module()
        meta = HummingLayerMethod.prepare_layer_meta(
            *(empty, n, k, BaseWeightSchema.from_config(_weight_config(group_size))),
            BaseInputSchema.from_config(_input_config()),
            torch_dtype=torch.bfloat16,
        )
        for m in tokens:
            config = json.loads(meta.to_str()) | _kernel(empty, m)
            # These two are no part of the kernel.
            config.pop("sublayer_name", None)
            config.pop("num_sms", None)
            configs[json.dumps(config, sort_keys=True)] = config
    return [partial(HummingKernel, **config) for config in configs.values()]


def _kernel(made: Any, m: int) -> dict[str, Any]:
    """The config of the kernel that humming runs a layer with for m tokens."""
    from humming.layer import HummingLayerMethod

    ranges = HummingLayerMethod.get_default_tuning_configs(made)
    found: dict[str, Any] = next(config for above, last, config in ranges if above < m <= last)
    return found


def _weight_config(group_size: int) -> dict[str, Any]:
    return {"quant_method": "humming", "dtype": "int4", "group_size": group_size}


def _input_config() -> dict[str, Any]:
    return {"quant_method": "humming", "dtype": "int8"}

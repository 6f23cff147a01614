"""Opening a LoRA adapter in the format of PEFT that nobody vouches for.

Nothing is unpickled: the weights are a safetensors file. Whatever an adapter changes besides the
products of linear layers is refused by name, because it would be lost without a sign.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_qoq.checkpoint.adapter_mark import CONFIG, CONFIG_BYTES, KEY
from vllm_qoq.checkpoint.folder import TensorInfo, check_link, read_header, read_json
from vllm_qoq.checkpoint.hub import is_to_download
from vllm_qoq.errors import FormatError, UserError, shown

WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_PICKLES = ("adapter_model.bin", "adapter_model.pt")
_DTYPES = ("F32", "BF16", "F16", "F64")
# Ways to begin a training that change the weights of the model, too.
_CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq")
# What PEFT may have an adapter do besides, by the key of its config.
_REFUSED = {
    "modules_to_save": "whole modules beside the adapter",
    "use_dora": "DoRA",
    "lora_bias": "biases",
    "fan_in_fan_out": "weights stored as [in, out]",
    "target_parameters": "parameters of experts",
    "trainable_token_indices": "tokens of the embedding",
    "layer_replication": "layers used several times",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "use_bdlora": "block-diagonal matrices",
}


@dataclass(frozen=True)
class Pair:
    """The two matrices of a layer, W + scaling * B @ A, as the header describes them."""

    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True)
class Adapter:
    """An adapter of linear layers.

    config  adapter_config.json
    pairs   name of the layer in the model -> its matrices, A [r, K] and B [N, r]
    """

    path: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, Pair]

    @classmethod
    def open(cls, path: str | Path) -> Adapter:
        """Read the config and the header of the folder `path`; UserError for what is refused.

        A link out of the folder is, as in a checkpoint, because an output is made of both files.
        """
        path = Path(path)
        if not path.is_dir():
            hint = ""
            if is_to_download(path):
                hint = f"; an adapter of the Hub comes by `hf download {path} --local-dir DIR`"
            raise UserError(f"{path}: not a folder; give the folder that has {CONFIG} in it{hint}")
        if not (path / WEIGHTS).exists():
            for pickle in _PICKLES:
                if (path / pickle).exists():
                    raise UserError(
                        f"{path}: {pickle}: pickle files can run code and are not read; save the "
                        "adapter as safetensors (PEFT: save_pretrained) where that may run"
                    )
        try:
            for file in (CONFIG, WEIGHTS):
                check_link(path, path / file)
            config = read_json(path / CONFIG, CONFIG_BYTES)
            _check_config(config)
            _check_numbers(config)
            pairs = _pairs(read_header(path / WEIGHTS))
            _check_ranks(config, pairs)
            return cls(path, config, pairs)
        except FormatError as error:
            raise UserError(f"{path}: {error}") from None


def _check_config(config: Mapping[str, Any]) -> None:
    if KEY in config:
        raise FormatError(
            f"{CONFIG}: {KEY}: this adapter was converted already; give the one that was trained"
        )
    kind = config.get("peft_type")
    if kind != "LORA":
        raise FormatError(f"{CONFIG}: peft_type: {shown(kind)} is not converted; give a LORA")
    for key, what in _REFUSED.items():
        if config.get(key):
            raise FormatError(
                f"{CONFIG}: {key}: {what} cannot be converted; train an adapter without, or merge "
                "this one into the model before quantizing"
            )
    if config.get("bias") not in (None, "none"):
        raise FormatError(
            f"{CONFIG}: bias: {shown(config['bias'])}: biases cannot be converted; train an "
            "adapter with bias 'none', or merge this one into the model before quantizing"
        )


def _check_numbers(config: Mapping[str, Any]) -> None:
    """Raise FormatError unless the adapter's scaling is a number, which vLLM takes as it is."""
    numbers = {key: config.get(key) for key in ("r", "lora_alpha")}
    for key in ("rank_pattern", "alpha_pattern"):  # of single layers
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            raise FormatError(f"{CONFIG}: {key}: is not a JSON object, {{...}}; save it again")
        numbers |= {f"{key}: {layers}": value for layers, value in pattern.items()}
    for key, value in numbers.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < float(value or 0) < math.inf:
            raise FormatError(
                f"{CONFIG}: {key}: {shown(value)} is not a positive number; save the adapter again"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_WEIGHTS):
        raise FormatError(
            f"{CONFIG}: init_lora_weights: {shown(start)} changes the weights of the model that is "
            "trained; convert the adapter to a plain one first (PEFT: "
            "path_initial_model_for_weight_conversion)"
        )


def _check_ranks(config: Mapping[str, Any], pairs: Mapping[str, Pair]) -> None:
    """Raise FormatError where the scaling, lora_alpha / r, is not that of the matrices."""
    pattern = config.get("rank_pattern") or {}
    ranks = {config["r"], *pattern.values()}
    others = sorted(ranks - {config["r"]})
    of_patterns = f" and of rank_pattern {others}" if others else ""
    for layer, pair in pairs.items():
        if pair.a.shape[0] not in ranks:
            raise FormatError(
                f"{CONFIG}: r is {config['r']}{of_patterns}, but the matrices of {layer} are of "
                f"rank {pair.a.shape[0]}; save the adapter again"
            )


def _pairs(header: Any) -> dict[str, Pair]:
    found: dict[str, dict[str, TensorInfo]] = {}
    for info in header:
        end = next((end for end in (_A, _B) if info.name.endswith(end)), None)
        if end is None:
            raise FormatError(
                f"{WEIGHTS}: {shown(info.name)}: only matrices of linear layers (*{_A}, *{_B}) can "
                "be converted; train an adapter of linear layers alone, or merge this one into the "
                "model before quantizing"
            )
        if info.dtype not in _DTYPES or len(info.shape) != 2 or 0 in info.shape:
            raise FormatError(
                f"{WEIGHTS}: {info.name}: is {info.dtype} {list(info.shape)}, expected a matrix of "
                f"{', '.join(_DTYPES)}"
            )
        pair = found.setdefault(info.name.removeprefix(_PREFIX).removesuffix(end), {})
        if end in pair:
            raise FormatError(
                f"{WEIGHTS}: {pair[end].name} and {info.name} are of one layer; save the adapter "
                "again"
            )
        pair[end] = info
    if not found:
        raise FormatError(f"{WEIGHTS}: holds no matrices of an adapter")
    for layer, pair in found.items():
        if len(pair) < 2:
            (info,) = pair.values()
            raise FormatError(f"{WEIGHTS}: {info.name}: the other matrix of {layer} is missing")
        if pair[_A].shape[0] != pair[_B].shape[1]:
            raise FormatError(
                f"{WEIGHTS}: {layer}: lora_A is {list(pair[_A].shape)} and lora_B "
                f"{list(pair[_B].shape)}, which are of different ranks"
            )
    return {layer: Pair(pair[_A], pair[_B]) for layer, pair in found.items()}

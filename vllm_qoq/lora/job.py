"""The conversion of an adapter from start to end: check, change, write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from vllm_qoq.checkpoint import hub, transforms
from vllm_qoq.checkpoint.adapter_mark import CONFIG, CONFIG_BYTES, KEY, Mark
from vllm_qoq.checkpoint.folder import Checkpoint, TensorInfo, read_json
from vllm_qoq.checkpoint.format import Section
from vllm_qoq.checkpoint.output import check_output
from vllm_qoq.checkpoint.replace import LOCK, replacing
from vllm_qoq.checkpoint.writer import sync_folder, write_bytes, write_json
from vllm_qoq.errors import FormatError, UserError, shown
from vllm_qoq.lora.adapter import WEIGHTS, Adapter
from vllm_qoq.models.mixtures import names_of
from vllm_qoq.models.names import split_decoder
from vllm_qoq.models.tensors import expected_tensors
from vllm_qoq.models.vision import language_config, language_name, vision_language

if TYPE_CHECKING:
    import torch

_MERGE = "merge the adapter into the model before quantizing"
_AS_IT_IS = "serve the adapter as it is"
# What vLLM's --max-lora-rank may be.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    output  the folder of the adapter
    layers  the layers that it changes, as the adapter names them
    basis   a digest of the transforms, which `adapter_config.json` has, too
    max_lora_rank  the least `--max-lora-rank` of vLLM that takes the adapter
    """

    output: Path
    layers: tuple[str, ...]
    basis: str
    max_lora_rank: int


def convert_lora(
    adapter: str | Path,
    checkpoint: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    quiet: bool = True,
) -> Converted:
    """Bring a LoRA adapter of a model into the basis of the checkpoint that was quantized of it.

    adapter     folder of PEFT: adapter_config.json and adapter_model.safetensors
    checkpoint  folder, or id on the Hub, of what `quantize` made of the model that the adapter was
                trained on
    output      the folder to make, an adapter that vLLM serves with this checkpoint
    overwrite   replace an older output, if it is ours
    quiet       show no progress of a download

    Raises UserError with what is wrong and what to do; an output is complete or absent.
    """
    out = Path(output)
    check_output(out, [Path(adapter)], overwrite, _foreign)
    opened = Adapter.open(adapter)
    weights = Checkpoint.open(hub.local_folder(checkpoint, quiet=quiet))
    check_output(out, [Path(adapter), weights.path], overwrite, _foreign)
    found = _transforms(weights)
    places = _places(opened, weights.config)
    basis = transforms.digest(weights.path / transforms.FILE)
    mark = Mark(hub.name_of(weights.path.resolve()), basis)
    tensors = _changed(opened, places, weights.config, found)

    from safetensors.torch import save

    with replacing(out, overwrite, _foreign) as folder:
        write_bytes(folder / WEIGHTS, save(tensors, {"format": "pt"}))
        write_json(folder / CONFIG, {**opened.config, KEY: mark.to_json()})
        sync_folder(folder)
    rank = max(int(opened.config["r"]), *(pair.a.shape[0] for pair in opened.pairs.values()))
    least = next((most for most in _RANKS if most >= rank), rank)
    return Converted(out, tuple(opened.pairs), basis, least)


def _transforms(checkpoint: Checkpoint) -> transforms.Transforms:
    """Read what was done to the weights; UserError where that is not known, or nothing."""
    path, section = checkpoint.path, checkpoint.section
    found = transforms.read(checkpoint) if isinstance(section, Section) else None
    if found is not None:
        return found
    if not isinstance(section, Section):
        raise UserError(
            f"{path}: has no quantized weights of ours, so its basis is the model's; {_AS_IT_IS}"
        )
    reason = transforms.in_folder(path)
    if section.stream is not None:
        reason = "its residual stream is rotated"
    if reason is not None:
        raise UserError(
            f"{path}: {reason}, and it holds no {transforms.FILE}, which says how: an older "
            f"version or another command made it; quantize the model again, or {_MERGE}"
        )
    if section.input_ratio:
        raise UserError(
            f"{path}: its sets were smoothed by another tool (input_ratio), which leaves nothing "
            f"to convert with; merge with --prefill of a set that has the norms of the model, and "
            f"{_AS_IT_IS}, or {_MERGE}"
        )
    raise UserError(
        f"{path}: no conversion is needed: its weights were not transformed, as far as it tells. "
        f"{_AS_IT_IS.capitalize()}, unless another tool smoothed the model first"
    )


def _places(adapter: Adapter, config: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Find block and layer of each pair of matrices; UserError for those that have none."""
    is_whole = vision_language(config) is not None
    config = language_config(config)
    names, model = names_of(config), expected_tensors(config)
    assert names is not None  # or the transforms would have been refused
    if names.mixtures:
        raise UserError(
            f"{adapter.path}: adapters on a model with mixtures of experts are not served; {_MERGE}"
        )
    places = {}
    for layer, pair in adapter.pairs.items():
        name = language_name(layer) if is_whole else layer
        place = split_decoder(name) if name is not None else None
        if place is None or place[0] != f"{names.blocks}." or place[1] >= model.layers:
            raise _no_layer(adapter, layer, names.of_block(0).linears)
        _, index, own = place
        if own not in names.of_block(index).linears:
            raise _no_layer(adapter, layer, names.of_block(index).linears)
        size = model.of_layer(index)[f"{own}.weight"]
        if (pair.b.shape[0], pair.a.shape[1]) != size:
            raise UserError(
                f"{adapter.path}: {WEIGHTS}: {layer}: is for a weight of "
                f"{[pair.b.shape[0], pair.a.shape[1]]}, and the model's is {list(size)}; give the "
                "checkpoint of the model that the adapter was trained on"
            )
        places[layer] = (index, own)
    return places


def _no_layer(adapter: Adapter, layer: str, linears: tuple[str, ...]) -> UserError:
    return UserError(
        f"{adapter.path}: {WEIGHTS}: {shown(layer)}: is none of the layers that can be converted: "
        f"{', '.join(linears)} of each block; train an adapter of these alone, or {_MERGE}"
    )


def _changed(
    adapter: Adapter,
    places: Mapping[str, tuple[int, str]],
    config: Mapping[str, Any],
    found: transforms.Transforms,
) -> dict[str, torch.Tensor]:
    """Change all matrices, in float64, and round them to the dtypes that they had."""
    from vllm_qoq.lora.basis import Basis

    basis = Basis(language_config(config), found)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(adapter.path / WEIGHTS, "pt") as file:
        for layer, (index, own) in places.items():
            pair = adapter.pairs[layer]
            for info, change in ((pair.a, basis.inputs), (pair.b, basis.outputs)):
                given = file.get_tensor(info.name)
                if not given.isfinite().all():
                    raise UserError(
                        f"{adapter.path}: {WEIGHTS}: {info.name}: holds NaN or infinity; train the "
                        "adapter again, or take an earlier checkpoint of its training"
                    )
                exact = change(index, own, given.double())
                changed = exact.to(given.dtype).contiguous()
                if not changed.isfinite().all():
                    raise _too_large(adapter, info, given, exact)
                tensors[info.name] = changed
    return tensors


def _too_large(
    adapter: Adapter, info: TensorInfo, given: torch.Tensor, exact: torch.Tensor
) -> UserError:
    import torch

    before, after = float(given.abs().max()), float(exact.abs().max())
    limit = torch.finfo(given.dtype).max
    remedy = "save the adapter in float32" if info.dtype == "F16" else "train it again"
    return UserError(
        f"{adapter.path}: {WEIGHTS}: {info.name}: holds numbers up to {before:g}, which the "
        f"conversion makes as large as {after:g}, beyond the {limit:g} of {info.dtype}; {remedy}"
    )


def _foreign(folder: Path) -> str | None:
    """Say why a folder is no adapter that `convert_lora` made; None where it is."""
    names = {item.name for item in folder.iterdir()} - {LOCK}
    if others := sorted(names - {CONFIG, WEIGHTS}):
        return f"holds {others[0]}, which is no part of a converted adapter"
    try:
        is_ours = KEY in read_json(folder / CONFIG, CONFIG_BYTES) if names else True
    except (FormatError, OSError):
        is_ours = False
    return None if is_ours else "is no adapter that convert-lora made"

"""What was done to the weights of a model before they were rounded, for adapters trained on it.

`quantize` turns, scales and reorders the inputs and outputs of the linear layers, which leaves the
function of the model as it is. A LoRA adapter that was trained on the model has to be changed
alike. So what depends on the model is stored beside the weights, in a file that servers do not
read: it is not in the index. Where there is no index, vLLM takes all files of a folder, and the
plugin drops what has `transforms.` in front.

    qoq_transforms.safetensors, with "transforms_version": "1" in its metadata

    transforms.model.layers.0.input_layernorm.folded  float32 [H]  what those behind the norm took
    transforms.model.layers.0.key_scale               float32 [heads of K, D]
    transforms.model.layers.0.value_scale             float32 [heads of K, D]
    transforms.model.layers.0.mlp.down_proj.scale     float32 [inner]
    transforms.model.layers.0.mlp.down_proj.order     int32 [inner]
    transforms.value_rotation                         int8 [D, D]  R2 * sqrt(D)
    transforms.weights                                uint8 [32]  `weights_digest` of the checkpoint

H is the size of the residual stream, D that of a head. The names are those of the language model by
itself. For a weight W [N, K] of the original model, with R1 the rotation of the stream
(`stream.rotation`, `vllm_qoq.checkpoint.format`), these follow each other:

    columns of what reads the stream   W * folded @ R1
    rows of what writes it             R1.T @ W
    rows of k and of its q heads       W / key_scale, W * key_scale; where norms follow q and k,
                                       these have it, and the rows stay
    rows of v, columns of o            W / value_scale, W * value_scale; then R2.T @ W, W @ R2 in
                                       every head
    rows of up, columns of down        W / scale, W * scale
    columns of o of linear attention   W * scale, whose norm was divided by it
    rows of gate and up, columns       W[order], W[:, order]
      of down

A step that was not taken has no tensors, and an expert that no text went through has none. Another
run of `quantize`, on other text or with other options, transforms the same model in another way; by
`weights` its file is told from that of the weights here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from vllm_qoq.checkpoint.folder import Checkpoint, TensorInfo, read_header, read_json
from vllm_qoq.checkpoint.format import STREAM, TRANSFORMS, Section
from vllm_qoq.checkpoint.weights_digest import weights_digest
from vllm_qoq.errors import FormatError, shown
from vllm_qoq.models.mixtures import names_of
from vllm_qoq.models.names import split_expert
from vllm_qoq.models.tensors import expected_tensors
from vllm_qoq.models.vision import language_config

if TYPE_CHECKING:
    import torch

FILE = "qoq_transforms.safetensors"
REPORT = "quantization_report.json"
VALUE_ROTATION = "value_rotation"
WEIGHTS = "weights"
FOLDED, KEY_SCALE, VALUE_SCALE, SCALE, ORDER = (
    *("folded", "key_scale", "value_scale"),
    *("scale", "order"),
)

_PREFIX = f"{TRANSFORMS}."
_VERSION_KEY, _VERSION = "transforms_version", "1"
# Of several keys the library would write any first.
_METADATA = {_VERSION_KEY: _VERSION}

_REPORT_BYTES = 256 << 20
_REMEDY = "download or quantize the model again"
_OR_WITHOUT = "or remove the file, without which no adapter can be converted"
# Options of `quantize` that bring the weights into another basis.
_STEPS = ("rotate", "smooth_outputs", "reorder")


@dataclass(frozen=True)
class Transforms:
    """The transforms of one checkpoint.

    tensors   those of the file, by name without `transforms.`
    rotation  int8 [H, H]: R1 * sqrt(H); None where the stream is the original model's
    """

    tensors: Mapping[str, torch.Tensor]
    rotation: torch.Tensor | None

    def of(self, place: str) -> torch.Tensor | None:
        """Find a tensor by its name; None where the step was not taken."""
        return self.tensors.get(place)


def encoded(tensors: Mapping[str, torch.Tensor], weights: torch.Tensor) -> bytes:
    """Make the content of the file.

    tensors  by name without `transforms.`
    weights  the `weights_digest` of the checkpoint
    """
    from safetensors.torch import save

    every = {**tensors, WEIGHTS: weights}
    return save({_PREFIX + name: tensor for name, tensor in every.items()}, _METADATA)


def digest(file: Path) -> str:
    """Digest such a file: 16 hex digits, which an adapter that was converted with it has, too."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def read(checkpoint: Checkpoint) -> Transforms | None:
    """Read the transforms of a checkpoint, checked; None where it has none.

    Raises FormatError for what is not as it should be.
    """
    for finding in chain(structure(checkpoint), contents(checkpoint)):
        raise FormatError(f"{checkpoint.path}: {finding}")
    if not _is_there(checkpoint.path):
        return None
    with safe_open(checkpoint.path / FILE, "pt") as file:
        names = file.keys()
        tensors = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in names}
    name = f"{STREAM}.rotation"
    rotation = checkpoint.get(name) if name in checkpoint.tensors else None
    return Transforms(tensors, rotation)


def in_folder(folder: Path) -> str | None:
    """Say why the weights of a folder are not in the original model's basis; None if they may be.

    Without the file, the report of an older `quantize` tells.
    """
    if _is_there(folder):
        return f"its weights were transformed ({FILE})"
    report = folder / REPORT
    if not report.is_file():
        return None
    options = read_json(report, _REPORT_BYTES).get("options")
    if not isinstance(options, dict):
        return None
    steps = [step for step in _STEPS if options.get(step)]
    if options.get("smooth_attention") and options.get("kv_bits") != 16:
        steps.append("smooth_attention")
    return f"its weights were transformed ({REPORT}: {', '.join(steps)})" if steps else None


def structure(checkpoint: Checkpoint) -> Iterator[str]:
    """Find what is wrong with names, dtypes and shapes; nothing for a checkpoint without any."""
    if not _is_there(checkpoint.path):
        return
    try:
        found = {info.name: info for info in read_header(checkpoint.path / FILE)}
        with safe_open(checkpoint.path / FILE, "pt") as file:
            version = (file.metadata() or {}).get(_VERSION_KEY)
    except (SafetensorError, OSError) as error:
        yield f"{FILE}: {error}; {_REMEDY}"
        return
    except FormatError as error:
        yield str(error)
        return
    if version != _VERSION:
        yield (
            f"{FILE}: {_VERSION_KEY} is {shown(version)}, and this version of vllm-qoq reads "
            f"{_VERSION!r}; use the version that made the checkpoint, or quantize the model again"
        )
        return
    expected = _expected(checkpoint.config)
    for name, info in found.items():
        if name not in expected:
            yield f"{FILE}: {shown(name)}: is no transform of this model; {_REMEDY}"
        elif (info.dtype, info.shape) != expected[name]:
            dtype, shape = expected[name]
            yield (
                f"{FILE}: {name}: is {info.dtype} {list(info.shape)}, expected {dtype} "
                f"{list(shape)}; {_REMEDY}"
            )
    yield from _missing(found, expected)
    if _PREFIX + WEIGHTS not in found:
        yield (
            f"{FILE}: {_PREFIX}{WEIGHTS}: missing, so nothing says that the file is of the weights "
            f"beside it; quantize the model again, {_OR_WITHOUT}"
        )
    section = checkpoint.section
    is_stored = isinstance(section, Section) and section.stream is not None
    if is_stored != any(name.endswith(f".{FOLDED}") for name in found):
        has = "has none" if is_stored else "has some"
        yield f"{FILE}: {has} of the norms that a rotation of the stream folds; {_REMEDY}"


def contents(checkpoint: Checkpoint) -> Iterator[str]:
    """Find what is wrong with the numbers; nothing where `structure` has findings already."""
    import torch

    from vllm_qoq.numerics import rotation

    if not _is_there(checkpoint.path) or any(structure(checkpoint)):
        return
    with safe_open(checkpoint.path / FILE, "pt") as file:
        for name in sorted(file.keys()):
            tensor, leaf = file.get_tensor(name), name.rpartition(".")[2]
            if leaf == WEIGHTS:
                continue
            if leaf == VALUE_ROTATION:
                wrong = rotation.finding(tensor)
            elif leaf == ORDER:
                each = torch.arange(len(tensor), dtype=tensor.dtype)
                wrong = None if torch.equal(tensor.sort()[0], each) else "is no order of channels"
            elif not tensor.isfinite().all():
                wrong = "holds NaN or infinity"
            else:
                is_sound = leaf == FOLDED or (tensor > 0).all()
                wrong = None if is_sound else "holds a scale that is not positive"
            if wrong:
                yield f"{FILE}: {name}: {wrong}; {_REMEDY}"
    yield from belongs(checkpoint)


def belongs(checkpoint: Checkpoint) -> Iterator[str]:
    """Find whether the file is of other weights than those beside it. Reads little of either."""
    import torch

    own = weights_digest(checkpoint.tensors.values(), checkpoint.get)
    with safe_open(checkpoint.path / FILE, "pt") as file:
        if not torch.equal(file.get_tensor(_PREFIX + WEIGHTS), own):
            yield (
                f"{FILE}: is of other weights than those beside it, such as those of another run "
                f"of quantize; put back the file of these, or quantize the model again, "
                f"{_OR_WITHOUT}"
            )


def _is_there(folder: Path) -> bool:
    return (folder / FILE).is_file()


def _expected(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Map each tensor that the file may have to its dtype and shape."""
    config = language_config(config)
    names = names_of(config)
    if names is None:
        return {}
    model = expected_tensors(config)
    heads = model.key_heads
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        VALUE_ROTATION: ("I8", (heads[1], heads[1])),
        WEIGHTS: ("U8", (32,)),
    }
    for index in range(model.layers):
        block, layers = f"{names.blocks}.{index}", names.of_block(index)
        sizes = model.of_layer(index)
        for norm in layers.norms:
            found[f"{block}.{norm}.{FOLDED}"] = ("F32", sizes[f"{norm}.weight"])
        for name in (KEY_SCALE, VALUE_SCALE) if layers.has_keys else ():
            found[f"{block}.{name}"] = ("F32", heads)
        for layer in layers.smoothed:
            found[f"{block}.{layer}.{SCALE}"] = ("F32", sizes[f"{layer}.weight"][1:])
        for mlp in layers.mlps:
            found[f"{block}.{mlp.down}.{ORDER}"] = ("I32", sizes[f"{mlp.down}.weight"][1:])
    return {_PREFIX + name: kind for name, kind in found.items()}


def _missing(
    found: Mapping[str, TensorInfo], expected: Mapping[str, tuple[str, tuple[int, ...]]]
) -> Iterator[str]:
    """Find blocks that lack a transform which another block has."""
    taken = {_step(name) for name in found}
    for name in expected:
        place = name.rpartition(".")[0]
        if name not in found and _step(name) in taken and split_expert(place) is None:
            yield f"{FILE}: {name}: missing, other layers have one; {_REMEDY}"


def _step(name: str) -> str:
    return name.rpartition(".")[2]

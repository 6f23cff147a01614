"""Checks of a job by config.json, headers and texts, without torch or what imports it.

A mistyped path therefore costs no seconds of imports. `load` checks what needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_qoq.checkpoint import constants, hub, processor
from vllm_qoq.checkpoint.constants import is_finite, is_positive
from vllm_qoq.checkpoint.folder import Checkpoint, TensorInfo, side_files
from vllm_qoq.checkpoint.language import language_part, stored_name
from vllm_qoq.checkpoint.output import check_output
from vllm_qoq.errors import shown
from vllm_qoq.models.config import CONFIG
from vllm_qoq.models.linears import CONSTANT, LinearLayers, linear_layers
from vllm_qoq.models.names import split_decoder
from vllm_qoq.models.table import LayerNames
from vllm_qoq.models.tensors import EMBEDDING, HEAD
from vllm_qoq.quantizer import QuantizeError
from vllm_qoq.quantizer.gguf_source import convert
from vllm_qoq.quantizer.model import Dimensions, architecture, layer_names
from vllm_qoq.quantizer.towers import check_writers
from vllm_qoq.text_file import check_text

if TYPE_CHECKING:
    from vllm_qoq.quantizer.options import QuantizeOptions
    from vllm_qoq.quantizer.plan import Job

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""The dtypes in which a model may run and be stored: torch's name -> safetensors' name."""

_REMEDY = "mend it, or download the model again"
_POSITIVE = ("rope_theta", "rope_local_base_freq", "factor", "original_max_position_embeddings")
_ACTIVATIONS = ("hidden_act", "hidden_activation")
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# What changes the computation of a model in a way that no entry of the table has.
_REFUSED = ("use_bidirectional_attention", "use_qk_norm", "layer_scale")
_GATE, _LINEAR_GATE = "attn_output_gate", "output_gate_type"
_SILU = (None, "silu", "swish")
# Every tokenizer has at least one of these files, whatever its class.
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json"),
)


@dataclass(frozen=True)
class Inputs:
    """A model whose headers are what its config.json says.

    linears  (outputs, inputs) of every layer to quantize, by its name and block by block
    """

    checkpoint: Checkpoint
    names: LayerNames
    dimensions: Dimensions
    linears: dict[str, tuple[int, int]]


def with_local_model(job: Job, model: str | Path) -> Job:
    """Give a job the folder of `model`, which may be an id of the Hugging Face Hub, or GGUF.

    A model in GGUF is converted beside the output, into OUT with .float behind. The rest of the job
    is checked before a download or a conversion: it takes minutes, and a mistyped name of a text
    should not.
    """
    if convert.is_gguf(Path(model)) and not Path(model).exists():
        raise QuantizeError(f"{model}: no such file; correct the path of the GGUF file")
    if hub.is_to_download(model):
        _check_others(job, [])
    folder = hub.local_folder(model, quiet=job.quiet)
    file = convert.gguf_file(folder)
    if file is None:
        return replace(job, model=folder)
    _check_others(job, [folder] if folder.is_dir() else [])
    resolved = job.out.resolve()
    converted = resolved.parent / f"{resolved.name}.float"
    convert.convert(file, converted, quiet=job.quiet)
    return replace(job, model=converted)


def check_inputs(job: Job) -> Inputs:
    """Open the model; a UserError names what cannot be quantized or would be lost."""
    whole = Checkpoint.open(job.model)
    inputs = check_model(language_part(whole), "quantized")
    if lacks := processor.finding(whole.path, whole.config):
        raise QuantizeError(f"{whole.path}: {lacks}")
    _check_others(job, [job.model])
    return inputs


def check_model(checkpoint: Checkpoint, task: str) -> Inputs:
    """Hold a model in floating point against its config.json; a UserError names what is wrong.

    task  what is to be done to the model, "quantized": a participle for the messages
    """
    config, folder = checkpoint.config, checkpoint.path
    names, model = layer_names(config), linear_layers(config, task)
    _check_dtype(config)
    _check_rope(config, names)
    _check_constants(config, names)
    _check_tensors(checkpoint, model)
    check_writers(checkpoint, model.others[EMBEDDING][1])
    checkpoint.check_links()
    files = {str(file) for file in side_files(folder)}
    if not files.intersection(_TOKENIZERS):
        raise QuantizeError(
            f"{folder}: has no tokenizer ({', '.join(_TOKENIZERS)}); copy the model's "
            "tokenizer.json and tokenizer_config.json there"
        )
    dimensions = Dimensions.of(config)
    layers = (
        f"{names.blocks}.{i}.{name}"
        for i in range(dimensions.layers)
        for name in names.of_block(i).linears
    )
    linears = {layer: model.linears[layer] for layer in layers}
    return Inputs(checkpoint, names, dimensions, linears)


def _check_others(job: Job, inputs: Iterable[Path]) -> None:
    """Check the output, which may not overlap `inputs`, and the texts."""
    check_output(job.out, inputs, job.overwrite)
    check_text("--text", job.text)
    if job.eval_text is not None:
        check_text("--eval-text", job.eval_text)


def dtype_name(config: Mapping[str, Any]) -> str | None:
    """The dtype in which config.json runs the model, by torch's name; None where it is silent."""
    value = config.get("dtype") or config.get("torch_dtype")
    return value if isinstance(value, str) else None


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the embedding of the model serves as its lm_head."""
    said = config.get("tie_word_embeddings")
    return architecture(config).is_tied if said is None else bool(said)


def stays_tied(is_tied: bool, options: QuantizeOptions) -> bool:
    """Whether the embedding of a model that `is_tied` serves as lm_head in the output, too.

    The rotation makes two matrices E R and E diag(norm) R of it, and int8 one of codes.
    """
    return is_tied and not options.turns_stream and options.lm_head_bits == 16


def _check_dtype(config: Mapping[str, Any]) -> None:
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if value is not None and dtype_name({"dtype": value}) not in DTYPES:
            raise QuantizeError(
                f"{CONFIG}: {key}: {shown(value)} is not supported; give the model in one of "
                f"{', '.join(DTYPES)}"
            )


def _check_rope(config: Mapping[str, Any], names: LayerNames) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if value is not None and not isinstance(value, dict):
            raise QuantizeError(f"{CONFIG}: {key}: {shown(value)} is not an object; {_REMEDY}")
        for name, entry in (value or {}).items():
            # Where layers differ, each kind has an object of its own.
            parts = entry.items() if isinstance(entry, dict) else [("", entry)]
            for part, leaf in parts:
                _check_rope_value(f"{key}.{name}.{part}".rstrip("."), leaf, names)
    for key in ("rope_theta", "rope_local_base_freq", "partial_rotary_factor"):
        _check_rope_value(key, config.get(key), names)


def _check_rope_value(key: str, value: object, names: LayerNames) -> None:
    leaf = key.rpartition(".")[2]
    if leaf == "partial_rotary_factor" and value not in (None, 1) and not names.is_rope_partial:
        # vLLM would turn this part of each head, transformers the whole of it.
        raise QuantizeError(
            f"{CONFIG}: {key}: {shown(value)} is not supported: transformers turns whole heads of "
            "this model; give another model"
        )
    if leaf == "partial_rotary_factor":
        is_fine = value is None or (is_positive(value) and value <= 1)
    elif leaf in ("rope_type", "type"):
        is_fine = value is None or isinstance(value, str)
    elif leaf in _POSITIVE:
        is_fine = value is None or is_positive(value)
    elif isinstance(value, list):
        is_fine = all(map(is_positive, value))
    else:
        is_fine = value is None or isinstance(value, (bool, str)) or is_finite(value)
    if not is_fine:
        raise QuantizeError(f"{CONFIG}: {key}: {shown(value)} cannot be; {_REMEDY}")


def _check_constants(config: Mapping[str, Any], names: LayerNames) -> None:
    keys = ("hidden_activation",) if names.has_wrong_hidden_act else _ACTIVATIONS
    for key in keys:
        activation = config.get(key, names.activation)
        is_absent = activation is None and key == "hidden_activation"
        if activation != names.activation and not is_absent:
            raise QuantizeError(
                f"{CONFIG}: {key}: {shown(activation)} is not supported: these models are "
                f"quantized with {names.activation!r} only; give another model"
            )
    for key in _REFUSED:
        if config.get(key):
            raise QuantizeError(
                f"{CONFIG}: {key}: {shown(config[key])} is not supported; give another model"
            )
    if names.has_output_gate and config.get(_GATE, True) is not True:
        raise QuantizeError(
            f"{CONFIG}: {_GATE}: {shown(config[_GATE])} is not supported: transformers computes a "
            "gate in every attention of this model; give another model"
        )
    if names.linear is not None and config.get(_LINEAR_GATE, "silu") not in _SILU:
        raise QuantizeError(
            f"{CONFIG}: {_LINEAR_GATE}: {shown(config[_LINEAR_GATE])} is not supported: "
            "transformers computes 'silu' in the linear attention of this model; give another model"
        )
    for key in _CAPS:
        if config.get(key) is not None and not is_positive(config[key]):
            raise QuantizeError(
                f"{CONFIG}: {key}: {shown(config[key])} is no positive number and not null; "
                f"{_REMEDY}"
            )
    for finding in constants.findings(config):
        raise QuantizeError(finding)


def _check_tensors(checkpoint: Checkpoint, model: LinearLayers) -> None:
    """Raise QuantizeError unless the tensors are those of the architecture, each with its shape."""
    wanted: dict[str, tuple[int, ...]] = {f"{x}.weight": nk for x, nk in model.linears.items()}
    wanted |= {f"{name}.bias": (model.linears[name][0],) for name in model.biased}
    wanted |= model.others
    tensors = checkpoint.tensors
    for name, info in sorted(tensors.items()):
        if name not in wanted and not name.endswith(CONSTANT):
            raise QuantizeError(_surplus(name, info, checkpoint.config))
    for name, shape in wanted.items():
        if name not in tensors:
            if name == HEAD and model.is_tied:
                continue
            place = stored_name(name, tensors)
            raise QuantizeError(f"{checkpoint.path}: {place} is missing; {_missing(name)}")
        info = tensors[name]
        if info.dtype not in DTYPES.values():
            raise QuantizeError(
                f"{info.file}: {info.name}: is {info.dtype}, but {', '.join(DTYPES.values())} can "
                "be quantized; give the model in bf16 or fp16"
            )
        if info.shape != shape:
            raise QuantizeError(
                f"{info.file}: {info.name}: is {list(info.shape)}, but {CONFIG} makes it "
                f"{list(shape)}; download both again, from one model"
            )


def _surplus(name: str, info: TensorInfo, config: Mapping[str, Any]) -> str:
    place, count = split_decoder(name), config["num_hidden_layers"]
    if place is not None and place[1] >= count:
        return (
            f"{info.file}: {info.name}: is beyond num_hidden_layers = {count} of {CONFIG}, so it "
            "would be lost; mend that number, or save the model without this layer"
        )
    return (
        f"{info.file}: {info.name}: {config['architectures'][0]} has no such tensor, so it would "
        "be lost; if the model may do without it, load and save it with transformers, which "
        "leaves it out"
    )


def _missing(name: str) -> str:
    if name == HEAD:
        return (
            f"download it again, or write tie_word_embeddings: true into {CONFIG} if the "
            "embedding serves as lm_head"
        )
    return "download it again"

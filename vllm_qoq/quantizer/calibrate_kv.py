"""The mean of K for a model that is there already: `vllm-qoq calibrate-kv`.

The weights stay as they are. Calibration text runs through the model in floating point, as in
`quantize`, and a copy of the checkpoint gets the mean of K of each layer, and the KV cache that
they are for in its config.json.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_qoq.checkpoint import card, hub, k_mean, transforms, values, verify
from vllm_qoq.checkpoint.folder import Checkpoint, TensorInfo, check_link, side_files
from vllm_qoq.checkpoint.format import (
    K_MEAN,
    QUANT_METHOD,
    SECTION,
    KVSection,
    Section,
    split_layer,
    split_name,
)
from vllm_qoq.checkpoint.kv_config import UNQUANTIZED, Bits, KVCache
from vllm_qoq.checkpoint.language import language_part
from vllm_qoq.checkpoint.output import check_output, check_space
from vllm_qoq.checkpoint.output_config import output_config
from vllm_qoq.checkpoint.shards import (
    MAX_SHARD_BYTES,
    Content,
    cut,
    total_bytes,
    write_checkpoint,
)
from vllm_qoq.checkpoint.stacked_experts import experts_apart
from vllm_qoq.errors import FormatError, shown
from vllm_qoq.models.config import CONFIG
from vllm_qoq.models.vision import vision_language
from vllm_qoq.progress import Clock, Progress
from vllm_qoq.quantizer import QuantizeError
from vllm_qoq.quantizer.gguf_source import convert
from vllm_qoq.quantizer.inputs import Inputs, check_model
from vllm_qoq.quantizer.options import NO_MEAN_UNDER_A_CAP, QuantizeOptions
from vllm_qoq.text_file import check_text

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Calibrated:
    """The result of a calibration, as written or, in a dry run, as it would be.

    kv_cache         what config.json says of the KV cache
    layers           layers that have a mean of K
    samples, seqlen  pieces of calibration text, and tokens in each
    total_bytes      the tensors of the checkpoint
    large_biases     layers whose bias of K is too large for this cache in spite of the mean; empty
                     in a dry run
    """

    output: Path
    kv_cache: KVCache
    layers: int
    samples: int
    seqlen: int
    total_bytes: int
    large_biases: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A checkpoint to calibrate: its files, its section, and the model that they compute."""

    checkpoint: Checkpoint
    section: Section | KVSection | None
    inputs: Inputs


def calibrate_kv(
    model: str | Path,
    output: str | Path,
    text: str | Path,
    *,
    kv_bits: Bits | None = None,
    kv_hadamard: bool | None = None,
    samples: int = 128,
    seqlen: int = 1024,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dry_run: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
) -> Calibrated:
    """Copy a checkpoint, with the means of K that a quantized KV cache leaves out.

    model            folder of a model in floating point or of a checkpoint of ours, or its id on
                     the Hub, which is downloaded first: ORG/NAME or ORG/NAME@REVISION
    output           the folder to make
    text             file with calibration text in UTF-8
    kv_bits          bits of the KV cache that the copy is served with; None for what `model` says,
                     4 where it says nothing
    kv_hadamard      whether the cache rotates K; None for what `model` says, where it says nothing
                     wherever heads have a power of two of channels
    samples          pieces of text
    seqlen           tokens in each
    max_shard_bytes  size of a file with weights, at most
    dry_run          check everything and write nothing
    overwrite        replace an older output, if it is ours
    quiet            print no progress

    Raises UserError with what is wrong and what to do, before work begins; an output is complete or
    absent.
    """
    out = Path(output)
    folder = local_model(model, out, Path(text), overwrite=overwrite, quiet=quiet)
    from vllm_qoq.quantizer import noise

    noise.hide_bars()
    source = open_source(folder)
    options = _options(source, kv_bits, kv_hadamard, samples, seqlen)
    names, dimensions = source.inputs.names, source.inputs.dimensions
    cache = _cache(source, options, kv_bits)
    size = (dimensions.kv_heads, dimensions.head_dim)
    infos = [
        TensorInfo(k_mean.name_of(i), "F32", size, "")
        for i in range(dimensions.layers)
        if names.of_block(i).has_keys
    ]
    kept = [i for i in source.checkpoint.tensors.values() if split_layer(i.name)[1] != K_MEAN]
    shards = cut(_groups([*kept, *infos], source.section), max_shard_bytes)
    check_space(out, total_bytes(shards))
    noise.import_llmcompressor()
    means, biased, count = _measured(source, Path(text), options, dry_run=dry_run, quiet=quiet)
    result = Calibrated(
        output=out,
        kv_cache=cache,
        layers=len(infos),
        samples=count,
        seqlen=options.seqlen,
        total_bytes=total_bytes(shards),
        large_biases=tuple(biased),
    )
    if dry_run:
        return result
    section = source.section
    changed = (
        section.model_copy(update={"kv_cache": cache})
        if section is not None
        else KVSection(kv_cache=cache)
    )
    content = Content(
        shards=shards,
        read=lambda info: (
            means[info.name] if info.name in means else source.checkpoint.get(info.name)
        ),
        config=output_config(source.checkpoint.config, changed),
        copied=_copied(folder),
    )
    write_checkpoint(out, content, overwrite, Progress(quiet))
    return result


def local_model(model: str | Path, out: Path, text: Path, *, overwrite: bool, quiet: bool) -> Path:
    """Find the folder of `model`, and check output and text first: a download takes minutes."""
    if hub.is_to_download(model):
        check_output(out, [], overwrite)
        check_text("--text", text)
    folder = hub.local_folder(model, quiet=quiet)
    file = convert.gguf_file(folder)
    if file is not None:
        raise QuantizeError(
            f"{file}: is GGUF, which is not served; give the folder OUT.float that `vllm-qoq "
            "quantize` converts it into, or quantize it, which measures the mean of K, too"
        )
    check_output(out, [folder], overwrite)
    check_text("--text", text)
    return folder


def open_source(folder: Path) -> Source:
    """Open a checkpoint and hold its headers against its config.json; reads no tensor.

    Raises UserError for one whose model cannot be run, or is not sound.
    """
    checkpoint = experts_apart(Checkpoint.open(folder))
    if vision_language(checkpoint.config) is not None:
        raise QuantizeError(
            f"{folder}: {CONFIG}: architectures: {shown(checkpoint.config.get('architectures'))}: "
            "calibrate-kv takes models of text alone; `vllm-qoq quantize` measures the mean of K "
            "of this one, too"
        )
    raw = checkpoint.config.get(SECTION)
    method = raw.get("quant_method") if isinstance(raw, dict) else None
    if raw is not None and method != QUANT_METHOD:
        raise QuantizeError(
            f"{folder}: {CONFIG}: {SECTION}: quant_method {shown(method)} is that of another tool; "
            f"make a checkpoint of ours of it first, with one set: `vllm-qoq merge NAME={folder} "
            "-o MERGED`, and give MERGED"
        )
    if raw is None:
        return Source(checkpoint, None, check_model(language_part(checkpoint), "calibrated"))
    from vllm_qoq.checkpoint.float_view import FloatView  # which imports torch

    _, section, sets = verify.open_merged(folder)
    for finding in verify.structure(folder):
        raise FormatError(f"{folder}: {finding}")
    first = section.routing.prefill if isinstance(section, Section) else ""
    (prompts,) = (weights for weights in sets if weights.name == first)
    return Source(checkpoint, section, check_model(FloatView(prompts), "calibrated"))


def _options(
    source: Source,
    kv_bits: Bits | None,
    kv_hadamard: bool | None,
    samples: int,
    seqlen: int,
) -> QuantizeOptions:
    """Complete the options by what the checkpoint says; QuantizeError for what cannot be."""
    if source.inputs.names.has_capped_scores:
        raise QuantizeError(
            f"{source.checkpoint.path}: {NO_MEAN_UNDER_A_CAP}; serve the model as it is, with "
            "`kv_bits` in --additional-config"
        )
    if kv_bits == UNQUANTIZED:
        raise QuantizeError("kv_bits 16: such a cache keeps keys as they are; give 4, k8v4 or 8")
    before = source.section.kv_cache if source.section is not None else None
    if before is not None and before.is_quantized():
        kv_hadamard = before.hadamard if kv_hadamard is None else kv_hadamard
        kv_bits = kv_bits or (4 if before.bits == UNQUANTIZED else before.bits)
    given = {
        "kv_bits": kv_bits or 4,
        "kv_hadamard": kv_hadamard,
        "samples": samples,
        "seqlen": seqlen,
    }
    options = QuantizeOptions.parse(given, "options")
    return options.of_heads(source.inputs.dimensions.head_dim)


def _cache(source: Source, options: QuantizeOptions, kv_bits: Bits | None) -> KVCache:
    """Make the cache of the copy; rules for single layers stay."""
    before = source.section.kv_cache if source.section is not None else None
    changed = {"hadamard": bool(options.kv_hadamard), "k_mean": True}
    if before is None or not before.is_quantized():
        return KVCache(bits=options.kv_bits, **changed)
    return before.model_copy(update=changed if kv_bits is None else {**changed, "bits": kv_bits})


def _groups(infos: list[TensorInfo], section: Section | KVSection | None) -> list[list[TensorInfo]]:
    """Group tensors by what begins a file of its own: what all sets share, and each set."""
    sets = section.sets if isinstance(section, Section) else {}
    owners = [None, *sets]

    def place(info: TensorInfo) -> int:
        return owners.index(split_name(info.name, sets)[0])

    ordered = sorted(infos, key=lambda info: (place(info), info.name))
    return [list(group) for _, group in groupby(ordered, key=place)]


def _measured(
    source: Source, text: Path, options: QuantizeOptions, *, dry_run: bool, quiet: bool
) -> tuple[Mapping[str, torch.Tensor], list[str], int]:
    """Measure the mean of K of each layer, by the name of its tensor.

    Returns them, the layers whose bias is too large in spite of them, and the number of pieces of
    text; a dry run checks everything and has no means.
    """
    from vllm_qoq.models.tensors import EMBEDDING
    from vllm_qoq.quantizer import keys, load, pipeline, smooth
    from vllm_qoq.quantizer.modifiers import SmoothPass
    from vllm_qoq.quantizer.products import fast_products
    from vllm_qoq.quantizer.text import check_tokens, pieces

    checkpoint, names = source.inputs.checkpoint, source.inputs.names
    dimensions = source.inputs.dimensions
    load.check_model(checkpoint)
    tokenizer = load.load_tokenizer(checkpoint)
    samples = pieces(text, tokenizer, options.seqlen, options.samples)
    check_tokens(text, samples, tokenizer, checkpoint.tensors[EMBEDDING].shape[0])
    _check_values(source, Progress(quiet))
    if dry_run:
        return {}, [], len(samples)
    with fast_products():
        model = load.load_model(checkpoint)
        pipeline.bring_to_gpu_when_used(model)
        step = SmoothPass(
            names=names,
            dimensions=dimensions,
            options=smooth.SmoothOptions(
                k_mean=True,
                attention=False,
                outputs=False,
                reorder=False,
                key_bits=options.key_bits,
                weight_bits=16,
                group_size=options.group_size,
            ),
            samples=len(samples),
            done=Clock("mean of K, block", dimensions.layers, quiet),
        )
        pipeline.run(model, step, samples, tokenizer, propagate=False)
        biased = keys.large_biases(model, names, dimensions, options)
    if biased:
        print(f"warning: {keys.warning(biased, options)}", file=sys.stderr, flush=True)
    means = smooth.named_means(smooth.k_means(step.found), names)
    return means, biased, len(samples)


def _check_values(source: Source, progress: Progress) -> None:
    from vllm_qoq.quantizer import load

    if source.section is None:
        load.check_values(source.checkpoint, progress)
        return
    with progress.stage("check values", source.checkpoint.total_bytes) as advance:
        for info in source.checkpoint.tensors.values():
            values.check(source.checkpoint, info)
            advance(info.nbytes)


def _copied(folder: Path) -> dict[Path, Path]:
    """List what is copied of a checkpoint: side files, and what stays true of it, as its card."""
    files = side_files(folder)
    for name in (card.README, transforms.FILE):
        if (folder / name).is_file():
            check_link(folder, folder / name)
            files.append(Path(name))
    return {file: folder / file for file in files}

"""A job of `bench serving`: what is measured, checked before work begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vllm_qoq.bench import BenchError
from vllm_qoq.bench.serving import formats
from vllm_qoq.bench.serving.cases import BATCHES, LENGTHS, MOST, Lengths, captured, check_batches
from vllm_qoq.bench.serving.records import Request
from vllm_qoq.bench.serving.shapes import SHAPES
from vllm_qoq.checkpoint import hub
from vllm_qoq.checkpoint.folder import error_context, read_config, require_folder
from vllm_qoq.checkpoint.format import QUANT_METHOD, SECTION
from vllm_qoq.errors import shown
from vllm_qoq.models.config import CONFIG, text_config

Resume = Literal["auto", "required", "never"]

# What all formats get alike. vLLM's default share of the memory differs between its versions, and
# its default of tokens a step between cards.
_ENGINE_ARGS = {"max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.9}
WEIGHTS = "*.safetensors"
"""The files with the weights of a checkpoint; dummies are measured where it has none."""
# What a format says to `LLM()`, and what the process of an engine does.
_OF_A_FORMAT = ("kv_cache_dtype", "additional_config", "quantization", "load_format", "dtype")
_OFFLINE = (
    *("model", "skip_tokenizer_init", "max_model_len", "max_num_seqs", "enable_prefix_caching"),
    *("trust_remote_code", "disable_log_stats", "compilation_config"),
)


@dataclass(frozen=True)
class Job:
    """What to measure.

    model        name of SHAPES, or folder with the `config.json` of an unquantized model, whose
                 formats are measured with dummy weights; None where only checkpoints are
    formats      names of formats (`vllm_qoq.bench.serving.formats`)
    checkpoints  names and folders of finished checkpoints
    lengths      tokens of prompts and answers
    batches      batch sizes, or "full"
    most         the largest batch that "full" may be
    minutes      bound of the whole run; None for no bound
    engine_args  more arguments of `LLM()`, for all alike
    work_dir     for results of an engine that was stopped
    """

    model: str | None
    work_dir: Path
    formats: tuple[str, ...] = formats.DEFAULT
    checkpoints: tuple[tuple[str, Path], ...] = ()
    lengths: tuple[Lengths, ...] = LENGTHS
    batches: tuple[str, ...] = BATCHES
    most: int = MOST
    repeats: int = 1
    minutes: float | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    resume: Resume = "auto"


@dataclass(frozen=True)
class Subject:
    """One engine that is measured.

    config  the `config.json` to write for dummy weights; None for a checkpoint
    format  the format; None for a checkpoint, whose floor is not known
    """

    name: str
    is_ours: bool
    request: Request
    config: Mapping[str, Any] | None = None
    format: formats.Format | None = None

    @property
    def weights_in_words(self) -> str:
        """Say where the weights are dummies, as they are of a checkpoint without any, too."""
        has_dummies = self.request.engine_args.get("load_format") == "dummy"
        return " with dummy weights" if has_dummies else ""


@dataclass(frozen=True)
class CheckedJob:
    """A job that can begin: the unquantized model's `config.json`, and the engines in order."""

    job: Job
    model: Mapping[str, Any] | None
    subjects: tuple[Subject, ...]


def check_offline(job: Job) -> CheckedJob:
    """Raise BenchError or FormatError for what can be refused before an engine is started."""
    refuse_arguments(job, _OFFLINE, "engine")
    return check_job(job)


def refuse_arguments(job: Job, names: Iterable[str], whose: str) -> None:
    """Raise BenchError where the user's engine arguments have one of `names`."""
    for name in names:
        if name in job.engine_args:
            raise BenchError(
                f"--engine-args: {name} is what the benchmark gives each {whose}; leave it out"
            )


def check_job(job: Job) -> CheckedJob:
    """Make the subjects of a job; BenchError or FormatError for what none of them can be."""
    if job.model is not None:
        refuse_arguments(job, _OF_A_FORMAT, "format")
    check_batches(job.batches, job.most)
    names = [
        *(job.formats if job.model is not None else ()),
        *(name for name, _ in job.checkpoints),
    ]
    if len(names) != len(set(names)):
        raise BenchError(f"{', '.join(names)}: a name is there twice; give each a name of its own")
    model = None if job.model is None else _model_config(job.model)
    subjects = []
    if model is not None:
        _check_context(job, job.model or "", model)
        subjects = [_of_format(job, name, model) for name in job.formats]
    subjects += [_of_checkpoint(job, *one) for one in job.checkpoints]
    if not subjects:
        raise BenchError("nothing to measure; name a MODEL or a --checkpoint NAME=DIR")
    return CheckedJob(job, model, tuple(subjects))


def _model_config(model: str) -> Mapping[str, Any]:
    if model in SHAPES:
        return SHAPES[model].config()
    folder = Path(model)
    if hub.is_to_download(model):
        require_folder(folder)  # which says how to get it
    if not folder.is_dir():
        raise BenchError(
            f"{model}: is neither a folder nor a shape; shapes are {', '.join(SHAPES)}"
        )
    with error_context(folder):
        config = read_config(folder)
    if SECTION in config:
        raise BenchError(
            f"{folder / CONFIG}: has a {SECTION}; name the unquantized model, or measure the "
            f"checkpoint itself: --checkpoint NAME={folder}"
        )
    return config


def _check_context(job: Job, place: str, config: Mapping[str, Any]) -> None:
    most = text_config(config).get("max_position_embeddings")
    for lengths in job.lengths:
        if isinstance(most, int) and lengths.tokens > most:
            raise BenchError(
                f"--lengths {lengths}: {place} has a context of {most} tokens; give shorter ones"
            )


def _of_format(job: Job, name: str, model: Mapping[str, Any]) -> Subject:
    how = formats.parse(name)
    folder = job.work_dir.resolve() / name
    args = {**how.engine_args(), "load_format": "dummy"}
    request = _request(job, folder, Path(job.model or ""), model, args)
    return Subject(name, how.is_ours, request, how.config(model), how)


def _of_checkpoint(job: Job, name: str, folder: Path) -> Subject:
    require_folder(folder)
    with error_context(folder):
        config = read_config(folder)
    _check_context(job, str(folder), config)
    section = config.get(SECTION)
    is_ours = isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD
    has_weights = any(folder.glob(WEIGHTS))
    more = {} if has_weights else {"load_format": "dummy"}
    return Subject(name, is_ours, _request(job, folder.resolve(), folder, config, more))


def _request(
    job: Job, folder: Path, given: Path, config: Mapping[str, Any], engine_args: Mapping[str, Any]
) -> Request:
    """Make the request of an engine for the model in `folder`, whose `config` is in `given`."""
    vocabulary = text_config(config).get("vocab_size")
    if type(vocabulary) is not int or not 0 < vocabulary < 1 << 31:
        raise BenchError(
            f"{given / CONFIG}: vocab_size: {shown(vocabulary)} is not a number of tokens; mend it"
        )
    return Request(
        model=str(folder),
        vocabulary=vocabulary,
        engine_args={**_ENGINE_ARGS, **engine_args, **job.engine_args},
        lengths=job.lengths,
        batches=job.batches,
        sizes=tuple(captured(job.batches, job.most)),
        repeats=job.repeats,
    )

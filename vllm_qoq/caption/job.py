"""A job of `vllm-qoq caption`: what is asked, checked before an engine is started."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_qoq.caption import MAX_TOKENS, PROMPT, devices, folder, journal
from vllm_qoq.caption.errors import CaptionError
from vllm_qoq.caption.records import Outcome
from vllm_qoq.caption.shards import Shard, find
from vllm_qoq.checkpoint import hub
from vllm_qoq.checkpoint.folder import read_config, require_folder

_REFUSED = ("model", "trust_remote_code", "skip_tokenizer_init", "data_parallel_size")
# What a run may change between two halves: speed and memory, not what is asked of the model.
_OPERATION = frozenset(
    {
        *("gpu_memory_utilization", "kv_cache_memory_bytes", "cpu_offload_gb"),
        *("max_num_seqs", "max_num_batched_tokens", "max_model_len", "tensor_parallel_size"),
        *("pipeline_parallel_size", "enforce_eager", "compilation_config"),
        *("disable_log_stats", "enable_prefix_caching", "mm_processor_cache_gb"),
    }
)
_MOST_DECODERS = 16
_LONGEST_PATH = 4095


@dataclass(frozen=True)
class Job:
    """What to caption.

    shards         folder, pattern, tar file or list (`vllm_qoq.caption.shards`)
    model          folder of a checkpoint
    name           of the model in the output; None for the folder's
    system_prompt  None for none
    engine_args    more arguments of `LLM()`
    engines        processes with an engine; None for as many as there are GPUs for
    job_id         which of `num_jobs` this is, from 0; each has every `num_jobs`-th shard
    retry_failed   whether samples that failed in an earlier run are tried again
    """

    shards: str
    out: Path
    model: Path
    name: str | None = None
    prompt: str = PROMPT
    system_prompt: str | None = None
    max_tokens: int = MAX_TOKENS
    temperature: float = 0.0
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    engines: int | None = None
    job_id: int = 0
    num_jobs: int = 1
    retry_failed: bool = False
    quiet: bool = False

    @property
    def model_name(self) -> str:
        """The model's name in the output."""
        return self.name or hub.name_of(self.model.absolute())

    @property
    def label(self) -> str:
        """The job among those of the output folder, in a name of a file."""
        return f"job-{self.job_id}-of-{self.num_jobs}"


@dataclass(frozen=True)
class CheckedJob:
    """A job that can begin.

    all_shards  the shards of all jobs
    shards      those of this job
    finished    name -> what became of those that are finished
    run         what the captions depend on
    devices     a value of CUDA_VISIBLE_DEVICES for each engine, None without GPUs
    """

    job: Job
    all_shards: tuple[Shard, ...]
    shards: tuple[Shard, ...]
    finished: Mapping[str, Outcome]
    run: Mapping[str, Any]
    devices: tuple[str | None, ...]

    @property
    def pending(self) -> tuple[Shard, ...]:
        """The shards that are not finished."""
        return tuple(shard for shard in self.shards if shard.name not in self.finished)

    @property
    def division(self) -> dict[str, Any]:
        """How shards are divided among the jobs of the output folder."""
        names = "\0".join(shard.name for shard in self.all_shards)
        digest = hashlib.sha256(names.encode()).hexdigest()[:12]
        shards = f"{len(self.all_shards)} shards, {digest}"
        return {"num_jobs": self.job.num_jobs, "list_of_shards": shards}

    @property
    def decoders(self) -> int:
        """Threads that decode images, of each engine."""
        processors = len(os.sched_getaffinity(0))
        return max(1, min(_MOST_DECODERS, processors // max(1, len(self.devices)) - 1))


def check(job: Job) -> CheckedJob:
    """Raise CaptionError or FormatError for what can be refused before work begins."""
    for package, extra in (("webdataset", "caption"), ("PIL", "caption"), ("vllm", "vllm")):
        if find_spec(package) is None:
            raise CaptionError(
                f"{package} is not installed; install it: pip install 'vllm-qoq[{extra}]'"
            )
    if job.job_id >= job.num_jobs:
        raise CaptionError(
            f"--job-id {job.job_id}: jobs are counted from 0, and --num-jobs is {job.num_jobs}"
        )
    for key in _REFUSED:
        if key in job.engine_args:
            raise CaptionError(f"--engine-args: {key} is not for you to give here; leave it out")
    require_folder(job.model)
    read_config(job.model)
    shards = find(job.shards)
    _check_paths(job.out, shards)
    run = _run(job)
    folder.check(job.out, run)
    mine = shards[job.job_id :: job.num_jobs]
    finished = {}
    for shard in mine:
        found = journal.finished(job.out, shard)
        if found is not None and not (job.retry_failed and found.has_failed):
            finished[shard.name] = found
    groups = devices.groups(job.engines, _gpus_each(job.engine_args))
    used = max(1, min(len(groups), len(mine) - len(finished)))
    return CheckedJob(job, shards, mine, finished, run, tuple(groups[:used]))


def _check_paths(out: Path, shards: tuple[Shard, ...]) -> None:
    """Raise CaptionError where a file of the output would have too long a path."""
    room = _LONGEST_PATH - len(os.fsencode(out.absolute())) - len("/..failures.json.partial")
    for shard in shards:
        if len(shard.name.encode()) > room:
            raise CaptionError(
                f"{shard.path}: has a path too long for files in {out}; choose an output folder "
                "with a shorter path"
            )


def _run(job: Job) -> dict[str, Any]:
    asked = {key: value for key, value in job.engine_args.items() if key not in _OPERATION}
    return {
        "model_name": job.model_name,
        "model": folder.digest_of(job.model),
        "prompt": job.prompt,
        "system_prompt": job.system_prompt,
        "max_tokens": job.max_tokens,
        "temperature": job.temperature,
        "engine_args": asked,
    }


def _gpus_each(engine_args: Mapping[str, Any]) -> int:
    count = 1
    for key in ("tensor_parallel_size", "pipeline_parallel_size"):
        value = engine_args.get(key, 1)
        if type(value) is not int or value < 1:
            raise CaptionError(f"--engine-args: {key}: {value!r} is not a number of GPUs")
        count *= value
    return count

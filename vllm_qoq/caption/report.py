"""The plan and the summary of a job, as text for people and as JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm_qoq.caption import journal
from vllm_qoq.caption.job import CheckedJob
from vllm_qoq.caption.run import EngineResult, Result
from vllm_qoq.caption.shards import Shard
from vllm_qoq.caption.tar import Reader
from vllm_qoq.errors import printable
from vllm_qoq.progress import duration, human_bytes


def plan(checked: CheckedJob) -> dict[str, Any]:
    """Describe what a job would do. Samples are counted in the shards, unless a list has them."""
    job = checked.job
    samples = done = 0
    for shard in checked.shards:
        found = checked.finished.get(shard.name)
        count = _samples(shard) if found is None else found.samples
        samples += count
        done += min(count, journal.begun(job.out, shard)) if found is None else count
    return {
        "output": str(job.out),
        "dry_run": True,
        "model": job.model_name,
        "job_id": job.job_id,
        "num_jobs": job.num_jobs,
        **_of_all_jobs(checked),
        "shards": len(checked.shards),
        "shards_finished": len(checked.finished),
        "bytes": sum(shard.bytes for shard in checked.shards),
        "samples": samples,
        "samples_done": done,
        "engines": [{"gpus": where} for where in checked.devices],
    }


def plan_text(found: dict[str, Any]) -> str:
    """Write a plan for people."""
    return (
        f"of all jobs, {found['all_shards_finished']} of {found['all_shards']} shards are "
        "finished\n"
        f"would caption {found['shards'] - found['shards_finished']} of {found['all_shards']} "
        f"shards as {found['model']} into {found['output']}\n"
        f"job {found['job_id']} of {found['num_jobs']}: {found['shards']} shards, "
        f"{human_bytes(found['bytes'])}, {found['shards_finished']} of them finished\n"
        f"samples: {found['samples']}, {found['samples_done']} of them done\n"
        f"engines: {_engines([one['gpus'] for one in found['engines']])}"
    )


def summary(result: Result) -> dict[str, Any]:
    """Describe what a job has, and what this run of it did."""
    job, outcomes = result.checked.job, result.outcomes.values()
    seconds = max((one.counts.seconds for one in result.engines), default=0.0)
    images = sum(one.counts.images for one in result.engines)
    tokens = sum(one.counts.tokens for one in result.engines)
    failures: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    for one in outcomes:
        failures.update(one.failures)
        ignored.update(one.ignored)
        failures["missing"] += one.missing
    return {
        "output": str(job.out),
        "dry_run": False,
        "model": job.model_name,
        "job_id": job.job_id,
        "num_jobs": job.num_jobs,
        "is_complete": result.is_complete,
        **_of_all_jobs(result.checked),
        "shards": len(result.outcomes),
        "shards_finished_before": len(result.checked.finished),
        "samples": sum(one.samples for one in outcomes),
        "captions": sum(one.captions for one in outcomes),
        "prompt_tokens": sum(one.prompt_tokens for one in outcomes),
        "tokens": sum(one.tokens for one in outcomes),
        "failures": {kind: count for kind, count in sorted(failures.items()) if count},
        "ignored_members": dict(sorted(ignored.items())),
        "damaged_shards": {one.shard: one.damage for one in outcomes if one.damage is not None},
        "run": {
            "images": images,
            "prompt_tokens": sum(one.counts.prompt_tokens for one in result.engines),
            "tokens": tokens,
            "failures": sum(sum(one.counts.failures.values()) for one in result.engines),
            "seconds": seconds,
            "images_per_second": images / seconds if seconds else None,
            "tokens_per_second": tokens / seconds if seconds else None,
            "engines": [_engine(one) for one in result.engines],
        },
    }


def summary_text(found: dict[str, Any]) -> str:
    """Write a summary for people."""
    run = found["run"]
    lines = [f"{found['captions']} captions of {found['samples']} samples in {found['output']}"]
    if found["num_jobs"] > 1 or found["all_shards_finished"] < found["all_shards"]:
        lines.append(
            f"of all jobs, {found['all_shards_finished']} of {found['all_shards']} shards are "
            "finished"
        )
    if run["engines"]:
        lines.append(
            f"this run: {run['images']} images, {run['tokens']} tokens in "
            f"{duration(run['seconds'])}, {run['images_per_second']:.1f} images/s, "
            f"{run['tokens_per_second']:.0f} tokens/s"
        )
    for one in run["engines"]:
        where = "engine" if one["gpus"] is None else f"engine of GPU {one['gpus']}"
        lines.append(
            f"{where}: {one['images']} images, busy {one['busy']:.0%} of the time, full "
            f"{one['full']:.0%}; started in {duration(one['start_seconds'])}"
        )
    if found["failures"]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in found["failures"].items())
        lines.append(f"without a caption: {kinds}; named in *.failures.json")
    for shard, damage in found["damaged_shards"].items():
        lines.append(printable(f"{shard}: {damage}"))
    if found["ignored_members"]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in found["ignored_members"].items())
        lines.append(f"files in the shards that were ignored: {kinds}")
    return "\n".join(lines)


def _of_all_jobs(checked: CheckedJob) -> dict[str, int]:
    """Count what all jobs have done, so that a shard is noticed that was no job's."""
    finished = journal.count_finished(checked.job.out, checked.all_shards)
    return {"all_shards": len(checked.all_shards), "all_shards_finished": finished}


def _engine(one: EngineResult) -> dict[str, Any]:
    """What an engine did, and the shares of its time in which it had an image, and all it takes."""
    counts = one.counts
    seconds = counts.seconds or 1.0
    return {
        "gpus": one.devices,
        "start_seconds": one.start_seconds,
        "images": counts.images,
        "prompt_tokens": counts.prompt_tokens,
        "tokens": counts.tokens,
        "seconds": counts.seconds,
        "busy": 1 - counts.idle_seconds / seconds,
        "full": 1 - (counts.idle_seconds + counts.short_seconds) / seconds,
    }


def _engines(devices: list[str | None]) -> str:
    if devices[0] is None:
        return str(len(devices))
    return f"{len(devices)}, of GPU {' and '.join(map(str, devices))}"


def _samples(shard: Shard) -> int:
    if shard.samples is not None:
        return shard.samples
    with shard.path.open("rb") as file:
        return sum(1 for _ in Reader(file))

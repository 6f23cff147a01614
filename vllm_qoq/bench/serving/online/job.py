"""A job of `bench serving --online`: what is measured, checked before work begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_qoq.bench import BenchError
from vllm_qoq.bench.serving.job import CheckedJob, Job, Subject, check_job, refuse_arguments
from vllm_qoq.bench.serving.online.load import Load
from vllm_qoq.checkpoint.folder import read_config
from vllm_qoq.models.config import text_config

# What the benchmark itself says to the server.
_OURS = (
    *("model", "tokenizer", "skip_tokenizer_init", "host", "port", "served_model_name"),
    "enable_prefix_caching",  # the same prompts come at every rate
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(frozen=True)
class OnlineJob:
    """A job that can begin: the subjects of an offline job, and the load for each of them.

    engine_args  name of a subject -> its engine's arguments
    """

    checked: CheckedJob
    load: Load
    engine_args: Mapping[str, Mapping[str, Any]]


def check_online(job: Job, load: Load) -> OnlineJob:
    """Raise BenchError or FormatError for what can be refused before a server is started."""
    refuse_arguments(job, _OURS, "server")
    checked = check_job(job)
    return OnlineJob(checked, load, {one.name: _args(one, load) for one in checked.subjects})


def _args(subject: Subject, load: Load) -> dict[str, Any]:
    """Add what a server gets to the arguments of an engine that is measured offline.

    Text that is cut into tokens a second time can become more of them, so that there is room for
    more than the lengths where the model has it. A checkpoint's own ideas of sampling are left out,
    because they take time.
    """
    folder = Path(subject.request.model)
    config = subject.config
    if config is None:
        config = read_config(folder)
        if not any((folder / name).exists() for name in _TOKENIZERS):
            raise BenchError(
                f"{folder}: has no tokenizer, which --online needs to send prompts as text; copy "
                "it there from the unquantized model"
            )
    room = load.lengths.tokens + load.lengths.prompt
    most = text_config(config).get("max_position_embeddings")
    return {
        "max_model_len": min(room, most) if isinstance(most, int) else room,
        "enable_prefix_caching": False,
        "generation_config": "vllm",
        **subject.request.engine_args,
    }

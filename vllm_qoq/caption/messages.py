"""What the process of an engine and the one that started it tell each other, over a pipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_qoq.caption.pipeline import Counts
from vllm_qoq.caption.records import Outcome
from vllm_qoq.caption.shards import Shard


@dataclass(frozen=True)
class Request:
    """What an engine is to do.

    model          folder of the checkpoint
    name           of the model in the output
    prompt         what is asked about each image
    system_prompt  None for none
    engine_args    arguments of `LLM()`
    retry_failed   whether samples that failed in an earlier run are tried again
    devices        value of CUDA_VISIBLE_DEVICES; None where there are no GPUs
    processors     that it may use; None for those that its parent may
    decoders       threads that decode images
    log            file for what the engine prints; None to print it
    """

    out: Path
    model: str
    name: str
    prompt: str
    system_prompt: str | None
    max_tokens: int
    temperature: float
    engine_args: Mapping[str, Any]
    retry_failed: bool
    devices: str | None
    processors: frozenset[int] | None
    decoders: int
    log: Path | None


@dataclass(frozen=True)
class Ready:
    """An engine can caption, after `seconds`."""

    seconds: float


@dataclass(frozen=True)
class WantsShard:
    """An engine has read its shards, and asks for the next: a GiveShard answers."""


@dataclass(frozen=True)
class Progress:
    """What an engine has done so far, and the shard that it has just finished."""

    counts: Counts
    finished: Outcome | None


@dataclass(frozen=True)
class Ended:
    """An engine has written all it will write: it was told so, or there are no more shards."""

    counts: Counts


@dataclass(frozen=True)
class Failed:
    """An engine cannot go on; its log has the traceback.

    is_refusal  whether the same command fails again, unless what the message says is done
    """

    message: str
    is_refusal: bool


@dataclass(frozen=True)
class GiveShard:
    """A shard to caption; None where there are no more."""

    shard: Shard | None


@dataclass(frozen=True)
class Stop:
    """End soon."""

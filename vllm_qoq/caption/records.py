"""Lines of the write-ahead file of a shard, and the facts of a finished one."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from vllm_qoq.caption.errors import Kind


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Head(_Record):
    """The first line: which shard it is, and its size by which another of the name is told."""

    shard: str
    bytes: int


class Caption(_Record):
    """What the engine wrote about an image.

    finish  "stop" where the model ended the caption, "length" where `--max-tokens` did
    """

    caption: str
    prompt_tokens: int = Field(ge=0)
    tokens: int = Field(ge=0)
    finish: str


class Failure(_Record):
    """Why a sample has no caption."""

    kind: Kind
    why: str
    file: str | None = None


class Line(_Record):
    """One sample: its place in the shard, its key, and either of both."""

    position: int = Field(ge=0)
    key: str
    caption: Caption | None = None
    failure: Failure | None = None


class FailedSample(_Record):
    """A sample without a caption, by name."""

    key: str
    file: str | None
    why: str


class Facts(_Record):
    """A finished shard, in its `.failures.json`.

    bytes          of the shard
    samples        that it has, with captions or without
    missing        samples that a list promised besides
    damage         why nothing was read behind the last sample; None where all was
    ignored        kind -> members that are no part of a sample
    failures       kind -> samples without a caption
    """

    shard: str
    bytes: int
    samples: int
    captions: int
    prompt_tokens: int
    tokens: int
    missing: int
    damage: str | None
    ignored: dict[str, int]
    failures: dict[Kind, list[FailedSample]]

    @property
    def is_complete(self) -> bool:
        """Whether every sample has a caption, and no file was left out for its name."""
        is_whole = self.damage is None and not self.ignored.get("repeated")
        return self.captions == self.samples and not self.missing and is_whole

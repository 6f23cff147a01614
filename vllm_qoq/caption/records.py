"""Lines of the write-ahead file of a shard, and the facts of a finished one."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from vllm_qoq.caption.errors import Kind


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Head(_Record):
    """The first line: which shard it is, and by what another of the name is told.

    bytes        its size
    modified_ns  when it was changed last, in nanoseconds since 1970
    fingerprint  `Shard.fingerprint`
    """

    shard: str
    bytes: int
    modified_ns: int
    fingerprint: str


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


class Written(Caption):
    """A line of a finished shard's `.jsonl`."""

    key: str
    model: str
    position: int = Field(ge=0)


class FailedSample(_Record):
    """A sample without a caption, by name; an image that is of none has no key."""

    key: str | None
    file: str | None
    why: str


class _Counted(_Record):
    """What was counted of a finished shard.

    samples        that it has, with captions or without
    missing        samples that a list promised besides
    damage         why nothing was read behind the last sample; None where all was
    ignored        kind -> members that are no part of a sample
    """

    samples: int
    captions: int
    prompt_tokens: int
    tokens: int
    missing: int
    damage: str | None
    ignored: dict[str, int]


class Facts(_Counted, Head):
    """A finished shard, in its `.failures.json`.

    failures  kind -> samples without a caption, and images that are of no sample
    """

    failures: dict[Kind, list[FailedSample]]

    @property
    def outcome(self) -> Outcome:
        """The facts without the names of samples."""
        return Outcome(
            **self.model_dump(exclude={*Head.model_fields, "failures"}),
            shard=self.shard,
            failures={kind: len(samples) for kind, samples in self.failures.items()},
        )


class Outcome(_Counted):
    """What is kept of a finished shard in memory: `Facts`, of failures the numbers alone."""

    shard: str
    failures: dict[Kind, int]

    @property
    def has_failed(self) -> bool:
        """Whether there are samples to try again."""
        return self.captions < self.samples

    @property
    def is_complete(self) -> bool:
        """Whether every sample has a caption, and every image a sample."""
        is_whole = self.damage is None and not self.failures
        return self.captions == self.samples and not self.missing and is_whole

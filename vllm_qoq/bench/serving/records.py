"""What the process of an engine is asked, and what it writes down as soon as it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_qoq.bench import BenchError
from vllm_qoq.bench.serving.cases import Lengths
from vllm_qoq.errors import one_line


class Record(BaseModel):
    """What is kept in a file of the work folder, as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)


_Kind = TypeVar("_Kind", bound=Record)
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Request(Record):
    """An engine and what to measure with it.

    model        folder with a `config.json`
    vocabulary   tokens to choose prompts from
    engine_args  arguments of `LLM()`
    lengths      pairs of tokens of a prompt and of an answer
    batches      batch sizes, or "full"
    sizes        sizes with a CUDA graph, ascending
    repeats      runs of each case
    fingerprint  digest of all that a result depends on, but for its lengths and batch
    """

    model: str
    vocabulary: int
    engine_args: dict[str, Any]
    lengths: tuple[tuple[int, int], ...]
    batches: tuple[str, ...]
    sizes: tuple[int, ...]
    repeats: int
    fingerprint: str = ""


class Facts(Record):
    """What is known of an engine once it has started.

    pool_blocks, block_tokens  blocks of the KV cache that requests can have, tokens of a block
    start_seconds              from importing vLLM to the first request
    """

    pool_blocks: int = Field(ge=0)
    block_tokens: int = Field(gt=0)
    start_seconds: Seconds

    @property
    def pool_tokens(self) -> int:
        """The tokens that the KV cache holds."""
        return self.pool_blocks * self.block_tokens


class Measured(Record):
    """One run, or the median of several.

    seconds          from the first request to the last token
    prompts_seconds  from the first request to the first token of the last one; at batch 1 this is
                     the time to first token
    step_seconds     of a step in which all requests generate; None where there was none
    """

    prompt: int = Field(gt=0)
    new: int = Field(gt=0)
    batch: int = Field(gt=0)
    seconds: Seconds
    prompts_seconds: Seconds
    step_seconds: Seconds | None

    @property
    def case(self) -> tuple[Lengths, int]:
        """What was measured: lengths and batch."""
        return Lengths(self.prompt, self.new), self.batch

    @property
    def tokens_per_second(self) -> float:
        """The new tokens of a second, the time of the prompts counted in."""
        return self.batch * self.new / self.seconds


class Line(Record):
    """A line of the file that an engine's process writes: either of both."""

    facts: Facts | None = None
    measured: Measured | None = None


def read(path: Path) -> tuple[Facts | None, list[Measured]]:
    """Read what a process has written so far."""
    found = read_lines(path, Line)
    facts = [line.facts for line in found if line.facts]
    return facts[-1] if facts else None, [line.measured for line in found if line.measured]


def read_lines(path: Path, kind: type[_Kind]) -> list[_Kind]:
    """Read records, one a line; a line that is cut off at the end is left out.

    Raises BenchError for a file with anything else.
    """
    if not path.exists():
        return []
    written = path.read_bytes()
    lines = written[: written.rfind(b"\n") + 1].split(b"\n")[:-1]
    try:
        return [kind.model_validate_json(line) for line in lines]
    except ValidationError as error:
        raise BenchError(f"{one_line(error, str(path))}; begin anew: --resume never") from None

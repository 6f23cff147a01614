"""The options of a quantization, from the command line or a recipe file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_qoq.checkpoint.folder import read_json
from vllm_qoq.checkpoint.kv_config import UNQUANTIZED, Bits
from vllm_qoq.errors import UserError, one_line, shown
from vllm_qoq.quantizer import QuantizeError
from vllm_qoq.quantizer.effort import EFFORTS, of_options

if TYPE_CHECKING:
    from vllm_qoq.models.table import LayerNames
    from vllm_qoq.quantizer.sets import SetKind

SetName = Literal["w8a8", "w4a8", "w4a16"]
NO_MEAN_UNDER_A_CAP = "scores are capped, so that leaving out the mean of K would change them"
STEPS = ("rotate", "k_mean", "smooth_attention", "smooth_outputs", "reorder", "clip", "gptq")
"""The options that switch a step on or off, in the order of the steps."""

_RECIPE_BYTES = 1 << 20
_MOST_PASSES = 100
# What pydantic calls numbers that are too small or too large.
_BOUNDS = ("greater_than_equal", "less_than_equal")


class QuantizeOptions(BaseModel):
    """The options that decide the bytes of the result, besides model and text.

    sets             which sets, the first for prompts and the last for generation
    nested           store w8a8 as a residual on w4a8
    group_size       128, 64, 32, or -1 for a scale per output channel (w4a8, w4a16)
    kv_bits          the KV cache that K and V are prepared for and the server is told of
    k_mean           measure the mean of K, which is subtracted before K is quantized
    kv_hadamard      rotate K in the cache before it is quantized; None decides it by the heads
    lm_head_bits     16 leaves the lm_head in the model's dtype
    samples, seqlen  pieces of the calibration text, and tokens in each
    rotate           fold the norms, R1 on the residual stream, R2 on the values; "values" is R2
                     alone, which a model gets whose stream cannot be rotated
    smooth_attention SmoothAttention on K
    smooth_outputs   smooth the inputs of o_proj and down_proj
    reorder          sort the inputs of down_proj by magnitude
    clip             try scales that clip
    gptq             pass rounding errors on, or else round to the nearest
    passes           of descent over all columns after GPTQ
    min_expert_tokens  an expert that fewer tokens of the text go through is rounded to the nearest

    `effort`, of `effort.EFFORTS`, may stand for several of them; those that are given win.
    """

    # A recipe is a file of somebody's: "yes" is not true, and "64" no number.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    # JSON has lists.
    sets: Annotated[tuple[SetName, ...], Field(strict=False)] = ("w8a8", "w4a8")
    nested: bool = False
    group_size: Literal[128, 64, 32, -1] = 128
    kv_bits: Bits = 4
    kv_hadamard: bool | None = None
    lm_head_bits: Literal[8, 16] = 16
    samples: Annotated[int, Field(ge=1, description="1 or more pieces of text")] = EFFORTS[
        "default"
    ]["samples"]
    seqlen: Annotated[int, Field(ge=2, description="2 or more tokens")] = 1024
    rotate: bool | Literal["values"] = True
    k_mean: bool = True
    smooth_attention: bool = True
    smooth_outputs: bool = True
    reorder: bool = True
    clip: bool = True
    gptq: bool = True
    passes: Annotated[
        int, Field(ge=0, le=_MOST_PASSES, description=f"0 (GPTQ alone) to {_MOST_PASSES}")
    ] = EFFORTS["default"]["passes"]
    min_expert_tokens: Annotated[
        int,
        Field(ge=1, description="1 (GPTQ for every expert that a token goes through) or more"),
    ] = 128

    @model_validator(mode="before")
    @classmethod
    def _with_effort(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "effort" not in values:
            return values
        given = dict(values)
        effort = given.pop("effort")
        if not isinstance(effort, str) or effort not in EFFORTS:
            raise ValueError(f"effort must be one of {', '.join(EFFORTS)}, not {shown(effort)}")
        return {**EFFORTS[effort], **given}

    @field_validator("sets")
    @classmethod
    def _distinct(cls, sets: tuple[str, ...]) -> tuple[str, ...]:
        if not sets or len(set(sets)) != len(sets):
            names = ", ".join(get_args(SetName))
            raise ValueError(f"sets must be distinct, of {names}, not {shown(list(sets))}")
        return sets

    @model_validator(mode="after")
    def _rotatable(self) -> QuantizeOptions:
        if self.kv_hadamard and self.kv_bits == UNQUANTIZED:
            raise ValueError(
                "kv_hadamard rotates keys that are quantized; give kv_bits 4, k8v4 or 8"
            )
        return self

    @model_validator(mode="after")
    def _nestable(self) -> QuantizeOptions:
        if not self.nested:
            return self
        if not {"w8a8", "w4a8"} <= set(self.sets):
            raise ValueError("nested stores w8a8 as a residual on w4a8; give both in sets")
        if self.group_size == -1:
            raise ValueError(
                "nested needs a w4a8 with groups, and group_size is -1; give 128, 64 or 32"
            )
        if self.sets[-1] == "w8a8":
            # The last set's weights make the inputs of the next block, so w4a8 would depend on
            # what is nested on it.
            raise ValueError("nested w8a8 cannot be the last set; give w8a8,w4a8")
        return self

    def of_model(self, names: LayerNames) -> QuantizeOptions:
        """Decide what the kind of the model decides; QuantizeError for what it cannot have."""
        if self.lm_head_bits == 8 and names.has_plain_head:
            raise QuantizeError(
                "lm_head_bits: vLLM takes an lm_head of this model in float alone; give 16"
            )
        if self.lm_head_bits == 8 and not names.has_head:
            raise QuantizeError(
                "lm_head_bits: vLLM takes no lm_head but the embedding for this model, so none can "
                "be int8; give 16"
            )
        if names.has_capped_scores and self.has_k_mean:
            if "k_mean" in self.model_fields_set:
                raise QuantizeError(f"k_mean: {NO_MEAN_UNDER_A_CAP}; leave it out")
            return self.model_copy(update={"k_mean": False}).of_model(names)
        if self.rotate == "values" and names.fixed_values is not None:
            raise QuantizeError(
                f"rotate: V of this model cannot be rotated, because {names.fixed_values}; leave "
                "it out to rotate the residual stream, or give --no-rotate"
            )
        if names.fixed_stream is None or not self.turns_stream:
            return self
        if "rotate" in self.model_fields_set:
            raise QuantizeError(
                "rotate: the residual stream of this model cannot be rotated, because "
                f'{names.fixed_stream}; leave it out, or write "values" to rotate V alone'
            )
        return self.model_copy(update={"rotate": "values"})

    def of_heads(self, size: int) -> QuantizeOptions:
        """Decide whether K is rotated, for heads of `size` channels: wherever it can be.

        Raises QuantizeError where it is asked for and cannot be.
        """
        is_possible = size & (size - 1) == 0
        if self.kv_hadamard is None:
            return self.model_copy(update={"kv_hadamard": is_possible and self.is_cache_quantized})
        if self.kv_hadamard and not is_possible:
            raise QuantizeError(
                f"kv_hadamard: heads of {size} channels cannot be rotated, which needs a power of "
                "two; leave it out"
            )
        return self

    @classmethod
    def parse(cls, values: dict[str, Any], where: str) -> QuantizeOptions:
        """Validate options; a QuantizeError begins with `where`."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            finding = error.errors(include_url=False)[0]
            key = str(finding["loc"][0]) if finding["loc"] else ""
            field = cls.model_fields.get(key)
            if finding["type"] in _BOUNDS and field is not None and field.description:
                given = shown(finding["input"])
                raise QuantizeError(
                    f"{where}.{key}: {given} is out of range; give {field.description}"
                ) from None
            raise QuantizeError(one_line(error, where)) from None

    @classmethod
    def read(cls, recipe: Path | None, given: dict[str, Any]) -> QuantizeOptions:
        """Read the recipe file (JSON), with what was `given` on the command line over it."""
        if recipe is None:
            return cls.parse(given, "options")
        if not recipe.is_file():
            raise QuantizeError(f"--recipe {recipe}: no such file; give a file with a JSON object")
        try:
            values = read_json(recipe, _RECIPE_BYTES)
        except UserError as error:
            raise QuantizeError(f"--recipe {recipe}: {error}") from None
        where = f"--recipe {recipe}"
        _check_keys(values, where)
        # An effort on the command line is over what the recipe says of its options, too.
        preset = EFFORTS.get(given.get("effort") or "", {})
        return cls.parse({**values, **preset, **given}, where)

    @property
    def effort(self) -> str | None:
        """The name of the effort that these options are; None where some differ from each."""
        return of_options(self.model_dump())

    @property
    def has_k_mean(self) -> bool:
        """Whether the checkpoint has means of K; a 16-bit cache would not use them."""
        return self.k_mean and self.is_cache_quantized

    @property
    def is_cache_quantized(self) -> bool:
        """Whether the KV cache has fewer than 16 bits."""
        return self.kv_bits != UNQUANTIZED

    @property
    def key_bits(self) -> int:
        """Bits of a number of a key in the KV cache."""
        from vllm_qoq.numerics.kv_layout import widths

        return UNQUANTIZED if self.kv_bits == UNQUANTIZED else widths(self.kv_bits).key

    @property
    def turns_stream(self) -> bool:
        """Whether the residual stream is rotated."""
        return self.rotate is True

    @property
    def kinds(self) -> tuple[SetKind, ...]:
        """The kinds of the sets, in order."""
        from vllm_qoq.quantizer.sets import SetKind

        return tuple(
            SetKind(name, self.group_size, "w4a8" if self.nested and name == "w8a8" else None)
            for name in self.sets
        )


def _check_keys(recipe: dict[str, Any], where: str) -> None:
    """Raise QuantizeError for keys that are written as on the command line, with the right form."""
    fields = QuantizeOptions.model_fields
    for key, value in recipe.items():
        name = key.removeprefix("--").replace("-", "_")
        positive = name.removeprefix("no_")
        if key in fields or positive not in fields:
            continue
        if name == positive:
            raise QuantizeError(f"{where}.{key}: write {name!r} in a recipe")
        meant = "" if value is True else f" ({key}: {shown(value)} was given)"
        raise QuantizeError(
            f'{where}.{key}: a recipe names the step itself; write "{positive}": false to leave '
            f'it out, or "{positive}": true to have it{meant}'
        )

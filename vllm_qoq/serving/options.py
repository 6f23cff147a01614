"""The options of one server, which users give with vLLM's own flag.

    --additional-config '{"qoq": {"force_set": "w8a8"}}'
    --additional-config '{"qoq": {"routing": {"prefill": "w8a8", "decode": "w4a16"}}}'
    --additional-config '{"qoq": {"force_load": "calm"}}'
    --additional-config '{"qoq": {"trace": "/tmp/routing.jsonl"}}'
    --additional-config '{"qoq": {"kv_bits": 4}}'
    --additional-config '{"qoq": {"kv_bits": 4, "kv_hadamard": true}}'
    --additional-config '{"qoq": {"lora": "converted"}}'
    --additional-config '{"qoq": {"lora": "trained"}}'

`force_set` uses one set for everything, `routing` replaces the checkpoint's table, `force_load`
keeps a table with a `load` in one state, "calm" or "busy", however long the queue is. `trace`
writes every decision as a line of JSON, with its time and the engine and the process that made it;
with CUDA graphs those of a `load` are made on the device, so `busy` is null there and `set_if_busy`
names the other set. `kv_bits` stores the keys and values of every layer in that many bits; 16 is
vLLM's own cache, and "k8v4" keys of 8 bits and values of 4. `kv_hadamard` says whether keys are
rotated before they are quantized, which helps where few channels are far larger than the others.
`lora` says that LoRA adapters are in the basis of the checkpoint: "converted" into it (`vllm-qoq
convert-lora`), or "trained" on its weights.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from vllm.config import VllmConfig

from vllm_qoq.checkpoint.kv_config import Bits
from vllm_qoq.errors import one_line
from vllm_qoq.routing.table import RoutingError

NAMESPACE = "qoq"

# Options whose names another plugin would hardly give to keys of its own.
_OURS_ALONE = ("force_set", "force_load", "kv_bits")


class Options(BaseModel):
    """The object under `qoq` in `--additional-config`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    force_set: str | None = None
    routing: dict[str, Any] | None = None
    force_load: Literal["calm", "busy"] | None = None
    trace: str | None = None
    kv_bits: Bits | None = None
    kv_hadamard: bool | None = None
    lora: Literal["converted", "trained"] | None = None

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Options:
        """Read the options of an engine; RoutingError names the key that is wrong."""
        extra = vllm_config.additional_config
        given = extra.get(NAMESPACE, {}) if isinstance(extra, dict) else {}
        where = f"--additional-config: {NAMESPACE}"
        for key in extra if isinstance(extra, dict) else ():
            if key in _OURS_ALONE or key != NAMESPACE == str(key).lower():
                raise RoutingError(
                    f"--additional-config: {key!r} would be ignored; the options of vllm-qoq are "
                    f"in the object under {NAMESPACE!r}"
                )
        try:
            options = cls.model_validate(given)
        except ValidationError as error:
            raise RoutingError(_with_remedy(error, where)) from None
        for other in ("routing", "force_load"):
            if options.force_set is not None and getattr(options, other) is not None:
                raise RoutingError(f"{where}: give either 'force_set' or {other!r}, not both")
        return options


def _with_remedy(error: ValidationError, where: str) -> str:
    """Write the first finding, and for an unknown key the one that may be meant."""
    finding = error.errors(include_url=False)[0]
    if finding["type"] == "extra_forbidden":
        options = tuple(Options.model_fields)
        key = str(finding["loc"][-1])
        near = get_close_matches(key, options, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        return f"{where}: there is no option {key!r}; {meant}There are {', '.join(options)}"
    return one_line(error, where)

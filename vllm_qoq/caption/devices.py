"""Which GPUs each engine of a job gets, or which processors where there are none."""

from __future__ import annotations

import os

from vllm_qoq.caption.errors import CaptionError


def groups(engines: int | None, each: int) -> list[str | None]:
    """Divide the visible GPUs: a value of CUDA_VISIBLE_DEVICES for each engine.

    engines  how many there are to be; None for as many as there are GPUs for
    each     GPUs that an engine takes

    Without GPUs an engine gets None, and there is one unless more are asked for. Raises
    CaptionError where there are GPUs, and too few.
    """
    names = _visible()
    if not names:
        return [None] * (engines or 1)
    if len(names) < each * (engines or 1):
        raise CaptionError(
            f"{engines or 1} engines of {each} GPUs: {len(names)} GPUs are visible; ask for fewer "
            "--engines, or for less parallelism in --engine-args"
        )
    return [
        ",".join(names[each * index : each * (index + 1)])
        for index in range(engines or len(names) // each)
    ]


def processors(engines: int) -> list[frozenset[int]]:
    """Divide the processors that this process may use: a share of its own for each engine.

    vLLM binds the threads of an engine to some that it may use, and so those of all engines to the
    same. With fewer processors than engines all have all.
    """
    allowed = sorted(os.sched_getaffinity(0))
    each = len(allowed) // engines
    if not each:
        return [frozenset(allowed)] * engines
    return [frozenset(allowed[each * index : each * (index + 1)]) for index in range(engines)]


def _visible() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(count)]
    # CUDA leaves out what follows a name that it does not know.
    return [name.strip() for name in named.split(",")][:count]

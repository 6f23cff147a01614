"""A reader of vLLM's forward context, which says whether a step is prefill or decode.

Rules that both model runners and all CUDA graph modes obey:

* A PIECEWISE graph is keyed by the number of tokens alone, and its replay does
  not enter Python. Inside one, metadata must not be read: it may be missing or
  a dummy that looks like decode. Where decode steps have FULL graphs of their
  own (FULL_AND_PIECEWISE, the default, and FULL_DECODE_ONLY), a PIECEWISE step
  is a prefill step.
* Attention metadata is real, or a faithful dummy, in every other case: in eager
  steps and while FULL decode graphs are captured, which vLLM's second model
  runner does in mode NONE.
* If one kind of graph serves both phases (modes FULL and PIECEWISE), nothing
  but the number of tokens is known at capture. Then every step that is small
  enough to be a decode step of this engine counts as one.
* vLLM runs a request that has one token left of its prompt, for example of a prompt that is cached
  up to there, as one that generates: both model runners replay the FULL decode graphs for such a
  step, which does not enter Python, and no metadata of an eager step tells it apart. So a step in
  which no request has more tokens than one that generates (1, plus those that are speculated) is
  a decode step, eagerly as under graphs. Which request reads its prompt is not asked.
* So a step that verifies is a decode step, unless its requests verify different numbers of tokens
  under PIECEWISE graphs: FULL graphs are for equal numbers, and the graph that is replayed instead
  may also read prompts.
* A step without any metadata is a profiling or warm-up run. It takes the prefill
  set and is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable

from vllm.config import CUDAGraphMode
from vllm.forward_context import ForwardContext

from vllm_qoq.routing.table import Phase, Step
from vllm_qoq.serving.routing.policy import Policy

_KEY = "qoq_step"


def current_step(context: ForwardContext, num_tokens: int, policy: Policy) -> Step:
    """Tell the step of this forward pass, which its first layer decides for all others."""
    step = context.additional_kwargs.get(_KEY)
    if step is None:
        step = _classify(context, num_tokens, policy)
        context.additional_kwargs[_KEY] = step
    return step


def _classify(context: ForwardContext, num_tokens: int, policy: Policy) -> Step:
    mode = context.cudagraph_runtime_mode
    largest_query = _largest_query(context.attn_metadata)
    requests = -(-num_tokens // policy.tokens_per_request)
    if _graph_serves_both_phases(mode, policy):
        is_decode = num_tokens <= policy.max_num_seqs * policy.tokens_per_request
    elif mode is CUDAGraphMode.PIECEWISE:
        is_decode = False
    else:
        is_decode = largest_query is not None and largest_query <= policy.tokens_per_request
        requests = _requests(context.attn_metadata) or requests

    step = Step(
        Phase.DECODE if is_decode else Phase.PREFILL,
        batch=requests,
        # This comes ahead of the count, which on the device depends on it, and is done in every
        # forward pass, because a graph may be captured without metadata.
        is_busy=policy.follow_load(),
    )
    # A PIECEWISE graph is captured without metadata, but each replay is a real step.
    if largest_query is not None or mode is CUDAGraphMode.PIECEWISE:
        policy.record(step, num_tokens, mode.name)
    return step


def _graph_serves_both_phases(mode: CUDAGraphMode, policy: Policy) -> bool:
    # The mode is read at run time, because vLLM may lower it after the model has been built.
    configured = policy.compilation_config.cudagraph_mode
    if configured is None or configured is CUDAGraphMode.NONE or configured.separate_routine():
        return False
    # In mode FULL, a graph may be captured in runtime mode NONE.
    return configured is CUDAGraphMode.FULL or mode is CUDAGraphMode.PIECEWISE


def _largest_query(metadata: object) -> int | None:
    """Count the tokens of the request that has most of them in this step.

    Where the metadata only tells decode from prefill, it is 1 or more than any request has. None
    without metadata, or where no layer's metadata tells.
    """
    for layer_metadata in _each(metadata):
        largest = getattr(layer_metadata, "max_query_len", None)
        if largest is not None:
            return int(largest)
        num_prefills = getattr(layer_metadata, "num_prefills", None)
        if num_prefills is not None:  # FlashInfer's metadata
            return _MANY if num_prefills else 1
    return None


def _requests(metadata: object) -> int | None:
    """Count the requests of this step, of which some may verify fewer tokens than others.

    In a graph it is the padded number. None where no layer's metadata tells.
    """
    for layer_metadata in _each(metadata):
        starts = getattr(layer_metadata, "query_start_loc", None)
        if starts is not None:
            return len(starts) - 1
    return None


_MANY = 1 << 30  # more tokens than a step has


def _each(metadata: object) -> Iterable[object]:
    """List the metadata of all layers, which is a dict by layer, or one for each micro-batch."""
    if isinstance(metadata, list):
        metadata = metadata[0] if metadata else None
    return metadata.values() if isinstance(metadata, dict) else ()

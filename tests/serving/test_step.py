"""Prefill or decode, from vLLM's real forward context, for every CUDA graph mode."""

from types import SimpleNamespace

import pytest
import torch
from plugin_units import qoq_config, tensor_parallel, vllm_config
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, set_forward_context

from vllm_qoq.routing.table import Phase
from vllm_qoq.serving.routing.step import current_step
from vllm_qoq.serving.signals.counters import CounterReader, counter_file
from vllm_qoq.serving.speculation import is_draft, most_decode_tokens

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
DEFAULT, DECODE_ONLY = CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL_DECODE_ONLY
DECODING = {"layer": SimpleNamespace(max_query_len=1)}
MIXED = {"layer": SimpleNamespace(max_query_len=7)}


@pytest.fixture
def make_policy():
    def make(mode, max_num_seqs=8):
        config = vllm_config()
        config.compilation_config.cudagraph_mode = mode
        config.scheduler_config.max_num_seqs = max_num_seqs
        quant_config = qoq_config()
        with tensor_parallel(0, 1, config):
            policy = quant_config.policy()
        reader = CounterReader(counter_file(quant_config.counter_stem, 0), quant_config.set_names)
        return policy, config, reader

    return make


@pytest.mark.parametrize(
    ("configured", "runtime", "metadata", "tokens", "expected"),
    [
        (NONE, NONE, DECODING, 3, "decode"),
        (NONE, NONE, MIXED, 9, "prefill"),
        (NONE, NONE, None, 4096, "profiling"),
        # FULL_AND_PIECEWISE: the second runner captures decode graphs in mode NONE
        (DEFAULT, FULL, DECODING, 4, "decode"),
        (DEFAULT, NONE, DECODING, 4, "decode"),
        (DEFAULT, NONE, MIXED, 600, "prefill"),
        (DEFAULT, NONE, None, 600, "profiling"),
        # PIECEWISE replays do not enter Python: metadata must not matter, present or not
        (DEFAULT, PIECEWISE, None, 4, "prefill"),
        (DEFAULT, PIECEWISE, DECODING, 4, "prefill"),
        (DEFAULT, PIECEWISE, MIXED, 4, "prefill"),
        (DECODE_ONLY, FULL, DECODING, 4, "decode"),
        (DECODE_ONLY, NONE, MIXED, 4, "prefill"),
        # one graph serves both phases: the number of tokens decides, capture or not
        (PIECEWISE, PIECEWISE, None, 8, "decode"),
        (PIECEWISE, PIECEWISE, MIXED, 8, "decode"),
        (PIECEWISE, PIECEWISE, DECODING, 9, "prefill"),
        (PIECEWISE, NONE, MIXED, 8, "prefill"),
        (FULL, FULL, MIXED, 8, "decode"),
        (FULL, NONE, DECODING, 8, "decode"),
        (FULL, FULL, DECODING, 16, "prefill"),
        # what FlashInfer's metadata says
        (NONE, NONE, {"a": SimpleNamespace(num_prefills=0)}, 3, "decode"),
        (NONE, NONE, {"a": SimpleNamespace(num_prefills=2)}, 3, "prefill"),
        # layers that do not tell are passed over; micro-batches are a list
        (NONE, NONE, {"a": SimpleNamespace(), **DECODING}, 3, "decode"),
        (NONE, NONE, [DECODING, DECODING], 3, "decode"),
    ],
)
def test_phase(make_policy, configured, runtime, metadata, tokens, expected):
    policy, config, reader = make_policy(configured)
    with set_forward_context(metadata, config, num_tokens=tokens, cudagraph_runtime_mode=runtime):
        step = current_step(get_forward_context(), tokens, policy)
        again = current_step(get_forward_context(), 12345, policy)
    assert again is step, "the first layer decides for the whole forward pass"
    assert step.phase is (Phase.DECODE if expected == "decode" else Phase.PREFILL)
    counted = sum(reader.read().values())
    assert counted == (0 if expected == "profiling" else 1)


def test_counters_tell_phase_and_set(make_policy):
    policy, config, reader = make_policy(NONE)
    for metadata, tokens in [(MIXED, 9), (DECODING, 4), (DECODING, 4), (DECODING, 5)]:
        with set_forward_context(metadata, config, num_tokens=tokens):
            current_step(get_forward_context(), tokens, policy)
    assert reader.read() == {
        ("prefill", "w8a8"): 1,
        ("prefill", "w4a16"): 0,
        ("decode", "w8a8"): 1,
        ("decode", "w4a16"): 2,
    }


def test_speculated_tokens_still_decode_and_batch_counts_requests(make_policy):
    policy, config, _ = make_policy(NONE)
    policy.tokens_per_request = 4
    metadata = {"layer": SimpleNamespace(max_query_len=4)}
    with set_forward_context(metadata, config, num_tokens=16):
        step = current_step(get_forward_context(), 16, policy)
    assert (step.phase, step.batch) == (Phase.DECODE, 4)


@pytest.mark.parametrize("counts", [[4, 1, 1, 2, 1], [1, 1, 1, 1, 1], [4, 4, 4, 4, 4]])
def test_requests_may_verify_fewer_tokens_than_others(make_policy, counts):
    policy, config, _ = make_policy(NONE)
    policy.tokens_per_request = 4
    starts = torch.tensor([0, *counts]).cumsum(0)
    metadata = {"layer": SimpleNamespace(max_query_len=max(counts), query_start_loc=starts)}
    with set_forward_context(metadata, config, num_tokens=sum(counts)):
        step = current_step(get_forward_context(), sum(counts), policy)
    assert (step.phase, step.batch) == (Phase.DECODE, 5)


@pytest.mark.parametrize(
    ("method", "is_parallel", "of_model", "of_draft"),
    [
        ("ngram", False, 4, None),
        ("draft_model", False, 4, 5),
        ("draft_model", True, 4, 7),
        ("eagle", False, 4, None),
    ],
)
def test_a_draft_model_has_more_tokens_than_the_model_that_verifies(
    method, is_parallel, of_model, of_draft
):
    config = vllm_config()
    model, draft = object(), object()
    config.model_config = model
    config.speculative_config = SimpleNamespace(
        method=method,
        num_speculative_tokens=3,
        parallel_drafting=is_parallel,
        # vLLM has the model's own where there is no draft.
        draft_model_config=model if method == "ngram" else draft,
    )
    assert most_decode_tokens(config, is_draft(config)) == of_model
    config.model_config = draft
    if of_draft is not None:
        assert most_decode_tokens(config, is_draft(config)) == of_draft


def test_sets_that_only_padding_reaches_are_reachable(make_policy):
    policy, config, _ = make_policy(DEFAULT, max_num_seqs=3)
    route = policy.routing.route(["x"])  # w4a16 up to 4, then w8a8; prefill w8a8
    config.compilation_config.cudagraph_capture_sizes = [1, 2, 4, 8]
    assert "w4a16" in policy.reachable(route)
    policy.max_num_seqs = 5  # padded to 8
    assert policy.reachable(route) == {"w8a8", "w4a16"}


def test_sets_of_steps_that_verify_fewer_tokens_are_reachable(make_policy):
    policy, config, _ = make_policy(DEFAULT, max_num_seqs=3)
    policy.tokens_per_request = 4
    config.compilation_config.cudagraph_capture_sizes = [4, 8, 12]
    assert policy.reachable(policy.routing.route(["x"])) == {"w8a8", "w4a16"}
    config.compilation_config.cudagraph_capture_sizes = [1, 2, 3, 12, 16]
    assert policy._largest_batch() == 3
    config.compilation_config.cudagraph_capture_sizes = [5, 12]
    assert policy._largest_batch() == 5


def test_an_engine_counts_under_the_index_by_which_its_front_end_reads():
    """vLLM tells an engine of a dense model under data parallelism that its rank is 0."""
    config = vllm_config()
    config.parallel_config.data_parallel_index = 2
    quant_config = qoq_config()
    with tensor_parallel(0, 1, config):
        policy = quant_config.policy()
    with set_forward_context(DECODING, config, num_tokens=3):
        current_step(get_forward_context(), 3, policy)
    reader = CounterReader(counter_file(quant_config.counter_stem, 2), quant_config.set_names)
    assert sum(reader.read().values()) == 1


@pytest.mark.parametrize(("tokens", "requests"), [(1, 1), (3, 3), (4, 3), (17, 1)])
def test_eager_steps_and_graphs_agree_on_what_is_a_decode_step(make_policy, tokens, requests):
    """Whatever a request's tokens are of: vLLM replays decode graphs for one token of a prompt."""
    # Other versions' sources are tested without their compiled library.
    runner = pytest.importorskip("vllm.v1.worker.gpu_model_runner").GPUModelRunner
    largest = tokens - requests + 1
    has_decode_graph = runner._is_uniform_decode(
        max_num_scheduled_tokens=largest,
        uniform_decode_query_len=1,
        num_tokens=tokens,
        num_reqs=requests,
    )
    policy, config, _ = make_policy(NONE)
    metadata = {"layer": SimpleNamespace(max_query_len=largest)}
    with set_forward_context(metadata, config, num_tokens=tokens):
        step = current_step(get_forward_context(), tokens, policy)
    assert (step.phase is Phase.DECODE) == has_decode_graph

"""A tiny model of every class on two ranks, with a 4-bit cache, beside one (`make test-slow`)."""

import pytest
from engine_process import run_engines
from engines import largest_gap
from tiny_models import MODELS, write

from vllm_qoq.quantizer.job import quantize
from vllm_qoq.quantizer.options import QuantizeOptions

pytestmark = pytest.mark.slow
ROUNDING = 0.15  # of a log-probability, in bfloat16
CODES = 0.45  # the same, where it moves codes of the cache to their neighbours


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_answer_as_one(name, tiny_model, heldout_text, tmp_path):
    text, model, out = (tmp_path / part for part in ("text.txt", "model", "out"))
    text.write_text(heldout_text.read_text()[:2000])
    write(name, model, tiny_model)
    options = QuantizeOptions.parse(
        {"samples": 8, "seqlen": 64, "nested": True, "passes": 1}, "options"
    )
    quantize(model, out, text, options, max_clipped=0.5)
    common = {"kv_cache_memory_bytes": 32 << 20, "max_model_len": 128}
    specs = [
        {"qoq": {"force_set": force, "kv_bits": 4}, "options": common | {"tensor_parallel_size": n}}
        for force in ("w8a8", "w4a8")
        for n in (1, 2)
    ]
    results = run_engines(
        tmp_path,
        [{"checkpoint": str(out), "max_tokens": 8} | spec for spec in specs],
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    one8, two8, one4, two4 = (result["generation"] for result in results)
    for one, two in ((one8, two8), (one4, two4)):
        assert largest_gap(first(one), first(two)) < ROUNDING, "the prompt, before any cache"
        assert largest_gap(one, two) < CODES
    assert largest_gap(one8, one4) > CODES, "the sets are different"


def first(generation):
    """The first token of each answer."""
    return [(tokens[:1], logprobs[:1]) for tokens, logprobs in generation]

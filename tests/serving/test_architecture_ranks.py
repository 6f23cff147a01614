"""A tiny model of every class on two ranks, with a 4-bit cache, beside one (`make test-slow`)."""

from statistics import mean

import pytest
from engine_process import run_engines
from tiny_models import MODELS, write
from warm_process import WITHOUT_TORCHVISION

from vllm_qoq.models.table import with_experts
from vllm_qoq.quantizer.job import quantize
from vllm_qoq.quantizer.options import QuantizeOptions

pytestmark = pytest.mark.slow
# So many characters of the text are the prompts; most of each is read from the cache, 16 tokens a
# step.
PROMPTS = range(120, 360, 12)


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_answer_as_one(name, tiny_model, heldout_text, tmp_path):
    content = heldout_text.read_text()[:2000]
    text, model, out = (tmp_path / part for part in ("text.txt", "model", "out"))
    text.write_text(content)
    # The experts of a rank have a multiple of 128 channels.
    has_experts = name.partition(",")[0] in with_experts()
    wide = "intermediate_size" if name.startswith("Mixtral") else "moe_intermediate_size"
    write(name, model, tiny_model, **({wide: 256} if has_experts else {}))
    options = QuantizeOptions.parse(
        {"samples": 8, "seqlen": 64, "nested": True, "passes": 1}, "options"
    )
    quantize(model, out, text, options, max_clipped=0.5)
    common = {
        **{"kv_cache_memory_bytes": 32 << 20, "max_model_len": 256},
        **{"max_num_batched_tokens": 16, "enable_prefix_caching": False},
    }
    specs = [
        {"qoq": {"force_set": force, "kv_bits": 4}, "options": common | {"tensor_parallel_size": n}}
        for force in ("w8a8", "w4a8")
        for n in (1, 2)
    ]
    prompts = [content[:count] for count in PROMPTS]
    results = run_engines(
        tmp_path,
        [{"checkpoint": str(out), "max_tokens": 1, "prompts": prompts} | spec for spec in specs],
        VLLM_CPU_OMP_THREADS_BIND="0|1",
        **{WITHOUT_TORCHVISION: "1"},
    )
    one8, two8, one4, two4 = (result["generation"] for result in results)
    # Where two tokens are nearly as likely, the two likeliest may be others.
    assert min(len(gaps(one8, two8)), len(gaps(one4, two4))) > len(prompts)
    between_sets = min(mean(gaps(one8, one4)), mean(gaps(two8, two4)))
    assert max(mean(gaps(one8, two8)), mean(gaps(one4, two4))) < 0.5 * between_sets


def gaps(generation, other):
    """How much the log-probabilities differ of tokens that are among the two likeliest of both."""
    return [
        abs(left[token] - right[token])
        for (_, (left,)), (_, (right,)) in zip(generation, other, strict=True)
        for token in left.keys() & right.keys()
    ]

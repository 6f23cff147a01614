"""The quantized KV cache end to end in vLLM on the CPU."""

import shutil
from itertools import product

import pytest
from engines import PROMPTS, TRACED, engine, generate, largest_gap
from safetensors.torch import load_file, save_file

from vllm_qoq.bench.perplexity import text_perplexity
from vllm_qoq.numerics.kv_layout import slot_bytes

HEAD, KV_HEADS, LAYERS = 64, 2, 2  # tests/data/tiny-llama
# vLLM's own attention rounds otherwise on a CPU (vllm_qoq/bench/perplexity.py), so quantized
# history is compared with prompts in one piece, which see none, in our attention.
# Prompts in pieces of 16 tokens, whose history is quantized, as generated tokens' history is.
CHUNKED = {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}
# Rounding in other orders, such as batches and chunks of other sizes bring about, in bf16.
ROUNDING = 0.15


@pytest.fixture(scope="module")
def text(heldout_text):
    return heldout_text.read_text()[:8000]


@pytest.fixture(scope="module")
def serve(tiny_model):
    """An engine of the model, which has no section of ours; `kv_cache` is put into one."""

    def start(bits=None, kv_cache=None, **options):
        if kv_cache is not None:
            section = {"quant_method": "qoq", "kv_cache": kv_cache}
            options["hf_overrides"] = {"quantization_config": section}
        if bits is not None:
            options["quantization"] = "qoq"
        return engine(tiny_model, {"kv_bits": bits} if bits else None, **options)

    return start


def capacity(llm):
    """Tokens that fit in the cache, by vLLM's own count."""
    config = llm.llm_engine.vllm_config.cache_config
    return config.num_gpu_blocks * config.block_size


def measure(llm, text):
    return text_perplexity(llm, text, 256)["perplexity"]


@pytest.mark.parametrize(("bits", "at_least"), [(4, 3.5), (8, 1.85), ("k8v4", 2.4)])
def test_the_pool_grows(serve, bits, at_least):
    """At head 128, of which the scales are a smaller part, 4 bits hold 3.76 times the tokens."""
    llm, plain = serve(bits), serve()
    assert capacity(llm) / capacity(plain) > at_least
    bytes_per_token = LAYERS * KV_HEADS * slot_bytes(HEAD, bits)
    assert capacity(llm) == pytest.approx((64 << 20) / bytes_per_token, rel=0.002)


def test_a_prompt_in_one_piece_sees_no_quantization(serve, text):
    four, eight, plain = (measure(serve(bits), text) for bits in (4, 8, None))
    assert four == eight == pytest.approx(plain, rel=0.003)


def test_perplexity_over_quantized_history(serve, text):
    whole, eight, four, rotated, spared = (
        measure(llm, text)
        for llm in (
            serve(8),
            serve(8, **CHUNKED),
            serve(4, **CHUNKED),
            serve(kv_cache={"bits": 4, "hadamard": True}, **CHUNKED),
            serve(
                kv_cache={"bits": 4, "layers": [{"match": "model.layers.0.*", "bits": 16}]},
                **CHUNKED,
            ),
        )
    )
    assert eight == pytest.approx(whole, rel=0.002) and eight != whole
    for other in (four, rotated, spared):
        assert other == pytest.approx(whole, rel=0.025) and abs(other / whole - 1) > 0.001
    assert len({four, rotated, spared}) == 3 and spared < four


@pytest.fixture(scope="module")
def model_with_large_keys(tiny_model, tmp_path_factory):
    """The model with two channels of K thirty times as large and those of Q as much smaller."""
    folder = tmp_path_factory.mktemp("large_keys") / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    for layer, (name, factor) in product(range(LAYERS), (("k", 32), ("q", 1 / 32))):
        weight = weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
        for channel in (3, 3 + HEAD // 2):  # a pair that RoPE turns
            weight[channel::HEAD] *= factor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_keys_have_eight_bits_and_values_four(model_with_large_keys, text):
    """Keys of 4 bits ruin this model, values of 4 do not; the two widths together do not either."""
    whole, eight, mixed, four = (
        measure(engine(model_with_large_keys, {"kv_bits": bits}, quantization="qoq", **more), text)
        for bits, more in ((8, {}), (8, CHUNKED), ("k8v4", CHUNKED), (4, CHUNKED))
    )
    assert four > 1.5 * whole
    assert mixed == pytest.approx(whole, rel=0.02) and mixed not in (whole, eight)


def test_generation_follows_the_unquantized_cache(serve):
    prompts = tuple(prompt * 6 for prompt in PROMPTS)
    plain, eight, four = (generate(serve(bits), prompts) for bits in (None, 8, 4))
    assert 0 < largest_gap(eight, plain) < 0.3
    assert [tokens[0] for tokens, _ in four] == [tokens[0] for tokens, _ in plain]
    assert four != eight


def test_runs_repeat_to_the_bit_also_from_cached_prefixes(serve):
    prefix = "import os\n" * 40
    llm, fresh = serve(4), serve(4, enable_prefix_caching=False)
    prompt = (prefix + "def first():",)
    generate(llm, prompt)
    hit = generate(llm, prompt)
    assert llm.generate(prompt[0], use_tqdm=False)[0].num_cached_tokens > 0
    assert generate(llm, prompt) == hit
    computed = generate(fresh, prompt)
    assert generate(fresh, prompt) == computed
    # The hit reads its history quantized, the fresh run does not.
    assert 0 < largest_gap(hit, computed) < 0.5


def test_preempted_requests_are_computed_again(serve):
    blocks, block_size = 20, 32
    room = blocks * block_size * LAYERS * KV_HEADS * slot_bytes(HEAD, 8)
    small = {"block_size": block_size, "kv_cache_memory_bytes": room, "disable_log_stats": False}
    prompts = tuple(f"def f{i}(a, b):\n    " for i in range(6))
    llm = serve(8, **small)
    crowded = generate(llm, prompts, max_tokens=100)
    (preemptions,) = (m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert preemptions > 0, "the pool was large enough"
    assert largest_gap(crowded, generate(serve(8), prompts, max_tokens=100)) < ROUNDING


def test_w4a8_weights_and_a_quantized_cache(w4a8_dir, text):
    in_one_piece = measure(engine(w4a8_dir, {"kv_bits": 4}), text)
    assert in_one_piece == pytest.approx(measure(engine(w4a8_dir), text), rel=0.005)
    four = engine(w4a8_dir, {"kv_bits": 4}, **CHUNKED)
    in_chunks = measure(four, text)
    assert in_chunks == pytest.approx(in_one_piece, rel=0.025) and in_chunks != in_one_piece
    assert capacity(four) > 3.5 * capacity(engine(w4a8_dir))


def test_a_compiled_model_computes_the_same(serve):
    """Traced; without Inductor, which would take most of the time."""
    assert largest_gap(generate(serve(8, **TRACED)), generate(serve(8))) < 2 * ROUNDING

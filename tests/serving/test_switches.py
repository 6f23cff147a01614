"""What users of vLLM turn on, on top of a routed checkpoint with a 4-bit KV cache."""

import re
import socket

import pytest
import torch
from engines import PROMPTS, engine, generate
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from vllm_qoq.bench.perplexity import text_perplexity
from vllm_qoq.numerics.kv_layout import slot_bytes

HEAD, KV_HEADS, LAYERS = 64, 2, 2  # tests/data/tiny-llama
ROUTED = {"routing": {"prefill": "w8a8", "decode": "w4a8"}, "kv_bits": 4}
LONG = tuple(prompt * 12 for prompt in PROMPTS)


@pytest.fixture(scope="module")
def llm(nested_dir):
    return engine(nested_dir, ROUTED)


def ask(llm, *prompts, **sampling):
    return llm.generate(list(prompts), SamplingParams(**sampling), use_tqdm=False)


def test_structured_outputs(llm):
    structured = StructuredOutputsParams(regex=r"[0-9]{3}-[a-f]{4}")
    (output,) = ask(llm, "# The", temperature=0, max_tokens=32, structured_outputs=structured)
    assert re.fullmatch(r"[0-9]{3}-[a-f]{4}", output.outputs[0].text)


def test_several_answers_to_a_prompt(llm):
    first, again = (ask(llm, "# The", n=3, temperature=1, seed=7, max_tokens=8) for _ in range(2))
    answers = [[tuple(one.token_ids) for one in outputs[0].outputs] for outputs in (first, again)]
    assert answers[0] == answers[1] and len(set(answers[0])) == 3


def test_beam_search_finds_what_is_at_least_as_likely_as_the_greedy_answer(llm):
    (greedy,) = ask(llm, LONG[0], temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
    beams = BeamSearchParams(beam_width=4, max_tokens=6, ignore_eos=True)
    (found,) = llm.beam_search([{"prompt": LONG[0]}], beams)
    likelihoods = [sequence.cum_logprob for sequence in found.sequences]
    assert len(likelihoods) == 4 and likelihoods == sorted(likelihoods, reverse=True)
    # Batches of other sizes round otherwise.
    assert likelihoods[0] > greedy.outputs[0].cumulative_logprob - 0.05


def test_logprobs_of_a_prompt_are_those_of_its_set(llm, nested_dir):
    asked = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 1}
    routed, eight, four = (
        [list(position.items()) for position in ask(one, LONG[1], **asked)[0].prompt_logprobs[1:]]
        for one in (
            llm,
            *(engine(nested_dir, {"force_set": name, "kv_bits": 4}) for name in ("w8a8", "w4a8")),
        )
    )
    assert routed == eight != four


def test_tiny_budgets_of_tokens_cut_prompts_in_many_pieces(llm, nested_dir, heldout_text):
    small = {"max_num_batched_tokens": 8, "max_num_seqs": 4, "long_prefill_token_threshold": 3}
    cut = engine(nested_dir, ROUTED, **small)
    text = heldout_text.read_text()[:3000]
    whole, pieces = (text_perplexity(one, text, 128)["perplexity"] for one in (llm, cut))
    # Pieces read what came before them from the 4-bit cache.
    assert pieces == pytest.approx(whole, rel=0.03) and pieces != whole
    assert generate(cut, LONG) == generate(cut, LONG)


def test_a_full_pool_gives_cached_prefixes_up_and_finds_them_again(nested_dir):
    room = 18 * 32 * LAYERS * KV_HEADS * slot_bytes(HEAD, 4)  # in bytes, for 18 blocks of 32 tokens
    llm = engine(nested_dir, ROUTED, block_size=32, kv_cache_memory_bytes=room)
    prompts = [f"def f{i}(a, b):\n" + "    a = b\n" * 40 for i in range(8)]

    def run(prompt):
        (output,) = ask(llm, prompt, temperature=0, max_tokens=4, ignore_eos=True)
        return output.num_cached_tokens, tuple(output.outputs[0].token_ids)

    fresh, hit = run(prompts[0]), run(prompts[0])
    assert fresh[0] == 0 < hit[0]
    for other in prompts[1:]:
        run(other)
    assert run(prompts[0]) == fresh, "the pool was large enough for all prompts"
    assert run(prompts[0]) == hit


def test_events_of_the_cache_name_the_tokens_of_its_blocks(nested_dir):
    import msgspec
    import zmq
    from vllm.config import KVEventsConfig
    from vllm.distributed.kv_events import KVEventBatch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    events = KVEventsConfig(enable_kv_cache_events=True, endpoint=f"tcp://*:{port}")
    llm = engine(nested_dir, ROUTED, kv_events_config=events)
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.connect(f"tcp://127.0.0.1:{port}")
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        tokens = llm.get_tokenizer().encode(LONG[2] * 4)
        # What is sent before the subscription has come through is lost.
        for start in range(20):
            ask(llm, {"prompt_token_ids": tokens[start:]}, temperature=0, max_tokens=1)
            if subscriber.poll(500):
                break
        _, _, payload = subscriber.recv_multipart(zmq.NOBLOCK)
    (stored, *_) = msgspec.msgpack.decode(payload, type=KVEventBatch).events
    assert stored.token_ids == tokens[start:][: len(stored.token_ids)] != []


def test_pooled_texts_are_scored_nearly_as_by_the_float_model(nested_dir, tiny_model):
    pooling = {"runner": "pooling", "convert": "embed"}
    found, wanted = (
        torch.tensor([one.outputs.embedding for one in llm.embed(list(LONG), use_tqdm=False)])
        for llm in (engine(nested_dir, ROUTED, **pooling), engine(tiny_model, **pooling))
    )
    assert (found * wanted).sum(dim=1).min() > 0.99 and not torch.equal(found, wanted)
    llm = engine(nested_dir, ROUTED, **pooling)
    scores = [one.outputs.score for one in llm.score(LONG[0], list(LONG[:2]), use_tqdm=False)]
    assert scores == pytest.approx([1, float(found[0] @ found[1])], abs=0.01)

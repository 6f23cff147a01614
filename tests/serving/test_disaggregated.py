"""Prompts in 8 bits on one server, answers in 4 on another, the KV cache passed on by vLLM."""

import json

import pytest
from engines import PROMPTS, engine, generate
from server import Server

from vllm_qoq.numerics.kv_layout import slot_bytes

HEAD, KV_HEADS, LAYERS = 64, 2, 2  # tests/data/tiny-llama
PROMPT, BLOCK = PROMPTS[0] * 20, 32


def serve(checkpoint, folder, name):
    """Begin a server of one set; its cache goes through vLLM's connector that runs on a CPU."""
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder / "pages")},
    }
    qoq = {"force_set": name, "kv_bits": 4}
    options = (
        *("--kv-transfer-config", json.dumps(connector)),
        *("--additional-config", json.dumps({"qoq": qoq})),
        *("--enable-prompt-tokens-details", "--block-size", str(BLOCK)),
    )
    return Server(checkpoint, folder / f"{name}.log", *options, is_warm=True)


def test_one_server_reads_a_prompt_and_another_answers(nested_dir, tmp_path):
    with (
        serve(nested_dir, tmp_path, "w8a8") as reader,
        serve(nested_dir, tmp_path, "w4a8") as writer,
    ):
        reader.complete(PROMPT, max_tokens=1)
        answer = json.loads(writer.complete(PROMPT, logprobs=1))
        read, written = reader.steps(), writer.steps()
    usage = answer["usage"]
    passed_on = usage["prompt_tokens_details"]["cached_tokens"]
    assert passed_on == (usage["prompt_tokens"] - 1) // BLOCK * BLOCK > 64
    pages = [file.stat().st_size for file in (tmp_path / "pages").rglob("*.safetensors")]
    assert len(pages) == LAYERS
    header = 1000  # at most
    stored = passed_on * KV_HEADS * slot_bytes(HEAD, 4)
    assert all(stored < size < stored + header for size in pages)
    assert {key for key, steps in read.items() if steps} == {("prefill", "w8a8")}
    # What fills no block of the prompt is read by the server that answers, in its own set.
    assert written["prefill", "w4a8"] == 1 and written["decode", "w4a8"] == 7
    assert written["prefill", "w8a8"] == written["decode", "w8a8"] == 0
    (mine,) = answer["choices"][0]["logprobs"]["token_logprobs"][:1]
    table = {"routing": {"prefill": "w8a8", "decode": "w4a8"}}
    routed, alone = (
        next(iter(generate(engine(nested_dir, qoq | {"kv_bits": 4}), (PROMPT,))[0][1][0].values()))
        for qoq in (table, {"force_set": "w4a8"})
    )
    assert mine == pytest.approx(routed, abs=0.3) and mine not in (routed, alone)

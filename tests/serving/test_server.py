"""The OpenAI server over HTTP: `vllm serve CHECKPOINT --quantization qoq`."""

import json
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import warm_process
from safetensors import safe_open
from safetensors.torch import save_file
from server import START_SECONDS, Server, serve_command


@pytest.fixture(scope="module")
def server(two_sets_dir, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "server.log"
    with Server(two_sets_dir, log) as running:
        yield running


def test_counters_begin_at_zero_and_count_each_step(server):
    before = server.steps()
    assert set(before) == {(p, s) for p in ("prefill", "decode") for s in ("w8a8", "w4a8")}
    server.text("def counted():\n", max_tokens=6)
    after = server.steps()
    assert {key: after[key] - before[key] for key in after} == {
        ("prefill", "w8a8"): 1,
        ("prefill", "w4a8"): 0,
        ("decode", "w8a8"): 0,
        ("decode", "w4a8"): 5,
    }


def test_streaming_gives_the_same_text(server):
    prompt = "import sys\n\ndef main("
    stream = server.complete(prompt, stream=True, max_tokens=16)
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    # vLLM puts tokens together that were made before the connection took those ahead of them.
    assert events[-1] == "[DONE]" and len(events) > 4
    pieces = [json.loads(event)["choices"][0]["text"] for event in events[:-1]]
    assert "".join(pieces) == server.text(prompt, max_tokens=16)


def test_concurrent_requests_all_answer_and_large_batches_change_the_set(server):
    before = server.steps()
    prompts = [f"class Number{i}:\n    " for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        texts = list(pool.map(lambda prompt: server.text(prompt, max_tokens=24), prompts))
    assert all(texts)
    after = server.steps()
    assert after["decode", "w8a8"] > before["decode", "w8a8"], "no batch above 4 was decoded"


def test_log_tells_the_sets(server):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if "steps by phase and set" in server.log.read_text():
            return
        server.text("x = ")
        time.sleep(1)
    pytest.fail(server.log.read_text()[-2000:])


def last_line(done):
    """What a server that must refuse says last."""
    assert done.returncode != 0
    return (done.stdout + done.stderr).rstrip().splitlines()[-1]


def test_a_checkpoint_without_a_tensor_is_refused_by_its_name(merged_dir, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(merged_dir, broken)
    lost = "w4a16.model.layers.1.mlp.up_proj.weight_packed"
    for shard in broken.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name != lost}  # noqa: SIM118
        save_file(tensors, shard, {"format": "pt"})
    index = broken / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].pop(lost)
    index.write_text(json.dumps(content))
    done = subprocess.run(
        serve_command(broken), capture_output=True, text=True, timeout=START_SECONDS
    )
    assert re.match(rf"error: .*did not fill {re.escape(lost)}", last_line(done)), done.stderr


def test_an_unknown_set_is_refused_with_the_known_ones(merged_dir):
    command = serve_command(merged_dir, "--additional-config", '{"qoq": {"force_set": "w4"}}')
    done = warm_process.run(command, timeout=START_SECONDS)
    message = "EngineError: .*force_set is 'w4'.*w8a8, w4a16"
    assert re.search(message, last_line(done)), done.stderr

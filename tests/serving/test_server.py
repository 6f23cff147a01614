"""The OpenAI server over HTTP: `vllm serve CHECKPOINT --quantization qoq`."""

import json
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import warm_process
from conftest import ROOT
from example_scripts import load_example
from safetensors import safe_open
from safetensors.torch import save_file
from server import START_SECONDS, Server, serve_command


@pytest.fixture(scope="module")
def server(two_sets_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    # A bound of one request: however fast the machine, two of several requests meet in a step.
    routing = {"prefill": "w8a8", "decode": [{"max_batch": 1, "set": "w4a8"}, {"set": "w8a8"}]}
    options = json.dumps({"qoq": {"trace": str(folder / "steps.jsonl"), "routing": routing}})
    with Server(two_sets_dir, folder / "server.log", "--additional-config", options) as running:
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


def test_concurrent_requests_all_answer_and_the_batch_changes_the_set(server):
    before = server.steps()
    prompts = [f"class Number{i}:\n    " for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        texts = list(pool.map(lambda prompt: server.text(prompt, max_tokens=24), prompts))
    assert all(texts)
    after = server.steps()
    assert after["decode", "w8a8"] > before["decode", "w8a8"], (
        "no two requests were decoded together"
    )


def replay(server, trace, out, monkeypatch):
    """Replay some conversations, the burst among them, as examples/replay_conversations.py does."""
    lines = (ROOT / "examples" / "conversations.jsonl").read_text().splitlines()
    some = out.with_name("conversations.jsonl")
    some.write_text("\n".join(lines[8:20]))
    arguments = ["--base-url", server.url, "--conversations", some, "--trace", trace, "-o", out]
    options = ["--speed", "20", "--max-tokens", "40", "--every", "0.05"]
    monkeypatch.setattr("sys.argv", ["replay", *map(str, arguments), *options])
    load_example("replay_conversations").main()


def test_a_replay_of_conversations_has_every_step_and_is_drawn(server, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "replay.json", tmp_path / "replay.png"
    replay(server, server.log.with_name("steps.jsonl"), out, monkeypatch)
    replayed = json.loads(out.read_text())
    first, last = replayed["samples"][0], replayed["samples"][-1]
    counted = {key: n - first["steps"][key] for key, n in last["steps"].items()}
    traced = [f"{step['phase']} {step['set']}" for step in replayed["trace"]]
    assert counted == {key: traced.count(key) for key in counted}
    assert counted["prefill w8a8"] and counted["decode w8a8"] and counted["decode w4a8"]
    requests = replayed["requests"]
    assert replayed["conversations"] == 12 and len(requests) > 12
    assert all(r["arrival"] < r["first_token"] <= r["end"] for r in requests)
    generated = sum(request["generated_tokens"] for request in requests)
    assert generated == last["generated_tokens"] - first["generated_tokens"]
    monkeypatch.setattr(
        "sys.argv", ["plot", str(out), "-o", str(picture), "--decode", "1:w4a8,w8a8"]
    )
    load_example("plot_replay").main()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_replay_refuses_a_trace_that_the_server_does_not_write(server, tmp_path, monkeypatch):
    (tmp_path / "other.jsonl").touch()
    with pytest.raises(SystemExit, match=r"^error: of 8 steps, --trace .*other\.jsonl has 0; "):
        replay(server, tmp_path / "other.jsonl", tmp_path / "replay.json", monkeypatch)


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

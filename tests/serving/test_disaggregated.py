"""Prompts in 8 bits on one server, answers in 4 on another, the KV cache passed on by vLLM.

Our proxy stands before them. NIXL runs where it is installed beside vLLM (CONTRIBUTING.md says
how), and CI does without it: its wheels have 70 MB.
"""

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from aiohttp import web
from conftest import ROOT
from engines import PROMPTS, engine, generate
from example_scripts import load_example
from server import Server

from vllm_qoq.numerics.kv_layout import slot_bytes

HEAD, KV_HEADS, LAYERS = 64, 2, 2  # tests/data/tiny-llama
PROMPT, BLOCK = PROMPTS[0] * 20, 32
ROUTED = {"routing": {"prefill": "w8a8", "decode": "w4a8"}}
BF16_SLOT = 2 * 2 * HEAD  # bytes of a token and head

needs_nixl = pytest.mark.skipif(
    find_spec("nixl") is None, reason="nixl is not installed; CONTRIBUTING.md says how"
)
proxy = load_example("disaggregated_proxy")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(checkpoint, folder, name, connector, kv_bits=4):
    """Begin a server of one set; its cache goes through one of vLLM's connectors."""
    qoq = {"force_set": name, "kv_bits": kv_bits}
    options = (
        *("--kv-transfer-config", json.dumps(connector)),
        *("--additional-config", json.dumps({"qoq": qoq})),
        *("--enable-prompt-tokens-details", "--block-size", str(BLOCK)),
    )
    return Server(checkpoint, folder / f"{name}.log", *options, is_warm=True)


@contextlib.contextmanager
def proxied(prefill, decode):
    """The URL of our proxy before servers at these URLs."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(proxy.Proxy([prefill], [decode]).application())

    async def start():
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield "http://{}:{}".format(*runner.addresses[0][:2])
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)


def ask(url, **body):
    body = {"max_tokens": 8, "temperature": 0, "ignore_eos": True} | body
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode()


def first_logprob(checkpoint, qoq, kv_bits):
    """The log-probability of the first token that one engine answers."""
    llm = engine(checkpoint, qoq | {"kv_bits": kv_bits})
    return next(iter(generate(llm, (PROMPT,))[0][1][0].values()))


def cached_tokens(usage):
    return usage["prompt_tokens_details"]["cached_tokens"]


def test_one_server_reads_a_prompt_and_another_answers(nested_dir, tmp_path):
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "pages")},
    }
    with (
        serve(nested_dir, tmp_path, "w8a8", connector) as reader,
        serve(nested_dir, tmp_path, "w4a8", connector) as writer,
        proxied(reader.url, writer.url) as url,
    ):
        answer = json.loads(ask(url, prompt=PROMPT, logprobs=1))
        read, written = reader.steps(), writer.steps()
        for path in ("/health", "/v1/models"):
            with urllib.request.urlopen(url + path, timeout=10) as other:
                assert other.status == 200
        body, kind = json.dumps({"prompt": PROMPT}).encode(), {"Content-Type": "application/json"}
        tokenize = urllib.request.Request(f"{url}/tokenize", body, kind)
        with urllib.request.urlopen(tokenize, timeout=10) as other:
            assert json.load(other)["count"] == answer["usage"]["prompt_tokens"]
        streamed = ask(url, prompt=PROMPT, stream=True)
    usage = answer["usage"]
    passed_on = cached_tokens(usage)
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
    (choice,) = answer["choices"]
    (mine,) = choice["logprobs"]["token_logprobs"][:1]
    routed, alone = (first_logprob(nested_dir, q, 4) for q in (ROUTED, {"force_set": "w4a8"}))
    assert mine == pytest.approx(routed, abs=0.3) and mine not in (routed, alone)
    events = re.findall(r"data: (\{.*\})", streamed)
    assert "".join(json.loads(e)["choices"][0]["text"] for e in events) == choice["text"]


@pytest.mark.parametrize(
    "body, said",
    [
        ({"n": 2}, "n: the cache of a prompt is fetched once"),
        ({"prompt": ["a", "b"]}, "one prompt a request"),
        ({"prompt": [[1], [2]]}, "one prompt a request"),
        ({"echo": True}, "echo: the server that answers has not read the prompt"),
        ({"prompt_logprobs": 1}, "prompt_logprobs: "),
    ],
)
def test_requests_of_which_no_half_has_all_are_refused(body, said):
    assert said in proxy.obstacle({"prompt": "a"} | body)


def test_the_half_that_reads_prompts_answers_one_token():
    assert proxy.obstacle({"prompt": [1, 2], "n": 1}) is None
    asked = proxy.for_prefill(
        {
            **{"messages": [], "max_completion_tokens": 9, "min_tokens": 3, "stop": ["a"]},
            **{"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.5},
        }
    )
    assert asked.pop("kv_transfer_params")["do_remote_decode"] is True
    assert asked == {
        **{"messages": [], "max_completion_tokens": 1, "max_tokens": 1, "temperature": 0.5},
        **{"stream": False, "ignore_eos": True},
    }


def test_the_proxy_says_what_it_refuses_and_which_server_does_not_answer():
    absent = f"http://127.0.0.1:{free_port()}"
    with proxied(absent, absent) as url:
        for status, body in ((400, {"prompt": ["a", "b"]}), (502, {"prompt": "a"})):
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask(url, **body)
            said = json.loads(refused.value.read())["error"]["message"]
            assert refused.value.code == status
            assert ("one prompt" if status == 400 else absent.removeprefix("http://")) in said


def test_the_script_says_how_it_is_used():
    done = subprocess.run([ROOT / "examples/disaggregate.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and "CKPT PREFILL_SET DECODE_SET" in done.stderr


@pytest.mark.parametrize(
    ("port", "said"), [("abc", "PORT=abc: is no number of a port"), (None, "already in use")]
)
def test_the_script_looks_at_its_ports_first(port, said):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = script_environment(port or str(taken.getsockname()[1]))
        done = run_script(environment)
    assert done.returncode == 1 and said in done.stderr.splitlines()[-1]


def test_the_script_stops_all_that_it_began(tmp_path):
    """With a stand-in for vLLM, of which one half has a child and the other ends."""
    (tmp_path / "nixl.py").touch()
    vllm, child = tmp_path / "vllm", tmp_path / "child"
    vllm.write_text(
        "#!/bin/sh\ncase $* in *kv_consumer*) sleep 1; exit 3;; esac\n"
        f"sleep 300 & echo $! > {child}; wait\n"
    )
    vllm.chmod(0o755)
    done = run_script(script_environment(str(free_port()), tmp_path))
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("error: the server that answers ended")
    process = Path(f"/proc/{child.read_text().strip()}")
    assert not process.exists() or ") Z" in (process / "stat").read_text()


def script_environment(port, first="."):
    """An environment whose `python` is this one; programs and modules of `first` come before."""
    paths = os.pathsep.join((str(first), str(Path(sys.executable).parent), os.environ["PATH"]))
    return {**os.environ, "PATH": paths, "PYTHONPATH": str(first), "PORT": port}


def run_script(environment):
    command = [ROOT / "examples/disaggregate.sh", "CKPT", "w8a8", "w4a8"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def nixl(role):
    return {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}


@pytest.fixture
def nixl_pair(nested_dir, tmp_path, monkeypatch):
    """Both halves, of one thread each: NIXL puts them on the last core, to share with others."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", "127.0.0.1")

    @contextlib.contextmanager
    def pair(prefill_bits, decode_bits):
        def half(name, role, bits):
            monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
            return serve(nested_dir, tmp_path, name, nixl(role), bits)

        with (
            half("w8a8", "kv_producer", prefill_bits) as reader,
            half("w4a8", "kv_consumer", decode_bits) as writer,
            proxied(reader.url, writer.url) as url,
        ):
            yield reader, writer, url

    return pair


def transferred(server):
    """What NIXL counts: (bytes, seconds)."""
    metrics = server.get("/metrics")
    names = ("nixl_bytes_transferred", "nixl_xfer_time_seconds")
    return tuple(float(re.search(rf"vllm:{n}_sum{{.*}} (.+)", metrics)[1]) for n in names)


@needs_nixl
@pytest.mark.parametrize("bits, slot", [(4, slot_bytes(HEAD, 4)), (16, BF16_SLOT)])
def test_nixl_passes_every_page_of_a_prompt_on(nested_dir, nixl_pair, bits, slot):
    with nixl_pair(bits, bits) as (reader, writer, url):
        answer = json.loads(ask(url, prompt=PROMPT, logprobs=1))
        count, seconds = transferred(writer)
        read, written = reader.steps(), writer.steps()
    tokens = answer["usage"]["prompt_tokens"]
    assert count == -(-tokens // BLOCK) * BLOCK * LAYERS * KV_HEADS * slot and seconds > 0
    mine = answer["choices"][0]["logprobs"]["token_logprobs"][0]
    assert mine == pytest.approx(first_logprob(nested_dir, ROUTED, bits), abs=0.3)
    assert {key for key, steps in read.items() if steps} == {("prefill", "w8a8")}
    # It begins with a step of one token, the last of the prompt, and has the others.
    assert written["prefill", "w4a8"] == 0 and written["decode", "w4a8"] == 8
    print(f"{bits} bits: {tokens} tokens, {count:.0f} bytes, {seconds:.6f} s")


@needs_nixl
def test_nixl_refuses_a_cache_of_other_bits(nixl_pair):
    with nixl_pair(4, 8) as (_, writer, url):
        with pytest.raises(urllib.error.HTTPError):
            ask(url, prompt=PROMPT)
        assert transferred(writer)[0] == 0
        assert "NIXL compatibility hash mismatch" in writer.log.read_text()

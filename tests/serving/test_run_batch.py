"""`vllm run-batch` as docs/recipes/synthetic-data.md describes it, with the page's own code."""

import json
import re
from collections import Counter

from conftest import ROOT
from server import START_SECONDS, VLLM
from warm_process import run

PAGE = ROOT / "docs" / "recipes" / "synthetic-data.md"
MAKE_BATCH, FIND_MISSING = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
COUNT = re.compile(r"(prefill|decode) (\w+): (\d+)")


def test_a_batch_is_answered_and_the_last_line_counts_its_steps(
    two_sets_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("".join(f"def f{i}(x):\n" for i in range(6)))
    exec(MAKE_BATCH, {})
    batch = tmp_path / "batch.jsonl"
    requests = [json.loads(line) for line in batch.read_text().splitlines()]
    for i, request in enumerate(requests):
        # With more than four requests generation is in W8A8, until the four short ones are done.
        request["body"] |= {"max_tokens": 6 if i < 4 else 12, "ignore_eos": True}
    requests[0]["url"] = "/v1/unknown"
    batch.write_text("".join(json.dumps(request) + "\n" for request in requests))

    trace = tmp_path / "steps.jsonl"
    done = run(
        [
            *(VLLM, "run-batch", "-i", batch, "-o", tmp_path / "answers.jsonl"),
            *("--model", two_sets_dir, "--served-model-name", "OUT", "--quantization", "qoq"),
            *("--chat-template", "{{ messages[-1].content }}", "--max-model-len", "512"),
            *("--enforce-eager", "--kv-cache-memory-bytes", 64 << 20),
            *("--additional-config", json.dumps({"qoq": {"trace": str(trace)}})),
        ],
        timeout=START_SECONDS,
    )

    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    # What the model says may hold U+2028 and the like, at which splitlines() splits.
    answers = list(map(json.loads, (tmp_path / "answers.jsonl").read_bytes().splitlines()))
    tokens = [
        answer["response"]["body"]["usage"]["completion_tokens"]
        for answer in answers
        if not answer["error"]
    ]
    assert tokens == [6, 6, 6, 12, 12]
    (line,) = re.findall("steps by phase and set since the last report: (.*)", log)
    counted = {(phase, name): int(n) for phase, name, n in COUNT.findall(line)}
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    assert counted == Counter((step["phase"], step["set"]) for step in steps)
    assert counted.keys() == {("prefill", "w8a8"), ("decode", "w8a8"), ("decode", "w4a8")}
    assert [step["time"] for step in steps] == sorted(step["time"] for step in steps)

    exec(FIND_MISSING, {})
    missing = (tmp_path / "missing.jsonl").read_text().splitlines()
    assert missing == [json.dumps(requests[0])]


def answer(number, content):
    """A line as vLLM writes it: in pydantic's JSON, which leaves all characters as they are."""
    body = {"choices": [{"message": {"content": content}}]}
    response = {"status_code": 200, "body": body}
    entry = {"custom_id": f"{number}", "response": response, "error": None}
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode()


def test_every_character_and_a_cut_line_are_no_hindrance(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = ["a\u2028b", "c\x85d", "e\x1cf\x0bg", "\N{GRINNING FACE}", "h"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n", "utf-8")
    exec(MAKE_BATCH, {})
    batch = list(map(json.loads, (tmp_path / "batch.jsonl").read_bytes().splitlines()))
    assert [request["body"]["messages"][0]["content"] for request in batch] == prompts
    # As another program would write them.
    lines = [(json.dumps(request, ensure_ascii=False) + "\n").encode() for request in batch]
    (tmp_path / "batch.jsonl").write_bytes(b"".join(lines))

    cut = answer(2, "\N{GRINNING FACE}").partition(b"\x98")[0]  # a kill may fall within a character
    whole = answer(0, prompts[0]), answer(1, prompts[1])
    (tmp_path / "answers.jsonl").write_bytes(b"".join(whole) + cut)
    exec(FIND_MISSING, {})
    assert (tmp_path / "missing.jsonl").read_bytes() == b"".join(lines[2:])

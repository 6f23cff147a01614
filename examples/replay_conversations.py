"""Replay conversations against `vllm serve`, and write down in which set its steps run.

    vllm serve OUT --quantization qoq --enforce-eager \\
        --additional-config '{"qoq": {"trace": "/tmp/steps.jsonl"}}'
    python examples/replay_conversations.py -o replay.json --trace /tmp/steps.jsonl
    python examples/plot_replay.py replay.json -o replay.png

The conversations are a file in WildChat's form: an object with `timestamp` and `conversation` on
each line. Each begins at its timestamp. A turn is the text so far as a plain prompt, recorded
answers included, so it needs no chat template; the server generates as many tokens as the recorded
answer has, at 4 tokens for 3 words, and the next turn follows after a pause.

The trace has every step of a server with --enforce-eager. CUDA graphs replay steps that it does
not see; leave --trace out then, and the steps are those that /metrics counts between two samples.
"""

import argparse
import asyncio
import json
import math
import os
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from vllm_qoq.errors import UserError, reason, shown
from vllm_qoq.text_file import check_text

CONVERSATIONS = Path(__file__).with_name("conversations.jsonl")
# What is sampled: the name in the replay -> vLLM's metric, summed over engines.
METRICS = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generated_tokens": "vllm:generation_tokens_total",
}
STEPS = "vllm:qoq_steps_total"
SETTLED_SECONDS = 0.5  # the last step has been counted and traced by then


def read_conversations(path):
    """Read [(seconds after the first one, messages)], the earliest first."""
    check_text("--conversations", path)
    found = []
    # Not splitlines(): it also splits at U+2028 and the like, which JSON may hold as they are.
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                begin = datetime.fromisoformat(entry["timestamp"]).timestamp()
                messages = [message(part) for part in entry["conversation"]]
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise UserError(
                    f"{path}, line {number}: {type(error).__name__}: {reason(error)}; each line is "
                    "an object with a 'timestamp' and a 'conversation' of 'role' and 'content', as "
                    "in WildChat"
                ) from None
            found.append((begin, messages))
    if not any(turns(messages) for _, messages in found):
        raise UserError(
            f"{path} has no conversations with a turn of the role 'user'; give another file with "
            "--conversations"
        )
    found.sort()
    return [(begin - found[0][0], messages) for begin, messages in found]


def message(part):
    """Read (role, content), both of them text that can be sent."""
    for key in ("role", "content"):
        if not isinstance(part[key], str):
            raise TypeError(f"{key!r} is {shown(part[key])}, not a string")
        part[key].encode()  # a lone half of a surrogate pair is a ValueError
    return part["role"], part["content"]


def read_trace(path, since=0):
    """Read a trace's steps after `since` (s since 1970)."""
    try:
        with open(path, encoding="utf-8") as file:
            # A line without its end is being written.
            steps = [json.loads(line) for line in file if line.endswith("\n")]
        return [step for step in steps if step["time"] >= since]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--trace {path}: {type(error).__name__}: {reason(error)}; name the file that the "
            "server traces to"
        ) from None


def check_output(path):
    """Refuse a file that could not be written at the end, when all would be lost."""
    if path.is_dir():
        raise UserError(f"-o {path}: is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"-o {path}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"-o {path}: cannot be written; get the right to it or choose another")


def turns(messages):
    """List (the prompt as text, tokens of the recorded answer) for every turn of the user."""
    found, text = [], ""
    for i, (role, content) in enumerate(messages):
        text += f"{role}: {content}\n\n"
        if role == "user":
            answer = messages[i + 1][1] if i + 1 < len(messages) else ""
            found.append((f"{text}assistant:", max(1, len(answer.split()) * 4 // 3)))
    return found


class Server:
    """A running `vllm serve`, its numbers and the file that it traces to, if there is one."""

    def __init__(self, url, trace):
        import httpx
        from openai import AsyncOpenAI

        self.url, self.trace = url.rstrip("/"), trace
        self._http = httpx.AsyncClient(timeout=30)
        self._client = AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    async def check(self):
        """Find the model and its longest context, and end the program where steps are not seen."""
        import httpx
        from openai import OpenAIError

        try:
            model = (await self._client.models.list()).data[0]
            before = await self.sample()
        except (OpenAIError, httpx.HTTPError) as error:
            sys.exit(
                f"error: --base-url {self.url} does not answer: {error}; start vllm serve first"
            )
        self.model, self.longest = model.id, model.max_model_len
        if not before["steps"]:
            sys.exit(
                f"error: {self.url}/metrics has no {STEPS}; serve a checkpoint of vllm-qoq with "
                "statistics and one API process"
            )
        seen = len(self.traced(0))
        await self.ask("Are you there?", 8)
        await asyncio.sleep(SETTLED_SECONDS)
        counted = total(await self.sample()) - total(before)
        traced = len(self.traced(0)) - seen
        if self.trace is not None and traced != counted:
            sys.exit(
                f"error: of {counted} steps, --trace {self.trace} has {traced}; start the server "
                "with this trace and --enforce-eager, because CUDA graphs replay steps unseen, or "
                "leave --trace out"
            )

    async def ask(self, prompt, tokens):
        """Send a prompt and read the answer's stream; gives times (s since 1970) and tokens."""
        tokens = min(tokens, self.longest // 2)
        arrival = time.time()
        stream = await self._client.completions.create(
            model=self.model,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "truncate_prompt_tokens": self.longest - tokens},
        )
        first_token = None
        async for chunk in stream:
            if first_token is None and chunk.choices:
                first_token = time.time()
            usage = chunk.usage
        return {
            "arrival": arrival,
            "first_token": first_token,
            "end": time.time(),
            "prompt_tokens": usage.prompt_tokens,
            "generated_tokens": usage.completion_tokens,
        }

    async def sample(self):
        """Read the server's numbers: requests and tokens, and the steps by phase and set."""
        from prometheus_client.parser import text_string_to_metric_families

        answer = await self._http.get(f"{self.url}/metrics")
        answer.raise_for_status()
        # Of hundreds of lines, these few are parsed.
        names = (*METRICS.values(), STEPS)
        lines = [line for line in answer.text.split("\n") if line.startswith(names)]
        sample = {"time": time.time(), **dict.fromkeys(METRICS, 0), "steps": {}}
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for name, labels, value, *_ in family.samples:
                if name == STEPS:
                    key = f"{labels['phase']} {labels['set']}"
                    sample["steps"][key] = sample["steps"].get(key, 0) + int(value)
                for ours, theirs in METRICS.items():
                    if name == theirs:
                        sample[ours] += int(value)
        return sample

    def traced(self, since):
        """Read the trace's steps after `since` (s since 1970), none where there is no trace."""
        return read_trace(self.trace, since) if self.trace is not None else []


def total(sample):
    """Count all steps of a sample."""
    return sum(sample["steps"].values())


async def replay(server, conversations, args):
    """Send all conversations; gives the requests and the samples of the time that it took."""
    requests, samples = [], [await server.sample()]
    start = time.time()

    async def converse(number, begin, messages):
        await asyncio.sleep(max(0.0, start + begin / args.speed - time.time()))
        for turn, (prompt, tokens) in enumerate(turns(messages)):
            if turn:
                await asyncio.sleep(args.think / args.speed)
            answer = await server.ask(prompt, min(tokens, args.max_tokens))
            requests.append({"conversation": number, "turn": turn, **answer})

    async def watch():
        while True:
            await asyncio.sleep(args.every)
            samples.append(await server.sample())

    watching = asyncio.create_task(watch())
    talks = [talk for talk in conversations for _ in range(args.copies)]
    await asyncio.gather(*(converse(i, *talk) for i, talk in enumerate(talks)))
    await asyncio.sleep(SETTLED_SECONDS)
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching  # what it raised
    samples.append(await server.sample())
    return start, sorted(requests, key=lambda request: request["arrival"]), samples


async def run(args, conversations):
    """Check the server, replay, and put together what is written."""
    from openai import OpenAIError

    server = Server(args.base_url, args.trace)
    await server.check()
    try:
        start, requests, samples = await replay(server, conversations, args)
    except OpenAIError as error:
        sys.exit(f"error: {args.base_url} did not answer a request: {error}; see the server's log")
    return {
        "model": server.model,
        "conversations": len(conversations) * args.copies,
        "speed": args.speed,
        "start": start,
        "requests": requests,
        "samples": samples,
        "trace": server.traced(start) if args.trace is not None else None,
    }


def number(kind, form, may_be_0=False):
    """Make the parser of an option: a finite number above 0, or 0 as well; `form` describes it."""

    def parse(text):
        with suppress(ValueError):
            value = kind(text)
            if 0 < value < math.inf or (may_be_0 and value == 0):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}; give one")

    return parse


def main():
    """Replay the conversations and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--base-url", default="http://localhost:8000", metavar="URL")
    parser.add_argument("--conversations", type=Path, default=CONVERSATIONS, metavar="FILE.jsonl")
    parser.add_argument(
        "--trace", type=Path, help="the file that the server on this host traces to"
    )
    positive = number(float, "a number above 0, like 0.5")
    whole = number(int, "a whole number above 0, like 8")
    seconds = number(float, "a number of seconds from 0 on, like 0.5", may_be_0=True)
    for option, kind, default, text in (
        ("--speed", positive, 1, "how many times as fast"),
        ("--copies", whole, 1, "of each conversation"),
        ("--think", seconds, 2, "seconds before a turn"),
        ("--max-tokens", whole, 1024, "of an answer"),
        ("--every", positive, 0.1, "seconds of a sample"),
    ):
        parser.add_argument(
            option, type=kind, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    args = parser.parse_args()
    try:
        check_output(args.output)
        conversations = read_conversations(args.conversations)
        if args.trace is not None:
            check_text("--trace", args.trace)
            read_trace(args.trace)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        result = asyncio.run(run(args, conversations))
    except KeyboardInterrupt:
        print("interrupted; nothing is written", file=sys.stderr)
        sys.exit(130)
    args.output.write_text(json.dumps(result))
    took = result["samples"][-1]["time"] - result["start"]
    print(f"{args.output}: {len(result['requests'])} requests in {took:.1f} s")


if __name__ == "__main__":
    main()

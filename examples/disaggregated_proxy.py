"""Stand before two kinds of `vllm serve`: one reads prompts, the other answers.

    python examples/disaggregated_proxy.py --prefill http://127.0.0.1:8001 \\
        --decode http://127.0.0.1:8002 --port 8000

The servers pass the KV cache on by vLLM's NixlConnector; `examples/disaggregate.sh` starts all
three. A request goes to a server of --prefill for one token, which says where its cache is, and
with that to one of --decode, whose answer is passed on as it comes. Several servers of a kind take
turns. All other paths are those of the first server of --decode.

The cache of a prompt is fetched once. So a request has one prompt and one answer, and asks for
nothing of the prompt that is not in its cache.
"""

import argparse
import itertools
import json
import sys

from aiohttp import ClientError, ClientSession, ClientTimeout, web

PATHS = ("/v1/completions", "/v1/chat/completions")
# What the server that reads prompts is told, and what its answer is asked to carry.
REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
# What has no meaning for one token, or could end an answer before its cache is offered.
OF_ANSWERS = ("stream_options", "min_tokens", "stop", "stop_token_ids")
TO_SERVERS = {"authorization", "x-request-id"}
NOT_FROM_SERVERS = {"transfer-encoding", "content-length", "connection", "content-encoding"}


def obstacle(body):
    """Say why a request cannot be served in two halves; None if it can."""
    if not isinstance(body, dict):
        return "the request is not a JSON object"
    if body.get("n") not in (None, 1):
        return "n: the cache of a prompt is fetched once; send a request for each answer"
    prompt = body.get("prompt")
    if isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt):
        return "prompt: the proxy takes one prompt a request; send a request for each"
    for key in ("echo", "prompt_logprobs", "use_beam_search"):
        if body.get(key):
            return f"{key}: the server that answers has not read the prompt; ask it directly"
    return None


def for_prefill(body):
    """Turn a request into that for the server which reads its prompt and answers one token."""
    one = {key: value for key, value in body.items() if key not in OF_ANSWERS}
    one |= {"stream": False, "max_tokens": 1, "ignore_eos": True}
    one |= {"kv_transfer_params": REMOTE_DECODE}
    if "max_completion_tokens" in one:
        one["max_completion_tokens"] = 1
    return one


class Proxy:
    """The two kinds of servers, and the client that asks them.

    prefill, decode  URLs without a slash at the end
    """

    def __init__(self, prefill, decode):
        self._prefill, self._decode = itertools.cycle(prefill), itertools.cycle(decode)
        self._all, self._first = [*prefill, *decode], decode[0]

    def application(self):
        """Make the web application."""
        application = web.Application(client_max_size=1 << 30, middlewares=[name_the_server])
        application.cleanup_ctx.append(self._client_of)
        application.router.add_get("/health", self.health)
        for path in PATHS:
            application.router.add_post(path, self.answer)
        application.router.add_route("*", "/{path:.*}", self.hand_on)
        return application

    async def _client_of(self, _):
        # An answer takes as long as it takes.
        async with ClientSession(timeout=ClientTimeout(total=None)) as self._client:
            yield

    async def health(self, _):
        """Answer 200 if all servers do."""
        for url in self._all:
            async with self._client.get(f"{url}/health") as answer:
                if answer.status != 200:
                    return web.Response(status=503, text=f"{url} answers {answer.status}\n")
        return web.Response()

    async def answer(self, request):
        """Let one server read the prompt and another answer."""
        try:
            body = await request.json()
        except ValueError as error:
            return _refused(f"the request is not JSON: {error}")
        if reason := obstacle(body):
            return _refused(reason)
        url = next(self._prefill) + request.path
        async with self._client.post(url, json=for_prefill(body), headers=_own(request)) as read:
            if read.status != 200:
                return await _passed_on(read, request)
            where = (await read.json()).get("kv_transfer_params")
        # Connectors that find a cache by its prompt say nothing.
        body |= {"kv_transfer_params": where} if where else {}
        url = next(self._decode) + request.path
        async with self._client.post(url, json=body, headers=_own(request)) as answer:
            return await _passed_on(answer, request)

    async def hand_on(self, request):
        """Ask the first server that answers."""
        url, data = self._first + request.path_qs, await request.read()
        headers = _own(request)
        if kind := request.headers.get("content-type"):
            headers["content-type"] = kind
        asked = self._client.request(request.method, url, data=data, headers=headers)
        async with asked as answer:
            return await _passed_on(answer, request)


def _own(request):
    """The headers of a request that the servers get, too."""
    return {k: v for k, v in request.headers.items() if k.lower() in TO_SERVERS}


async def _passed_on(answer, request):
    """Pass an answer on as it comes; where it breaks off, so does the connection."""
    headers = {k: v for k, v in answer.headers.items() if k.lower() not in NOT_FROM_SERVERS}
    response = web.StreamResponse(status=answer.status, headers=headers)
    await response.prepare(request)
    try:
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
    except ClientError as error:
        print(f"{answer.url}: {error!r}", file=sys.stderr)
        if request.transport is not None:
            request.transport.close()
    return response


@web.middleware
async def name_the_server(request, handler):
    """Answer 502 where a server cannot be reached."""
    try:
        return await handler(request)
    except ClientError as error:
        return _refused(f"a server does not answer: {error}", status=502)


def _refused(reason, status=400):
    error = {"message": reason, "type": "disaggregated_proxy", "code": status}
    return web.Response(
        status=status, text=json.dumps({"error": error}), content_type="application/json"
    )


def main():
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for kind, does in (("prefill", "read prompts"), ("decode", "answer")):
        parser.add_argument(
            f"--{kind}", nargs="+", required=True, metavar="URL", help=f"servers that {does}"
        )
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    args = parser.parse_args()
    urls = ([url.rstrip("/") for url in found] for found in (args.prefill, args.decode))
    web.run_app(Proxy(*urls).application(), host=args.host, port=args.port, print=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A server on this machine that speaks as much of the Hugging Face Hub as a download needs."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

REPOSITORY = "org/name"
TOKEN = "hf_secret"


@dataclass
class Hub:
    """What the server has, and what it was asked for.

    revisions  branch, tag or commit -> commit; each commit has a file `of_commit`
    needs      "": everyone may read; "conditions": it is gated; "token": it is private
    status     the status of all answers, if it is not 0
    cut        file -> how many of its bytes come before the connection ends
    downloads  how often the content of each file was asked for
    """

    files: Mapping[str, bytes]
    url: str = ""
    revisions: dict[str, str] = field(default_factory=lambda: {"main": "a" * 40})
    needs: str = ""
    status: int = 0
    cut: dict[str, int] = field(default_factory=dict)
    downloads: Counter[str] = field(default_factory=Counter)


@contextmanager
def hub_server(files: Mapping[str, bytes]) -> Iterator[Hub]:
    """Serve the repository `REPOSITORY` with these files."""
    hub = Hub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    # Asked often, or the end of every test waits for half a second.
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        if self.hub.status:
            self._error(self.hub.status, "")
            return
        info = re.fullmatch(r"/api/models/(.+?)(?:/revision/([^/]+))?", path)
        tree = re.fullmatch(r"/api/models/(.+?)/tree/([^/]+)", path)
        file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        found = file or tree or info
        allowed = self.headers.get("authorization") == f"Bearer {TOKEN}"
        if found is None or found[1] != REPOSITORY or (self.hub.needs == "token" and not allowed):
            self._error(404 if found is None else 401, "RepoNotFound")
            return
        revision = unquote(found[2] or "main")
        commit = self.hub.revisions.get(revision, revision)
        if commit not in self.hub.revisions.values():
            self._error(404, "RevisionNotFound")
        elif file:
            # A gated repository shows its files, and not what is in them.
            if self.hub.needs == "conditions" and not allowed:
                self._error(403, "GatedRepo")
            else:
                self._file(commit, unquote(file[3]))
        elif tree:
            self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                    for name, data in self.hub.files.items()
                ]
            )
        else:
            self._json(
                {
                    "id": REPOSITORY,
                    "sha": commit,
                    "siblings": [
                        {"rfilename": name, "size": len(data), "blobId": _digest(data)}
                        for name, data in self.hub.files.items()
                    ],
                }
            )

    def _file(self, commit: str, name: str) -> None:
        if name not in self.hub.files:
            self._error(404, "EntryNotFound")
            return
        data = self.hub.files[name]
        asked = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("range") or "")
        start = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{_digest(data)}"')
        self.send_header("Content-Length", str(len(data) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        self.hub.downloads[name] += 1
        if name in self.hub.cut:
            data = data[: self.hub.cut[name]]
            self.close_connection = True
        self.wfile.write(data[start:])

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()

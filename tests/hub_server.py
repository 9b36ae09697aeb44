"""A small server on loopback that answers like a model hub's data set repository.

Serves `resolve` addresses the way huggingface_hub expects them: HEAD and GET, the commit in
X-Repo-Commit, errors named in X-Error-Code, byte ranges, and large (.bin) files by a redirect to
a storage address with X-Linked-Size and X-Linked-Etag. Faults are asked for by file and are used
up in order, one a GET:

    "cut"      half of the bytes, then the connection is closed
    "hang"     half of the bytes, then nothing for a while
    "short"    three quarters of the bytes, announced and sent as if they were all
    "500"      an internal server error ("head500", "head403": that answer already at the HEAD)
    "portal"   an answer to the HEAD as of a server that is no hub
"""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HANG_SECONDS = 8


@dataclass
class Repository:
    """The files of one data set repository, and what goes wrong with them."""

    name: str
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def take_fault(self, path: str, *kinds: str) -> str | None:
        """Return and use up the next fault of a file, if it is one of `kinds`."""
        waiting = self.faults.get(path, [])
        return waiting.pop(0) if waiting and waiting[0] in kinds else None

    def downloads(self, path: str) -> int:
        """Return how often a file's bytes were asked for."""
        return sum(line == f"GET {path}" for line in self.log)


class Handler(BaseHTTPRequestHandler):
    """One request; the server's `repository` is what is served."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Keep the test output quiet."""

    def do_HEAD(self) -> None:
        """Answer with headers only."""
        self.answer()

    def do_GET(self) -> None:
        """Answer with headers and bytes."""
        self.answer()

    def answer(self) -> None:
        """Find the file an address means and send it, redirect to it, or say what is wrong."""
        repository: Repository = self.server.repository
        path = self.path.partition("?")[0]
        stored = path.startswith("/storage/")
        if stored:
            name = path.removeprefix("/storage/")
        else:
            parts = path.split("/resolve/", 1)
            if parts[0] != f"/datasets/{repository.name}":
                return self.refuse(404, "RepoNotFound")
            revision, _, name = parts[1].partition("/")
            if revision not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
        repository.log.append(f"{self.command} {name}")
        if name not in repository.files:
            return self.refuse(404, "EntryNotFound")
        if self.command == "HEAD":
            fault = repository.take_fault(name, "head500", "head403", "portal")
            if fault:
                return self.refuse({"head500": 500, "head403": 403, "portal": 200}[fault])
        if name.endswith(".bin") and not stored:
            return self.redirect(name)
        self.send_file(name)

    def refuse(self, status: int, code: str | None = None) -> None:
        """Send an error without a body."""
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def redirect(self, name: str) -> None:
        """Send the address of a large file's bytes, with its size and hash."""
        content = self.server.repository.files[name]
        self.send_response(302)
        # Another host, as storage is: what the hub says of the file counts, not what storage says.
        port = self.server.server_port
        self.send_header("Location", f"http://localhost:{port}/storage/{name}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_file(self, name: str) -> None:
        """Send a file or the rest of it from the start of a range, with its next fault."""
        repository: Repository = self.server.repository
        content = repository.files[name]
        whole = len(content)
        fault = None
        if self.command == "GET":
            fault = repository.take_fault(name, "cut", "hang", "short", "500")
        if fault == "500":
            return self.refuse(500)
        if fault == "short":
            content = content[: whole * 3 // 4]
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        body = content[start:]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(repository.files[name]).hexdigest()}"')  # noqa: S324
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("cut", "hang"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "hang":
                time.sleep(HANG_SECONDS)
            self.close_connection = True
            return
        self.wfile.write(body)


class HubServer:
    """Serve a repository while the `with` block runs; `endpoint` is what HF_ENDPOINT takes."""

    def __init__(self, repository: Repository) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.repository = repository
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

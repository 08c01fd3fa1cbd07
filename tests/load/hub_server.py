"""A small model hub on loopback: the interfaces of the Hugging Face hub and of ModelScope, with faults on demand."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_BYTES = 50_000  # larger files are LFS files: announced by sha256, served by a redirect
TOKEN = "hf_secret"


@dataclass
class Faults:
    """What goes wrong; counters are used up."""

    drop_after: list[int] = field(default_factory=list)  # each transfer of an LFS file ends after that many bytes
    statuses: list[int] = field(default_factory=list)  # answers given before the real ones
    retry_after: str = ""
    flip: str = ""  # a path whose bytes are served damaged
    flip_times: int = 1 << 30
    ignore_ranges: bool = False
    redirect: str = ""  # where LFS files redirect to, instead of our own /cdn
    private: bool = False
    grow: str = ""  # a path that sends a byte more than announced
    wrong_range: bool = False


@dataclass
class FakeHub:
    """Repositories by name, and a log of what was asked."""

    repos: dict[str, dict[str, bytes]]
    faults: Faults = field(default_factory=Faults)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    endpoint: str = ""
    cdn: str = ""  # the same server under another host name

    def asked(self, part: str) -> list[dict[str, str]]:
        """The headers of requests whose path has `part`."""
        return [headers for path, headers in self.requests if part in path]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: FakeHub


@contextmanager
def serve(repos: dict[str, dict[str, bytes]]) -> Iterator[FakeHub]:
    """Runs the hub until the block ends."""
    hub = FakeHub(repos)
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = hub
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    hub.cdn = f"http://localhost:{server.server_port}/cdn"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _sibling(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": git_sha1(data)}
    if len(data) > LFS_BYTES:
        sha = hashlib.sha256(data).hexdigest()
        entry |= {"lfs": {"sha256": sha, "size": len(data), "pointerSize": 135}, "blobId": "f" * 40}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    @property
    def hub(self) -> FakeHub:
        return self.server.hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        return

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        if path.startswith("/cdn/"):
            self.body(path.removeprefix("/cdn/"))
        elif self.hub.faults.statuses:
            self.plain(self.hub.faults.statuses.pop(0), {"Retry-After": self.hub.faults.retry_after or "0"})
        elif self.hub.faults.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.plain(401)
        elif path.startswith("/api/v1/models/"):
            self.modelscope(path.removeprefix("/api/v1/models/"), query)
        elif path.startswith("/api/models/"):
            self.listing(path.removeprefix("/api/models/"))
        else:
            self.resolve(path.lstrip("/"))

    def plain(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def json(self, value: Any) -> None:
        self.plain(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def listing(self, rest: str) -> None:
        repo, _, revision = rest.partition("/revision/")
        if repo not in self.hub.repos or revision not in ("", "main", COMMIT, "v1"):
            self.plain(404, {"X-Error-Code": "RepoNotFound"})
            return
        siblings = [_sibling(path, data) for path, data in self.hub.repos[repo].items()]
        self.json({"_id": "1", "id": repo, "modelId": repo, "sha": COMMIT, "private": False, "siblings": siblings})

    def resolve(self, rest: str) -> None:
        repo, _, tail = rest.partition("/resolve/")
        path = tail.partition("/")[2]
        data = self.hub.repos.get(repo, {}).get(path)
        if data is None:
            self.plain(404, {"X-Error-Code": "EntryNotFound"})
        elif len(data) > LFS_BYTES:
            sha = hashlib.sha256(data).hexdigest()
            location = self.hub.faults.redirect or f"{self.hub.cdn}/{repo}//{path}"
            headers = {"Location": location, "X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data))}
            self.plain(302, headers | {"X-Repo-Commit": COMMIT, "ETag": f'"{sha}"'})
        else:
            self.body(f"{repo}//{path}", {"ETag": f'"{git_sha1(data)}"', "X-Repo-Commit": COMMIT})

    def body(self, which: str, headers: dict[str, str] | None = None) -> None:
        repo, _, path = which.partition("//")
        data = self.hub.repos[repo][path]
        if self.hub.faults.flip == path and self.hub.faults.flip_times > 0:
            self.hub.faults.flip_times -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        if self.hub.faults.grow == path:
            data += b"x"
        start, wanted = 0, self.headers.get("Range", "")
        if wanted.startswith("bytes=") and not self.hub.faults.ignore_ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(data) > 0:
            self.plain(416, {"Content-Range": f"bytes */{len(data)}"})
            return
        self.send_response(206 if start else 200)
        if start:
            shown = start + 1 if self.hub.faults.wrong_range else start
            self.send_header("Content-Range", f"bytes {shown}-{len(data) - 1}/{len(data)}")
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command != "GET":
            return
        rest = data[start:]
        if len(data) > LFS_BYTES and self.hub.faults.drop_after:
            rest = rest[: self.hub.faults.drop_after.pop(0)]
            self.close_connection = True
        self.wfile.write(rest)

    def modelscope(self, rest: str, query: dict[str, list[str]]) -> None:
        repo, _, tail = rest.partition("/repo")
        if repo not in self.hub.repos:
            self.plain(404)
        elif tail == "/files":
            files = [{"Path": "folder", "Type": "tree", "Size": 0}] + [
                {"Path": path, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
                for path, data in self.hub.repos[repo].items()
            ]
            self.json({"Code": 200, "Success": True, "Data": {"Files": files}})
        else:
            self.body(f"{repo}//{query['FilePath'][0]}")

"""A hub on loopback: what huggingface_hub asks for one model repo, with faults on request.

Source   the requests of huggingface_hub 2.4.0: GET /api/models/OWNER/NAME[/revision/REV], HEAD and GET
         /OWNER/NAME/resolve/REV/FILE; for a large file that points to another host, here this server's other name
Differs  no xet
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = ".safetensors"  # kept in LFS


@dataclass
class Fault:
    """What goes wrong with requests whose path ends so, the first `times` of them."""

    kind: str  # "drop", "corrupt", "short", or an HTTP status
    file: str
    times: int = 1
    method: str = "GET"


@dataclass
class Request:
    method: str
    host: str  # "hub" or "cdn"
    file: str
    revision: str
    range: str | None
    token: str | None

    @property
    def is_body(self) -> bool:
        """A large file is wanted, from its start or from where a connection dropped; not just its header."""
        return self.method == "GET" and self.host == "cdn" and not (self.range or "").startswith("bytes=0-")


@dataclass
class Hub:
    """One repo; commits are folders. Use as a context manager."""

    repo: str
    commits: dict[str, Path]  # the last one is main
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    on_body: Callable[[str], None] = lambda file: None  # before the body of a large file is sent
    sizes: dict[str, int] = field(default_factory=dict)  # what the hub says of a file, where that is wrong

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def port(self) -> int:
        return self.server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def bodies(self) -> list[str]:
        return [r.file for r in self.requests if r.is_body]

    def fault(self, method, file):
        """The kind of the next fault of such a request, which is then used up; or None."""
        for fault in self.faults:
            if fault.times and fault.method == method and file.endswith(fault.file):
                fault.times -= 1
                return fault.kind
        return None


def hashes(content: bytes) -> tuple[str, str]:
    """git's sha1 and sha256"""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def answer(self):
            path = unquote(urlsplit(self.path).path)
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else hub.head)
            elif parts[0] == "cdn":
                self.file("cdn", parts[1], "/".join(parts[2:]))
            elif len(parts) > 4 and parts[2] == "resolve" and "/".join(parts[:2]) == hub.repo:
                self.file("hub", parts[3], "/".join(parts[4:]))
            else:
                self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

        def info(self, repo, revision):
            self.seen("hub", "info", revision)
            if status := hub.fault(self.command, "info"):
                return self.send(int(status), b"busy")
            revision = hub.head if revision == "main" else revision
            if repo != hub.repo:
                return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            if revision not in hub.commits:
                return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            siblings = []
            for path in sorted(hub.commits[revision].iterdir()):
                sha1, sha256 = hashes(path.read_bytes())
                size = hub.sizes.get(path.name, path.stat().st_size)
                entry = {"rfilename": path.name, "size": size, "blobId": sha1}
                if path.name.endswith(LARGE):
                    entry["lfs"] = {"size": size, "sha256": sha256, "pointerSize": 134}
                siblings.append(entry)
            body = json.dumps({"id": repo, "sha": revision, "siblings": siblings}).encode()
            return self.send(200, body, {"Content-Type": "application/json"})

        def file(self, host, revision, name):
            self.seen(host, name, revision)
            path = hub.commits.get(revision, Path("/nowhere")) / name
            if not path.is_file():
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            content = path.read_bytes()
            sha1, sha256 = hashes(content)
            headers = {"X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
            if host == "hub" and name.endswith(LARGE):
                headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content)), "ETag": f'"{sha1}"'}
                headers["Location"] = f"http://localhost:{hub.port}/cdn/{revision}/{name}"
                if status := hub.fault(self.command, name) if self.command == "HEAD" else None:
                    return self.send(int(status), b"busy")
                return self.send(302, b"", headers)
            headers["ETag"] = f'"{sha1}"'
            if hub.requests[-1].is_body:
                hub.on_body(name)
            is_header = host == "cdn" and not hub.requests[-1].is_body
            kind = None if is_header else hub.fault(self.command, name)
            if kind and kind.isdigit():
                return self.send(int(kind), b"busy")
            if kind == "corrupt":
                content = content[:-1] + bytes([content[-1] ^ 1])
            if kind == "short":
                content = content[: len(content) // 2]
            status = 200
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                first, last = int(first), min(int(last or len(content) - 1), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, status = content[first : last + 1], 206
            return self.send(status, content, headers, dropped=kind == "drop")

        def seen(self, host, file, revision):
            token = self.headers.get("Authorization")
            hub.requests.append(Request(self.command, host, file, revision, self.headers.get("Range"), token))

        def send(self, status, body, headers=None, dropped=False):
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            with contextlib.suppress(ConnectionError):  # the client was killed
                self.wfile.write(body[: len(body) // 2] if dropped else body)
                self.wfile.flush()
            self.close_connection |= dropped

    return Handler

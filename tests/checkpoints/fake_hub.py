"""A hub on 127.0.0.1 that serves directories, and writes down what was asked of it."""

import hashlib
import json
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee0123456789c0ffee0123456789c0ffee01"
_REFUSALS = {
    "org/gated": (403, "GatedRepo"),
    "org/absent": (404, "RepoNotFound"),
    "org/private": (401, "RepoNotFound"),
}


@dataclass
class FakeHub:
    """One repository per directory; `served` is (file, bytes sent) for each GET of a file."""

    repos: dict[str, Path]
    endpoint: str = ""
    served: list[tuple[str, int]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def sent(self, file: str) -> int:
        """Bytes of one file sent so far."""
        return sum(count for name, count in self.served if name == file)


@contextmanager
def serve(repos: dict[str, Path]) -> Generator[FakeHub]:
    hub = FakeHub(repos)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            return

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?.*", self.path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+).*", self.path)
            match = info or file
            assert match is not None, self.path
            repo, revision = match[1], match[2] or "main"
            if repo in _REFUSALS or repo not in hub.repos:
                self._refuse(*_REFUSALS.get(repo, (404, "RepoNotFound")))
            elif revision not in ("main", "v1", COMMIT):
                self._refuse(404, "RevisionNotFound")
            elif info:
                self._list(hub.repos[repo], repo)
            else:
                self._send_file(hub.repos[repo] / match[3], match[3], body=body)

        def _list(self, directory: Path, repo: str) -> None:
            files = sorted(p.relative_to(directory) for p in directory.rglob("*") if p.is_file())
            siblings = [{"rfilename": path.as_posix()} for path in files]
            content = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}
            data = json.dumps(content).encode()
            self._send(200, data, {"Content-Type": "application/json"}, body=True)

        def _send_file(self, path: Path, name: str, *, body: bool) -> None:
            if not path.is_file():
                return self._refuse(404, "EntryNotFound")
            data = path.read_bytes()
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            status, total = 200, len(data)
            if span:
                start, stop = int(span[1]), min(int(span[2] or total - 1) + 1, total)
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
                status, data = 206, data[start:stop]
            if body:
                hub.served.append((name, len(data)))
            self._send(status, data, headers, body=body)

        def _refuse(self, status: int, code: str) -> None:
            self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code}, body=False)

        def _send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    return Handler

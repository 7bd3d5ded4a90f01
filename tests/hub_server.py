"""A small hub on this machine: what the unmodified clients ask for, and faults on demand.

`GET /api/{kind}s/{id}[/revision/{rev}]`, `HEAD` and `GET /[datasets/]{id}/resolve/{rev}/{file}`: small files
307 to /api/resolve-cache, large ones 302 to another origin; ranges there. Errors carry X-Error-Code.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

LARGE = (".safetensors", ".gz", ".parquet", ".bin")


@dataclass
class Hub:
    """Repositories by "models/owner/name" or "datasets/owner/name": commits, the newest last."""

    repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    faults: dict[str, tuple[int, str] | str] = field(default_factory=dict)  # pattern of paths: what happens
    requests: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def put(self, repository: str, files: Mapping[str, bytes] | Path) -> str:
        """Add a commit, of the files of a directory or a mapping; its sha."""
        if isinstance(files, Path):
            files = {f.relative_to(files).as_posix(): f.read_bytes() for f in files.rglob("*") if f.is_file()}
        sha = hashlib.sha1(repr(sorted(files.items())).encode(), usedforsecurity=False).hexdigest()
        self.repositories.setdefault(repository, []).append((sha, dict(files)))
        return sha

    def find(self, kind: str, name: str) -> list[tuple[str, dict[str, bytes]]] | None:
        return self.repositories.get(f"{kind}/{self.aliases.get(name, name)}")


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        held = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    held: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.held.requests.append(f"{self.command} {path}")
        for pattern, fault in self.held.faults.items():
            if re.search(pattern, path):
                if fault == "stall":
                    time.sleep(60)
                    return
                assert not isinstance(fault, str)
                return self._say(fault[0], b"{}", {"X-Error-Code": fault[1]} if fault[1] else {})
        if path == "/":
            return self._say(200, b"")
        if found := re.fullmatch(r"/api/(models|datasets)/(.+?)(?:/revision/([^/]+))?", path):
            return self._info(*found.groups())
        if found := re.fullmatch(r"/api/resolve-cache/(models|datasets)/(.+?)/([0-9a-f]{40})/(.+)", path):
            return self._body(*found.groups())
        if found := re.fullmatch(r"/lfs/(models|datasets)/(.+?)/([0-9a-f]{40})/(.+)", path):
            return self._body(*found.groups())
        if found := re.fullmatch(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file = found.groups()
            return self._resolve("datasets" if kind else "models", name, revision, file)
        return self._say(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _commit(self, kind: str, name: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        commits = self.held.find(kind, name)
        if commits is None:
            self._say(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        if revision in (None, "main"):
            return commits[-1]
        known = [commit for commit in commits if commit[0] == revision]
        if not known:
            self._say(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return known[0]

    def _info(self, kind: str, name: str, revision: str | None) -> None:
        if (commit := self._commit(kind, name, revision)) is None:
            return
        siblings = [{"rfilename": file} for file in sorted(commit[1])]
        answer = {"id": name, "sha": commit[0], "siblings": siblings, "private": False, "gated": False}
        self._say(200, json.dumps(answer | {"tags": [], "downloads": 0, "likes": 0}).encode())

    def _resolve(self, kind: str, name: str, revision: str, file: str) -> None:
        if (commit := self._commit(kind, name, revision)) is None:
            return
        sha, files = commit
        if file not in files:
            return self._say(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        body, where = files[file], f"{kind}/{name}/{sha}/{file}"
        if file.endswith(LARGE):
            etag = hashlib.sha256(body).hexdigest()
            more = {"X-Linked-Size": str(len(body)), "X-Linked-ETag": f'"{etag}"', "X-Repo-Commit": sha}
            return self._say(302, b"", {"Location": f"http://localhost:{self.held.port}/lfs/{where}", **more})
        return self._say(307, b"", {"Location": f"/api/resolve-cache/{where}", "X-Repo-Commit": sha})

    def _body(self, kind: str, name: str, sha: str, file: str) -> None:
        if (commit := self._commit(kind, name, sha)) is None:
            return
        body = commit[1][file]
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": sha}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), int(asked[2] or len(body) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
            return self._say(206, body[start : end + 1], headers)
        self._say(200, body, headers)

    def _say(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Tests read `requests` instead."""

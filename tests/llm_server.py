"""A language model's endpoint on this machine, /v1/chat/completions, that fails in every way on demand.

`faults` is what becomes of the next questions, one after the other; None, and all after the last, is an
answer by `judge`. `hold` keeps every answer back until it is set.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = tuple[int, dict[str, str], bytes] | str | None


def longer(question: str) -> str:
    """The verdict for the reply with more words."""
    found = [re.search(rf"<reply_{x}>\n(.*?)\n</reply_{x}>", question, re.DOTALL) for x in "AB"]
    a, b = (len(each[1].split()) if each else 0 for each in found)
    return f"One is longer.\n[[{'A' if a > b else 'B' if b > a else 'C'}]]"


@dataclass
class Model:
    """What was asked, and what is answered."""

    judge: Callable[[str], str | None] = longer
    name: str = "judge-1b"
    ended: str = "stop"
    faults: list[Fault] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    hold: threading.Event | None = None
    hold_after: int = 0
    held: threading.Event = field(default_factory=threading.Event)
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def questions(self) -> list[str]:
        return [each["messages"][0]["content"] for each in self.asked]

    def answer(self, path: str, body: dict[str, Any]) -> bytes:
        return self.completion(body["messages"][0]["content"])

    def next_fault(self, path: str) -> Fault:
        return self.faults.pop(0) if self.faults else None

    def completion(self, question: str) -> bytes:
        text = self.judge(question)
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": len(question.split()), "completion_tokens": len((text or "").split())}
        choice = {"index": 0, "message": message, "finish_reason": self.ended}
        return json.dumps({"id": "x", "model": self.name, "choices": [choice], "usage": usage}).encode()


@contextmanager
def serving(model: Model | None = None) -> Iterator[Model]:
    """A model that answers until the block ends."""
    model = model or Model()

    class Handler(_Handler):
        of = model

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    model.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield model
    finally:
        if model.hold is not None:
            model.hold.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    of: Model
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        model, length = self.of, int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length) or b"{}")
        with model.lock:
            model.asked.append(body)
            model.headers.append(dict(self.headers))
            model.paths.append(self.path)
            fault = model.next_fault(self.path)
            number = len(model.asked)
        if model.hold is not None and number > model.hold_after:
            model.held.set()
            model.hold.wait(300)
        if isinstance(fault, tuple):
            return self._say(*fault)
        answer = model.answer(self.path, body)
        if fault is None:
            return self._say(200, {}, answer)
        return getattr(self, f"_{fault}")(answer)

    def _closed(self, answer: bytes) -> None:
        """The connection ends without a word."""
        self.close_connection = True

    def _truncated(self, answer: bytes) -> None:
        """Half of what was announced."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer[: len(answer) // 2])
        self.close_connection = True

    def _drip(self, answer: bytes) -> None:
        """A byte now and then, each well within the time between two."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        try:
            for i in range(len(answer)):
                self.wfile.write(answer[i : i + 1])
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            self.close_connection = True

    def _endless(self, answer: bytes) -> None:
        """More and more, in no announced length."""
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b" " * 65536)
        except OSError:
            self.close_connection = True

    def _say(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        with suppress(ConnectionError):  # who asked was killed meanwhile
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Tests read `asked` instead."""

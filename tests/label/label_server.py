"""`preftune label` as a process of its own, which can be killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patience import wait_for

ROOT = Path(__file__).resolve().parents[2]


class Served:
    """The server of a run on a port of its own; `links` by rater, "" for the owner's."""

    def __init__(self, run: Path, *words: str) -> None:
        self.run = run
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.words: Sequence[str] = ("label", str(run), "--port", str(self.port), *words)
        self.log = run / "label.log"
        self.links: dict[str, str] = {}
        self.start()

    def start(self) -> None:
        """Also after a kill: the same port, the same links."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "preftune", *self.words], stdout=log, stderr=log, env=environment
            )
        wait_for(self._answers, lambda: self.process.poll() is None)
        found = re.findall(r"^  (\S+).*?: (http://\S+)$", self.log.read_text(encoding="utf-8"), re.MULTILINE)
        self.links = {"" if name == "results" else name: link for name, link in found}

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def ask(self, raw: bytes) -> tuple[int, bytes]:
        """Bytes as they are, over a socket: status and body of the answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(raw)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2]

    def api(self, rater: str, path: str, body: Any = None) -> tuple[int, Any]:
        """A request as the page makes it."""
        text = b"" if body is None else json.dumps(body).encode()
        token = self.links[rater].partition("#")[2]
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
        head += f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        status, answer = self.ask(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        return status, json.loads(answer)

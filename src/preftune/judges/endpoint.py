"""Questions to a model behind an OpenAI-compatible endpoint: POST URL/chat/completions, or any other `call`.

Standard library only. The other side is not trusted. An answer has a time limit as a whole, which begins once
the connection stands (each step to that has the same limit), and at most a mebibyte (`max_body`); a redirect
is not followed, so that neither key nor texts go to a host that nobody named; proxies of the environment are
not used. What fails for a reason that may pass is asked again, later each time. The key is in no message, and
it is taken out of whatever comes back.
"""

import http.client
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from preftune.errors import ConfigError, InputMissing
from preftune.untrusted import REDACTED, printable

FIRST_WAIT, LONGEST_WAIT = 1.0, 120.0  # seconds before a question is asked again
MAX_BODY = 1 << 20
_PASSES = frozenset({408, 409, 425, 429})  # and all from 500 on
_REFUSED = frozenset({400, 413, 422})  # this question: too long for the model, or against a rule of the host
_QUOTE = 200
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model said, or why the server would not have it asked."""

    text: str = ""
    model: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    refused: str = ""
    cut: bool = False  # at max_tokens


class FailedError(Exception):
    """For a reason that may pass; `wait` is how long the server wants to be left alone."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class RefusedError(ConfigError):
    """The server will not have this one request."""

    def __init__(self, why: str, message: str) -> None:
        super().__init__(message)
        self.why = why


class StoppedError(Exception):
    """The endpoint was stopped while a question waited."""


@dataclass(kw_only=True)
class Endpoint:
    """One endpoint, asked from several threads.

    Words for its messages: `who` it is, the `table` of its settings, what the same command finds `again`, and
    the hint for an answer that says the address or the model's name is wrong (`wrong_place`).
    """

    url: str
    key: str = field(default="", repr=False)
    key_variable: str = ""
    timeout: float = 60.0
    retries: int = 5
    max_body: int = MAX_BODY
    who: str = "the LLM judge"
    table: str = "llm"
    again: str = "what it has answered is kept"
    wrong_place: str = (
        "llm.url ends where /chat/completions begins, often in /v1; the judge is llm:MODEL, by the "
        "name that the server knows"
    )
    _ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _open: set[socket.socket] = field(default_factory=set)

    def ask(self, request: Mapping[str, Any]) -> Answer:
        """One answer, or why the server will not have the question. Errors as in `call`."""
        try:
            return self.call("POST", "/chat/completions", request, self._answer)
        except RefusedError as refused:
            return Answer(refused=refused.why)

    def call(
        self, method: str, path: str, request: Mapping[str, Any] | None, read: Callable[[bytes], T]
    ) -> T:
        """What `read` makes of the answer to a request; a FailedError of its own has it asked again.

        InputMissing where there is no answer after all tries, ConfigError where trying again is of no use
        (RefusedError: this request), StoppedError after `stop`.
        """
        body = None if request is None else json.dumps(request, ensure_ascii=True).encode("ascii")
        for tried in range(self.retries + 1):
            try:
                return read(self._body(path, *self._once(method, path, body)))
            except FailedError as failure:
                if self._ended.is_set():
                    raise StoppedError from None
                wait = max(min(FIRST_WAIT * 2**tried, LONGEST_WAIT), failure.wait or 0.0)
                if tried == self.retries or wait > LONGEST_WAIT:
                    raise self._given_up(failure, tried + 1, wait) from None
            if self._ended.wait(wait):
                raise StoppedError
        raise AssertionError("the last try returns or raises")

    def stop(self) -> None:
        """End every question that is under way."""
        self._ended.set()
        with self._lock:
            for connection in self._open:
                _disconnect(connection)

    def _given_up(self, failure: FailedError, times: int, wait: float) -> InputMissing:
        why = f", and asks to wait {wait:.0f} s" if wait > LONGEST_WAIT else ""
        return InputMissing(
            f"{self.who} at {self.url}: {failure}{why} (asked {times} time{'s' * (times > 1)})",
            f"see to it that it runs, then run the same command again: {self.again}",
        )

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, Message, bytes]:
        connection = self._connection()
        late = threading.Event()
        try:
            connection.connect()
            with self._limited(connection.sock, late):
                full_path = urlsplit(self.url).path.rstrip("/") + path
                key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
                headers = {"Content-Type": "application/json", "Accept": "application/json", **key}
                connection.request(method, full_path, body, headers)
                response = connection.getresponse()
                content = response.read(self.max_body + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            gone = late.is_set() or isinstance(error, TimeoutError)
            problem = f"no whole answer within {self.timeout:g} s" if gone else self._in_words(error)
            raise FailedError(problem) from None
        finally:
            connection.close()
        if late.is_set():
            raise FailedError(f"no whole answer within {self.timeout:g} s")
        return response.status, response.headers, content

    def _connection(self) -> http.client.HTTPConnection:
        address = urlsplit(self.url)
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        return kind(address.hostname or "", address.port, timeout=self.timeout)

    @contextmanager
    def _limited(self, connection: socket.socket, late: threading.Event) -> Iterator[None]:
        """The connection is cut when the time is over, however slowly bytes come, or on `stop`."""

        def end() -> None:
            late.set()
            _disconnect(connection)

        timer = threading.Timer(self.timeout, end)
        timer.daemon = True
        with self._lock:
            self._open.add(connection)
            if self._ended.is_set():
                _disconnect(connection)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            with self._lock:
                self._open.discard(connection)

    def _body(self, path: str, status: int, headers: Message, content: bytes) -> bytes:
        """The body of a response. FailedError where the next one may be better, ConfigError where not."""
        if status in _PASSES or status >= 500:
            raise FailedError(f"it says {status}{self._error_words(content)}", _wait(headers))
        if 300 <= status < 400:
            host = urlsplit(headers.get("Location", "")).netloc or "another place"
            raise ConfigError(
                f"{self.who} at {self.url} sends one on to {self.quote(host)}; that is not followed",
                f"give the address that answers itself as {self.table}.url",
            )
        if status in (401, 403):
            sent = f"the key in ${self.key_variable}" if self.key else "a question without a key"
            raise ConfigError(
                f"{self.who} at {self.url} refuses {sent} ({status}){self._error_words(content)}",
                f"{self.table}.key_variable names the environment variable that holds its key",
            )
        if status in _REFUSED:
            why = f"{status}{self._error_words(content)}"
            raise RefusedError(why, f"{self.who} at {self.url} refuses {path}: {why}")
        if status != 200:
            complaint = f"{self.who} at {self.url} says {status}{self._error_words(content)}"
            raise ConfigError(complaint, self.wrong_place)
        if len(content) > self.max_body:
            raise FailedError(f"its answer has more than {self.max_body:,} bytes")
        return content

    def _answer(self, content: bytes) -> Answer:
        try:
            reply = json.loads(content)
            choice = reply["choices"][0]
            message, ended = choice["message"], choice.get("finish_reason")
            text, model, usage = message.get("content"), reply.get("model"), reply.get("usage")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            raise FailedError(f"its answer is no chat completion: {self.quote(content)!r}") from None
        counts = usage if isinstance(usage, dict) else {}
        return Answer(
            text=self._hidden(text) if isinstance(text, str) else "",
            model=self.quote(model) if isinstance(model, str) else "",
            tokens_in=_count(counts.get("prompt_tokens")),
            tokens_out=_count(counts.get("completion_tokens")),
            cut=ended == "length",
        )

    def _error_words(self, content: bytes) -> str:
        """What the server says of an error, in short."""
        try:
            error: Any = json.loads(content)["error"]
            error = error["message"] if isinstance(error, dict) else error
        except (ValueError, RecursionError, LookupError, TypeError):
            error = content
        text = self.quote(error)
        return f": {text}" if text else ""

    def _in_words(self, error: Exception) -> str:
        return self.quote(str(error) or type(error).__name__)

    def quote(self, text: object) -> str:
        """A quotation of a line."""
        plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        return printable(" ".join(self._hidden(plain).split()))[:_QUOTE]

    def _hidden(self, text: str) -> str:
        return text.replace(self.key, REDACTED) if self.key else text


def _disconnect(connection: socket.socket) -> None:
    """Whoever reads from it reads its end. Below TLS, which would wait for the other side's farewell."""
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 1 << 40 else 0


def _wait(headers: Message) -> float | None:
    """Retry-After in seconds: a number, or a date, by the clock that the server sends along."""
    value = headers.get("Retry-After", "")
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        return float(value)
    try:
        until, now = parsedate_to_datetime(value), parsedate_to_datetime(headers.get("Date", ""))
        return max((until - now).total_seconds(), 0.0)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None

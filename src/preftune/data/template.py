"""Chat templates are programs that come with a model: a child process runs them, bounded in time and memory.

The library's sandbox keeps them from files and attributes, but not from `'x' * 10**9` or a loop without end,
and no list of forbidden operations would be complete: Jinja has a dozen ways to make a long text out of a
short one. The system's own limits need none. The child is a fork, so it renders exactly what the library
would here; it is started with the first prompt and lives as long as its `Template`. Where the system has no
fork (Windows), this process fills templates in itself, and only the length of the text is bounded.
"""

import json
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from datetime import datetime, tzinfo
from typing import TYPE_CHECKING, Any, BinaryIO

from transformers.utils import chat_template_utils

from preftune.data.hh import RejectedRow
from preftune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 4  # for one prompt; real templates take less than a millisecond
MEMORY = 200 << 20  # bytes that rendering may add to what the process has
ROOM, RATIO = 64 << 10, 64  # longest text: this many characters, and this many for each one of the messages

_FORKS = hasattr(os, "fork")
DAY = datetime(2024, 7, 26)  # that of Llama 3's template where it is told none

Messages = Sequence[Mapping[str, str]]


class Refused(RejectedRow):
    """The template's own error about one conversation, such as Gemma's about a system message."""

    def __init__(self, why: str) -> None:
        super().__init__("refused_by_template")
        self.message = f"the tokenizer's chat template fails on a prompt: {why}"
        self.hint = "use data.form=transcript, or another model"


class _Day(datetime):
    """What a template takes for the present."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:
        return DAY


class Template:
    """The chat template of a tokenizer, filled in by a child process. May be called from several threads.

    `arguments` are the template's own (`enable_thinking`). `strftime_now` gives DAY, whatever day it is, so
    that tomorrow's ids are today's.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", arguments: Mapping[str, Any] = {}) -> None:
        self._tokenizer, self._arguments = tokenizer, dict(arguments)
        self._lock = threading.Lock()
        self._pipes: tuple[BinaryIO, BinaryIO] | None = None

    def fill(self, messages: Messages, opened: bool = True) -> str:
        """The messages as text, with the reply opened if `opened`. RejectedRow if the template refuses them
        or makes too much text, DataError if it passes a bound.
        """
        with self._lock:
            answer = self._bounded(messages, opened) if _FORKS else self._fill_here(messages, opened)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["text"]

    def _bounded(self, messages: Messages, opened: bool) -> dict[str, str]:
        if self._pipes is None:
            self._pipes = self._start()
        answer = None
        try:
            answer = _ask(self._pipes, messages, opened)
        finally:
            if answer is None:  # gone, or interrupted: its answer would be taken for that of the next request
                self._pipes = None
                self._end()
        if answer is None:
            raise DataError(
                f"the tokenizer's chat template takes over {SECONDS} s or {MEMORY >> 20} MiB",
                "use data.form=transcript, or another model",
            )
        return answer

    def _fill_here(self, messages: Messages, opened: bool) -> dict[str, str]:
        today = chat_template_utils.datetime  # type: ignore[attr-defined]
        chat_template_utils.datetime = _Day  # type: ignore[attr-defined]
        try:
            return _fill(self._tokenizer, self._arguments, messages, opened)
        finally:
            chat_template_utils.datetime = today  # type: ignore[attr-defined]

    def _start(self) -> tuple[BinaryIO, BinaryIO]:
        """Fork the child; it ends when this object goes, or this process."""
        child_reads, we_write = os.pipe()
        we_read, child_writes = os.pipe()
        with warnings.catch_warnings():
            # Python warns of threads that hold locks in a fork. The child runs Python code of its own only,
            # and should it hang all the same, its alarm ends it.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                _serve(self._tokenizer, self._arguments, child_reads, child_writes)
            finally:
                os._exit(0)
        os.close(child_reads)
        os.close(child_writes)
        pipes = os.fdopen(we_write, "wb"), os.fdopen(we_read, "rb")
        self._end = weakref.finalize(self, _stop, child, pipes, os.getpid())
        return pipes


def _ask(pipes: tuple[BinaryIO, BinaryIO], messages: Messages, opened: bool) -> dict[str, str] | None:
    """The child's answer; None if it is no more."""
    try:
        pipes[0].write(json.dumps([messages, opened]).encode() + b"\n")
        pipes[0].flush()
        line = pipes[1].readline()
        return json.loads(line) if line.endswith(b"\n") else None
    except BrokenPipeError:
        return None


def _stop(child: int, pipes: tuple[BinaryIO, BinaryIO], owner: int) -> None:
    """Without its pipe the child leaves by itself."""
    if os.getpid() != owner:  # in a child that was forked meanwhile
        return
    for pipe in pipes:
        try:
            pipe.close()
        except BrokenPipeError:
            continue
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _serve(tokenizer: "PreTrainedTokenizerBase", arguments: dict[str, Any], reads: int, writes: int) -> None:
    """The child: one line of JSON in, one out. The alarm's default action ends it wherever it is."""
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end is seen at the pipe
    signal.alarm(SECONDS)
    # Nothing of the parent's may be held open: its lock on the run directory least of all.
    low, high = sorted((reads, writes))
    os.closerange(0, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, 1 << 20)
    _limit_memory()
    chat_template_utils.datetime = _Day  # type: ignore[attr-defined]  # of this process alone
    with os.fdopen(reads, "rb") as requests, os.fdopen(writes, "wb") as answers:
        signal.alarm(0)
        for request in requests:
            signal.alarm(SECONDS)
            answer = json.dumps(_fill(tokenizer, arguments, *json.loads(request))).encode()
            signal.alarm(0)
            answers.write(answer + b"\n")
            answers.flush()


def _fill(
    tokenizer: "PreTrainedTokenizerBase", arguments: dict[str, Any], messages: Messages, opened: bool
) -> dict[str, str]:
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=opened, **arguments
        )
    except Exception as error:  # the template's own errors, those of its sandbox, and of memory
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    if not isinstance(text, str) or len(text) > ROOM + RATIO * sum(len(m["content"]) for m in messages):
        return {"error": "it makes too much text"}
    return {"text": text}


def _limit_memory() -> None:
    """Address space as it is now and `MEMORY` more, where the system says what it is now (Linux)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
    except OSError:
        return
    import resource  # not on Windows

    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))

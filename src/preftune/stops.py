"""Being asked to stop: SIGTERM, SIGHUP (the terminal is gone), SIGUSR1 (Slurm's warning) and Ctrl-C, and
where that takes effect.

Outside the training loop a signal ends the command at once: everything on disk is whole at any time. Inside
(`deferred`) it is only noted; the next stopping point abandons the step that is being computed, and the loop
saves the state in which that step began.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from preftune.faults import KILL, faultpoint

PATIENCE = 60.0  # seconds that a child process has to stop
_NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT")
SIGNALS = tuple(signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__)


class Interrupted(BaseException):
    """The run was asked to stop. Not an Exception, so that nothing on the way takes it for a failure."""

    def __init__(self, number: int, where: str = "") -> None:
        self.number = number
        self.message = f"stopped by {signal.Signals(number).name}{where}; the same command resumes"
        super().__init__(self.message)

    @property
    def code(self) -> int:
        """130 for Ctrl-C, 143 otherwise."""
        return 130 if self.number == signal.SIGINT else 143


@dataclass(slots=True)
class _State:
    number: int = 0  # of the signal that came, 0 while none did
    deferred: bool = False
    anywhere: bool = False  # whether any stopping point may raise
    held_back: bool = False  # whether nobody is to see the signal now


_state = _State()


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Turn the signals into `Interrupted`, but for those that this process was started to ignore (nohup).
    Does nothing outside the main thread, where Python allows none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _noted) for number in caught}
    try:
        yield
    finally:
        _state.number = 0
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Stop when the process that holds the other end of standard input is gone, however it ended: as after
    SIGTERM, and by SIGKILL if that takes too long.
    """

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os.kill(os.getpid(), KILL)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def deferred(anywhere: bool) -> Iterator[None]:
    """Only note signals. `anywhere`: every stopping point may raise; otherwise the caller asks `requested`,
    as it must where several processes have to stop at the same place.
    """
    _state.deferred, _state.anywhere = True, anywhere
    try:
        yield
    finally:
        _state.deferred = _state.anywhere = False
    if _state.number:  # it came between the last look and here
        raise Interrupted(_state.number)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within `with`, a signal that came is not seen: for work that is short and cannot be repeated."""
    _state.held_back = True
    try:
        yield
    finally:
        _state.held_back = False


def requested() -> int:
    """The number of the signal that came, or 0."""
    return 0 if _state.held_back else _state.number


def stopping_point(name: str) -> None:
    """A place between two pieces of work, and a fault point."""
    faultpoint(name)
    if _state.anywhere and (number := requested()):
        raise Interrupted(number)


def _noted(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and _state.number:
        raise KeyboardInterrupt  # the second Ctrl-C waits for nothing
    _state.number = _state.number or number
    if not _state.deferred:
        raise Interrupted(number)
    if number == signal.SIGINT:
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(2, b"\nsaving, then stopping; Ctrl-C again stops without saving\n")

"""Named places at which tests make a run fail. Next to no cost when off.

    PREFTUNE_FAULT="rollout.token@step=2,hit=5:kill"      die when step 2 comes there for the fifth time
    PREFTUNE_FAULT="checkpoint.rename:enospc;loss@step=3:nan"

Actions: `kill` (SIGKILL to this process), `term` and `int` (signals that ask it to stop), `enospc` (the disk
is full), `oom` (an accelerator's memory is), `nan` (the value that passes through becomes NaN), `tear` (the
file that was just written loses its second half, then `kill`), `sleep=SECONDS`, and `hold=SECONDS`, which
ends before that when a signal comes (SIGUSR2 does nothing else). Both report on standard error that they have
begun, for a test that waits for that moment. A fault without `step=`
strikes at any step; every fault strikes once, but `enospc` and `nan` strike as often as they match.
"""

import errno
import os
import re
import select
import signal
import time
from dataclasses import dataclass, field
from typing import Any, TypeVar

VARIABLE = "PREFTUNE_FAULT"
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # on Windows any signal ends a process at once
_GRAMMAR = re.compile(r"(?P<name>[\w.]+)(?:@(?P<where>[\w=,]+))?:(?P<action>[a-z]+)(?:=(?P<seconds>[\d.]+))?")
_ACTIONS = ("kill", "term", "int", "enospc", "oom", "nan", "tear", "sleep", "hold")

Value = TypeVar("Value", bound=Any)


@dataclass(slots=True)
class _Fault:
    """One thing to go wrong: at `name`, in step `step` (0: any), at the `hit`-th time."""

    name: str
    action: str
    step: int = 0
    hit: int = 1
    seconds: float = 0.0
    hits: int = 0

    def matches(self, name: str, step: int) -> bool:
        if name != self.name or self.step not in (0, step):
            return False
        self.hits += 1
        return self.hits == self.hit or (self.hits > self.hit and self.action in ("enospc", "nan"))


@dataclass(slots=True)
class _State:
    armed: list[_Fault] = field(default_factory=list)
    step: int = 0


_state = _State()


def arm(text: str | None = None) -> None:
    """Read faults from `text`, or from the environment. ValueError for what is no fault."""
    text = os.environ.get(VARIABLE, "") if text is None else text
    _state.armed = [_parse(fault) for fault in text.split(";") if fault.strip()]


def _parse(text: str) -> _Fault:
    match = _GRAMMAR.fullmatch(text.strip())
    if match is None or match["action"] not in _ACTIONS:
        raise ValueError(f"{VARIABLE}: {text!r} is not NAME[@step=N][,hit=N]:ACTION")
    conditions = dict(pair.split("=") for pair in match["where"].split(",")) if match["where"] else {}
    if not conditions.keys() <= {"step", "hit"}:
        raise ValueError(f"{VARIABLE}: {text!r} has something other than step= and hit=")
    numbers = {key: int(value) for key, value in conditions.items()}
    return _Fault(match["name"], match["action"], seconds=float(match["seconds"] or 0), **numbers)


def begin_step(step: int) -> None:
    """Tell where training is, counted from 1."""
    _state.step = step


def faultpoint(name: str, value: Value = None) -> Value:
    """A place where a test may strike; gives the value back, spoilt if it asks for that."""
    for fault in _state.armed:
        if fault.matches(name, _state.step):
            return _strike(fault, value)
    return value


def _strike(fault: _Fault, value: Value) -> Value:
    match fault.action:
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), fault.name)
        case "oom":
            import torch  # by whoever trains, it is loaded already

            raise torch.OutOfMemoryError(f"{fault.name}: no memory left")
        case "nan":
            return value * float("nan")
        case "sleep":
            _say_begun(fault)
            time.sleep(fault.seconds)
        case "hold":
            _hold(fault)
        case "term" | "int":
            os.kill(os.getpid(), signal.SIGTERM if fault.action == "term" else signal.SIGINT)
        case "tear":
            os.truncate(value, os.path.getsize(value) // 2)
            os.kill(os.getpid(), KILL)
        case _:
            os.kill(os.getpid(), KILL)
    return value


def _say_begun(fault: _Fault) -> None:
    os.write(2, f"fault {fault.name}: {fault.action}\n".encode())


def _hold(fault: _Fault) -> None:
    """Wait for a signal. The handler is set before the wait is reported, so none can come too early."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before, theirs = signal.set_wakeup_fd(writer), signal.signal(signal.SIGUSR2, lambda number, frame: None)
    try:
        _say_begun(fault)
        select.select([reader], [], [], fault.seconds)
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGUSR2, theirs)
        os.close(reader)
        os.close(writer)

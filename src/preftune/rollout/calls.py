"""Reward functions: any Python `(prompt, response, **columns) -> float`, named in the settings.

A function is called once a response. It gets the prompt's transcript (ending in "Assistant:") and the
response without its end token, and by keyword those of these columns that it takes (all of them if it takes
`**columns`): `ended` (with an end token?); `source`, `row`, `chosen`, `rejected` of the data row that the
prompt comes from (the first of them, where several rows share the prompt), and what other columns that row
has (`answer`). One with a parameter `completions` is called as TRL calls it, once for many responses:
`(prompts, completions, **columns) -> list`, each column a list. Either may be `async def`, and may give None
for a response to which it does not apply.
"""

import asyncio
import inspect
import math
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preftune.config.rewards import find_function, reward_terms
from preftune.errors import DataError
from preftune.isolated import isolated, passes

COLUMNS = ("ended", "source", "row", "chosen", "rejected")
LARGEST = torch.finfo(torch.float32).max
_ALL = "**"  # a function that takes every column
_GIVEN = ("prompt", "response", "prompts", "completions", "completion_ids", "trainer_state")

Given = float | DataError | None  # a reward, what went wrong, or "does not apply"


@dataclass(frozen=True, slots=True)
class Case:
    """One response with what is known of its row."""

    prompt: str
    response: str
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A function with its name, its weight in the score, and the columns that it takes."""

    name: str
    weight: float
    call: Callable[..., Any]
    takes: tuple[str, ...]
    seconds: float  # that a call may take
    batched: bool = False

    def values(self, cases: Sequence[Case], stop: bool) -> list[Given]:
        """The unweighted reward of each case; with `stop` the first failure is raised. What the calls do to
        the process is put back.
        """
        if not cases:  # a process may have no rows
            return []
        with isolated():
            return self._batch(cases, stop) if self.batched else self._each(cases, stop)

    def _each(self, cases: Sequence[Case], stop: bool) -> list[Given]:
        found: list[Given] = []
        for case in cases:
            value = self._called(case, partial(self.call, case.prompt, case.response, **self._of(case)))
            found.append(value if isinstance(value, DataError) else self._number(case, value))
            if stop and isinstance(found[-1], DataError):
                raise found[-1]
        return found

    def error(self, case: Case, what: str) -> DataError:
        """A failure that names the function and the row."""
        columns = case.columns
        where = f"row {columns['row']}" + (f" of {columns['source']}" if columns["source"] else "")
        return DataError(
            f"reward function {self.name}, {where}: it {what}; the response was {case.response[:80]!r}",
            hint="mend the function, or set on_reward_error=mask in its stage to leave such responses out",
        )

    def _batch(self, cases: Sequence[Case], stop: bool) -> list[Given]:
        """All cases in one call. What it raises, or a list of another length, fails every one."""
        columns = {name: [case.columns.get(name) for case in cases] for name in self._names(cases)}
        prompts, completions = [case.prompt for case in cases], [case.response for case in cases]
        call = partial(self.call, prompts=prompts, completions=completions, **columns)
        given = self._called(cases[0], call, len(cases))
        if isinstance(given, Tensor | np.ndarray):
            given = given.tolist()
        found: list[Given]
        if isinstance(given, list | tuple) and len(given) == len(cases):
            found: list[Given] = list(map(self._number, cases, given))
        else:
            what = f"returned {_what(given)}, not a list of {len(cases)} rewards"
            found = [given if isinstance(given, DataError) else self.error(cases[0], what)] * len(cases)
        failed = next((value for value in found if isinstance(value, DataError)), None)
        if stop and failed is not None:
            raise failed
        return found

    def _names(self, cases: Sequence[Case]) -> list[str]:
        known = dict.fromkeys(name for case in cases for name in case.columns if name not in _GIVEN)
        return [name for name in known if name in self.takes or _ALL in self.takes]

    def _of(self, case: Case) -> dict[str, Any]:
        return {name: case.columns[name] for name in self._names([case])}

    def _called(self, case: Case, call: Callable[[], Any], times: int = 1) -> Any:
        """What a call gives, or a DataError."""
        seconds = self.seconds * times
        try:
            with _limited(seconds):
                value = call()
                return _awaited(value) if inspect.isawaitable(value) else value
        except _Late:
            return self.error(case, f"took more than {seconds:g} s (reward_timeout)")
        except BaseException as error:  # user code: anything may come out of it, exit() included
            if passes(error):
                raise
            failure = self.error(case, f"raised {type(error).__name__}: {str(error)[:200]}")
            failure.__cause__ = error
            return failure

    def _number(self, case: Case, value: Any) -> Given:
        if value is None:
            return None
        if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
            value = value.item()
        if not isinstance(value, Real):
            return self.error(case, f"returned {_what(value)}, not one number")
        try:
            number = float(value)
        except (OverflowError, ValueError) as error:
            return self.error(case, f"returned a number that is none: {error}")
        if not math.isfinite(number):
            return self.error(case, f"returned {number}")
        if abs(number) > LARGEST:
            return self.error(case, f"returned {number:g}, beyond float32")
        return number


class _Late(BaseException):
    """A call's time is over. Not an Exception, so that the function does not take it for one of its own."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """_Late in what runs here for longer, and after it if it caught that. Only in the main thread, where
    Python allows signals, and on systems that have them; code that never comes back to the interpreter is not
    interrupted.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or "SIGALRM" not in signal.Signals.__members__
    ):
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise _Late

    before, until = signal.signal(signal.SIGALRM, late), time.monotonic() + seconds
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
        if time.monotonic() > until:  # it caught the signal, or turned it off
            raise _Late
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _awaited(value: Awaitable[Any]) -> Any:
    """The result of an `async def`, also where this thread has a loop of its own, as in a notebook."""

    async def wait() -> Any:
        return await value

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as other:
        return other.submit(asyncio.run, wait()).result()


def _what(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)}"
    return f"a {kind} of length {len(value)}" if isinstance(value, list | tuple | str | dict) else f"a {kind}"


def load_functions(terms: str, seconds: float = 300.0) -> tuple[RewardFunction, ...]:
    """The functions of a setting such as "0.5 * module:function + other:function", each of whose calls may
    take `seconds` a response.
    """
    found = []
    for name, weight in reward_terms(terms).items():
        call = find_function(name)
        takes = columns_of(call)
        found.append(RewardFunction(name, weight, call, takes, seconds, "completions" in takes))
    return tuple(found)


def data_columns(terms: str) -> list[str]:
    """The columns of the data, beyond text and place, that functions of a setting may read; "**" for all."""
    taken = {name for term in reward_terms(terms) for name in columns_of(find_function(term))}
    return sorted(taken - {*COLUMNS, *_GIVEN})


def columns_of(call: Callable[..., Any]) -> tuple[str, ...]:
    """The names that a function takes besides prompt and response; "**" where it takes all."""
    try:
        parameters = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):  # some functions written in C have no signature
        return ()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = names if "completions" in names else names[2:] if len(names) >= 2 else names
    return (*names, *([_ALL] if any(p.kind is p.VAR_KEYWORD for p in parameters) else []))

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

from preftune.config.rewards import (
    ALL_COLUMNS,
    NO_COLUMNS,
    OF_EVERY_ROW,
    columns_of,
    find_function,
    reward_terms,
)
from preftune.errors import BackendMissing, DataError, InputMissing
from preftune.isolated import isolated, passes

LARGEST = torch.finfo(torch.float32).max

Outcome = float | DataError | None  # a reward, what went wrong, or "does not apply"


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

    def values(self, cases: Sequence[Case], stop: bool) -> list[Outcome]:
        """The unweighted reward of each case; with `stop` the first failure is raised. What the calls change
        in the process is restored.
        """
        if not cases:  # a process may have no rows
            return []
        rewards: list[Outcome] = []
        with isolated():
            for reward in self._batch(cases) if "completions" in self.takes else self._one_by_one(cases):
                if stop and isinstance(reward, DataError):
                    raise reward
                rewards.append(reward)
        return rewards

    def _one_by_one(self, cases: Sequence[Case]) -> Iterator[Outcome]:
        """Each is called when it comes to it: none after the first failure, if that is raised."""
        for case in cases:
            columns = {name: case.columns[name] for name in self._names([case])}
            value = self._call(case, partial(self.call, case.prompt, case.response, **columns))
            yield value if isinstance(value, DataError) else self._number(case, value)

    def error(self, case: Case, problem: str) -> DataError:
        """A failure that names the function and the row."""
        columns = case.columns
        where = f"row {columns['row']}" + (f" of {columns['source']}" if columns["source"] else "")
        return DataError(
            f"reward function {self.name}, {where}: it {problem}; the response was {case.response[:80]!r}",
            hint="mend the function; a stage that has on_reward_error leaves such responses out with "
            "on_reward_error=mask",
        )

    def _batch(self, cases: Sequence[Case]) -> list[Outcome]:
        """All cases in one call. If it raises, or returns a list of another length, all have failed."""
        columns = {name: [case.columns.get(name) for case in cases] for name in self._names(cases)}
        prompts, completions = [case.prompt for case in cases], [case.response for case in cases]
        call = partial(self.call, prompts=prompts, completions=completions, **columns)
        returned = self._call(cases[0], call, len(cases))
        if isinstance(returned, Tensor | np.ndarray):
            returned = returned.tolist()
        if isinstance(returned, list | tuple) and len(returned) == len(cases):
            return list(map(self._number, cases, returned))
        problem = f"returned {_described(returned)}, not a list of {len(cases)} rewards"
        error = returned if isinstance(returned, DataError) else self.error(cases[0], problem)
        return [error] * len(cases)

    def _names(self, cases: Sequence[Case]) -> list[str]:
        names = dict.fromkeys(name for case in cases for name in case.columns if name not in NO_COLUMNS)
        return [name for name in names if name in self.takes or ALL_COLUMNS in self.takes]

    def _call(self, case: Case, call: Callable[[], Any], times: int = 1) -> Any:
        """What a call gives, or a DataError."""
        seconds = self.seconds * times
        try:
            with _limited(seconds):
                value = call()
                return _awaited(value) if inspect.isawaitable(value) else value
        except _Late:
            return self.error(case, f"took more than {seconds:g} s (reward_timeout)")
        except BaseException as error:  # user code: anything may come out of it, exit() included
            if passes(error) or isinstance(error, InputMissing | BackendMissing):  # not the row's fault
                raise
            failure = self.error(case, f"raised {type(error).__name__}: {str(error)[:200]}")
            failure.__cause__ = error
            return failure

    def _number(self, case: Case, value: Any) -> Outcome:
        if value is None:
            return None
        if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
            value = value.item()
        if not isinstance(value, Real):
            return self.error(case, f"returned {_described(value)}, not one number")
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
    """Raises _Late in a body that takes longer, and after it if the body caught that. Only in the main
    thread, where Python allows signals, and on systems that have them; code that never returns to the
    interpreter is not interrupted.
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
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, wait()).result()


def _described(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)}"
    return f"a {kind} of length {len(value)}" if isinstance(value, list | tuple | str | dict) else f"a {kind}"


def load_functions(terms: str, seconds: float = 300.0) -> tuple[RewardFunction, ...]:
    """The functions of a setting such as "0.5 * module:function + other:function", each of whose calls may
    take `seconds` a response.
    """
    functions = []
    for name, weight in reward_terms(terms).items():
        call = find_function(name)
        functions.append(RewardFunction(name, weight, call, columns_of(call), seconds))
    return tuple(functions)


def data_columns(terms: str) -> list[str]:
    """The columns of the data, beyond text and place, that functions of a setting may read; "**" for all."""
    names = {name for term in reward_terms(terms) for name in columns_of(find_function(term))}
    return sorted(names - {*OF_EVERY_ROW, *NO_COLUMNS})

"""Reward functions: any Python `(prompt, response, **columns) -> float`, named in the settings.

A function is called once a response. It gets the prompt's transcript (ending in "Assistant:") and the
response without its end token, and by keyword those of these columns that it takes (all of them if it takes
`**columns`): `ended` whether EOS was written; `source`, `row`, `chosen`, `rejected` of the data row that the
prompt comes from (the first of them, where several rows share the prompt).

A failure never becomes a reward: it stops the run, or masks the response, and is counted. To take longer than
the time limit is a failure too.
"""

import inspect
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from preftune.config.rewards import find_function, reward_terms
from preftune.data import Encoder, Preference, Sequences
from preftune.errors import DataError
from preftune.rollout.sample import ended

COLUMNS = ("ended", "source", "row", "chosen", "rejected")
MAX_MASKED = 0.2  # of the responses of one call; more is no accident
OnError = Literal["stop", "mask"]


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A function with its name, its weight in the score, and the columns that it takes."""

    name: str
    weight: float
    call: Callable[..., Any]
    takes: tuple[str, ...]
    seconds: float  # that a call may take

    def value(self, prompt: str, response: str, columns: Mapping[str, Any]) -> float:
        """The unweighted reward. DataError, naming the function and the row, for anything but one finite
        number.
        """
        where = f"row {columns['row']}" + (f" of {columns['source']}" if columns["source"] else "")
        try:
            with _limited(self.seconds):
                value = self.call(prompt, response, **{name: columns[name] for name in self.takes})
        except _Late as error:
            what = f"took more than {self.seconds:g} s (reward_timeout)"
            raise self._error(where, what, response) from error
        except Exception as error:  # user code: anything may come out of it
            what = f"raised {type(error).__name__}: {str(error)[:200]}"
            raise self._error(where, what, response) from error
        if isinstance(value, Tensor) and value.dim() == 0:
            value = value.item()
        if not isinstance(value, Real):
            raise self._error(where, f"returned {_what(value)}, not one number", response)
        number = float(value)
        if not math.isfinite(number):
            raise self._error(where, f"returned {number}", response)
        return number

    def _error(self, where: str, what: str, response: str) -> DataError:
        return DataError(
            f"reward function {self.name}, {where}: it {what}; the response was {response[:80]!r}",
            hint="mend the function, or set on_reward_error=mask in its stage to leave such responses out",
        )


class _Late(BaseException):
    """A call's time is over. Not an Exception, so that the function does not take it for one of its own."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """_Late in what runs here for longer. Only in the main thread, where Python allows signals, and on
    systems that have them; code that never comes back to the interpreter is not interrupted.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or "SIGALRM" not in signal.Signals.__members__
    ):
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _what(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)}"
    return f"a {kind} of length {len(value)}" if isinstance(value, list | tuple | str | dict) else f"a {kind}"


def load_functions(terms: str, seconds: float = 300.0) -> tuple[RewardFunction, ...]:
    """The functions of a setting such as "0.5 * module:function + other:function", each of whose calls may
    take `seconds`.
    """
    functions = []
    for name, weight in reward_terms(terms).items():
        call = find_function(name)
        functions.append(RewardFunction(name, weight, call, _columns_of(call), seconds))
    return tuple(functions)


def _columns_of(call: Callable[..., Any]) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have no signature
        return ()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return COLUMNS
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return tuple(name for name in COLUMNS if name in by_name)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunctions:
    """The weighted sum of functions on token rows. `rows` are those that prompts come from."""

    functions: tuple[RewardFunction, ...]
    encoder: Encoder
    rows: Sequence[Preference]
    on_error: OnError = "stop"

    def scores(self, sequences: Sequences, rows: Sequence[int] = ()) -> Tensor:
        """Σ weight · reward, (B,) float32 on the device of `sequences`; NaN where a failure is masked.

        `rows`: which of the data rows each sequence's prompt is of; none for prompts from elsewhere.

        DataError if a function fails and `on_error` is "stop", or if more than a fifth of the rows fail.
        """
        closed = ended(sequences, self.encoder.eos_id).tolist()
        ids, real, written = (x.cpu() for x in (sequences.ids, sequences.attention, sequences.response))
        values, failures = [], list[DataError]()
        for i in range(len(sequences)):
            row = self.rows[rows[i]] if rows else None
            prompt_ids, response_ids = ids[i][real[i] & ~written[i]].tolist(), ids[i][written[i]].tolist()
            try:
                values.append(self._score(row, prompt_ids, response_ids, closed[i]))
            except DataError as error:
                if self.on_error == "stop":
                    raise
                failures.append(error)
                values.append(math.nan)
        if len(failures) > MAX_MASKED * len(values):
            raise DataError(
                f"{len(failures)} of {len(values)} responses got no reward, more than {MAX_MASKED:.0%}; "
                f"the first: {failures[0].message}",
                hint=failures[0].hint,
            )
        return torch.tensor(values, dtype=torch.float32, device=sequences.ids.device)

    def _score(
        self, row: Preference | None, prompt_ids: list[int], response_ids: list[int], closed: bool
    ) -> float:
        response = self.encoder.decode(response_ids)
        prompt = row.prompt.transcript() if row else self.encoder.decode(prompt_ids)
        columns = {
            "ended": closed,
            "source": row.source if row else "",
            "row": row.row if row else None,
            "chosen": row.chosen if row else None,
            "rejected": row.rejected if row else None,
        }
        return sum(f.weight * f.value(prompt, response, columns) for f in self.functions)


def masked(scores: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scores with 0 in place of NaN, and which rows have a score: None if all have."""
    valid = ~scores.isnan()
    return torch.where(valid, scores, torch.zeros_like(scores)), None if bool(valid.all()) else valid

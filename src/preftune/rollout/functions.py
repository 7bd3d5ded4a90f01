"""The reward of sampled responses under the functions of a setting: their weighted sum, or what failed.

A failure never becomes a reward: it stops the run, or masks the response and is counted. A call over the time
limit has failed, too. How a function is called is in `calls`.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from preftune.data import Encoder, Preference, Sequences
from preftune.errors import DataError
from preftune.rollout.calls import LARGEST, Case, Outcome, RewardFunction, load_functions
from preftune.rollout.sample import as_lists

MAX_MASKED = 0.2  # of the responses of one call, over all processes; more is no accident
OnError = Literal["stop", "mask"]
__all__ = ["OnError", "RewardFunction", "RewardFunctions", "Rewards", "load_functions", "masked"]


class Rewards(NamedTuple):
    """Of B responses: Σ weight · reward, (B,); what each function gives, unweighted, (B,) by its short name,
    NaN where it failed or does not apply.
    """

    total: Tensor
    by_function: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunctions:
    """The weighted sum of functions on token rows. `rows` are those that prompts come from. What is `watched`
    is called, too, and enters no sum.
    """

    functions: tuple[RewardFunction, ...]
    encoder: Encoder
    rows: Sequence[Preference]
    watched: tuple[RewardFunction, ...] = ()
    on_error: OnError = "stop"
    total: Callable[[Tensor], Tensor] = lambda counts: counts  # summed over all processes that score

    def rewards(self, sequences: Sequences, rows: Sequence[int] = (), *, alone: bool = True) -> Rewards:
        """float32 on the device of `sequences`; the total is NaN where a failure is masked.

        `rows`: which of the data rows each sequence's prompt is of; none for prompts from elsewhere.

        A function that does not apply to a response (None) is left out of its sum; if none applies, that is a
        failure where functions score `alone`, and 0 beside a reward model. DataError if a function fails and
        `on_error` is "stop", or if more than a fifth of the rows fail.
        """
        device, cases = sequences.ids.device, list[Case]()
        for i, lists in enumerate(as_lists(sequences, self.encoder.ends)):
            cases.append(self._case(self.rows[rows[i]] if rows else None, *lists))
        called = [*self.functions, *self.watched]
        outcomes = [function.values(cases, stop=self.on_error == "stop") for function in called]
        totals = [
            self._total(case, [values[i] for values in outcomes], alone) for i, case in enumerate(cases)
        ]
        failures = [value for value in totals if isinstance(value, DataError)]
        if failures and self.on_error == "stop":
            raise failures[0]
        self._check(failures, len(cases), device)
        names = _short([function.name for function in called])
        return Rewards(
            _numbers(totals, device),
            {name: _numbers(values, device) for name, values in zip(names, outcomes, strict=True)},
        )

    def _check(self, failures: Sequence[DataError], rows: int, device: torch.device) -> None:
        """DataError, in every process, where more than a fifth of the rows of all of them failed."""
        failed, scored = self.total(torch.tensor([len(failures), rows], device=device)).tolist()
        if failed > MAX_MASKED * scored:
            first = failures[0].message if failures else "another process has it"
            raise DataError(
                f"{failed} of {scored} responses got no reward, more than {MAX_MASKED:.0%}; "
                f"the first: {first}",
                hint="mend the function: on_reward_error=mask is for single failures",
            )

    def _total(self, case: Case, outcomes: Sequence[Outcome], alone: bool) -> float | DataError:
        """A case's sum of what the functions gave it, in their order, or its first failure."""
        total, applied = 0.0, not alone or not self.functions
        for function, value in zip(self.functions, outcomes, strict=False):
            if isinstance(value, DataError):
                return value
            if value is not None:
                total, applied = total + function.weight * value, True
        if not applied:
            return self.functions[-1].error(case, "gave None, as every other function did: nothing scores it")
        if abs(total) > LARGEST:
            return self.functions[-1].error(case, f"brings the weighted sum to {total:g}, beyond float32")
        return total

    def _case(
        self, row: Preference | None, prompt_ids: list[int], response_ids: list[int], closed: bool
    ) -> Case:
        columns = {
            **(row.columns if row else {}),
            "ended": closed,
            "source": row.source if row else "",
            "row": row.row if row else None,
            "chosen": row.chosen if row else None,
            "rejected": row.rejected if row else None,
        }
        prompt = self.encoder.readable_prompt(row.prompt) if row else self.encoder.prompt_text(prompt_ids)
        return Case(prompt, self.encoder.decode(response_ids, prompt_ids), columns)


def _numbers(values: Sequence[Outcome], device: torch.device) -> Tensor:
    """(B,) float32, NaN for what is no number."""
    numbers = [math.nan if value is None or isinstance(value, DataError) else value for value in values]
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _short(names: Sequence[str]) -> list[str]:
    """Of "module:f" its "f", and the whole name where two end alike."""
    ends = [name.rpartition(":")[2] for name in names]
    often = Counter(ends)
    return [end if often[end] == 1 else name for name, end in zip(names, ends, strict=True)]


def masked(scores: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scores with 0 in place of NaN, and which rows have a score: None if all have."""
    valid = ~scores.isnan()
    return torch.where(valid, scores, torch.zeros_like(scores)), None if bool(valid.all()) else valid

"""The reward of sampled responses under the functions of a setting: their weighted sum, or what failed.

A failure never becomes a reward: it stops the run, or masks the response and is counted. A call over the time
limit has failed, too. How a function is called is in `calls`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from preftune.data import Encoder, Preference, Sequences
from preftune.errors import DataError
from preftune.rollout.calls import LARGEST, Case, RewardFunction, load_functions
from preftune.rollout.sample import ended

MAX_MASKED = 0.2  # of the responses of one call, over all processes; more is no accident
OnError = Literal["stop", "mask"]
__all__ = ["OnError", "RewardFunction", "RewardFunctions", "load_functions", "masked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunctions:
    """The weighted sum of functions on token rows. `rows` are those that prompts come from."""

    functions: tuple[RewardFunction, ...]
    encoder: Encoder
    rows: Sequence[Preference]
    on_error: OnError = "stop"
    total: Callable[[Tensor], Tensor] = lambda counts: counts  # summed over all processes that score

    def scores(self, sequences: Sequences, rows: Sequence[int] = (), *, alone: bool = True) -> Tensor:
        """Σ weight · reward, (B,) float32 on the device of `sequences`; NaN where a failure is masked.

        `rows`: which of the data rows each sequence's prompt is of; none for prompts from elsewhere.

        A function that does not apply to a response (None) is left out of its sum; if none applies, that is a
        failure where functions score `alone`, and 0 beside a reward model. DataError if a function fails and
        `on_error` is "stop", or if more than a fifth of the rows fail.
        """
        device, sequences = sequences.ids.device, sequences.to("cpu")  # once, not row by row
        closed = ended(sequences, self.encoder.ends).tolist()
        ids, real, written = sequences.ids, sequences.attention, sequences.response
        cases = []
        for i in range(len(sequences)):
            row = self.rows[rows[i]] if rows else None
            prompt_ids, response_ids = ids[i][real[i] & ~written[i]].tolist(), ids[i][written[i]].tolist()
            cases.append(self._case(row, prompt_ids, response_ids, closed[i]))
        values = self._values(cases, alone)
        failures = [value for value in values if isinstance(value, DataError)]
        if failures and self.on_error == "stop":
            raise failures[0]
        self._check(failures, len(values), sequences.ids.device)
        numbers = [math.nan if isinstance(value, DataError) else value for value in values]
        return torch.tensor(numbers, dtype=torch.float32, device=device)

    def _check(self, failures: Sequence[DataError], rows: int, device: torch.device) -> None:
        """DataError, in every process, where more than a fifth of the rows of all of them failed."""
        failed, scored = self.total(torch.tensor([len(failures), rows], device=device)).tolist()
        if failed > MAX_MASKED * scored:
            first = failures[0].message if failures else "another process has it"
            raise DataError(
                f"{failed} of {scored} responses got no reward, more than {MAX_MASKED:.0%}; "
                f"the first: {first}",
                hint=failures[0].hint if failures else "",
            )

    def _values(self, cases: Sequence[Case], alone: bool) -> list[float | DataError]:
        """Each case's sum, or its first failure."""
        totals: list[float | DataError] = [0.0] * len(cases)
        applied = [not alone] * len(cases)
        for function in self.functions:
            rewards = function.values(cases, stop=self.on_error == "stop")
            for i, (total, value) in enumerate(zip(totals, rewards, strict=True)):
                if isinstance(total, DataError) or value is None:
                    continue
                applied[i] = True
                totals[i] = value if isinstance(value, DataError) else total + function.weight * value
        last = self.functions[-1]
        for i, total in enumerate(totals):
            if isinstance(total, DataError):
                continue
            if not applied[i]:
                totals[i] = last.error(cases[i], "gave None, as every other function did: nothing scores it")
            elif abs(total) > LARGEST:
                totals[i] = last.error(cases[i], f"brings the weighted sum to {total:g}, beyond float32")
        return totals

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
        prompt = self.encoder.shown(row.prompt) if row else self.encoder.prompt_text(prompt_ids)
        return Case(prompt, self.encoder.decode(response_ids, prompt_ids), columns)


def masked(scores: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scores with 0 in place of NaN, and which rows have a score: None if all have."""
    valid = ~scores.isnan()
    return torch.where(valid, scores, torch.zeros_like(scores)), None if bool(valid.all()) else valid

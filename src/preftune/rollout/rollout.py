"""The record of sampled responses."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from preftune.data.batch import Sequences


class Rows:
    """A dataclass of `sequences` and tensors, of which rows are taken; (B, T) tensors are cut to the longest
    of them.
    """

    __slots__ = ()
    sequences: Sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        sequences = self.sequences[rows]
        width = sequences.ids.shape[1]

        def cut(value: object) -> object:
            if isinstance(value, Sequences):
                return sequences
            if isinstance(value, dict):
                return {name: numbers[rows] for name, numbers in value.items()}
            if not isinstance(value, Tensor):
                return value
            return value[rows][:, :width] if value.dim() == 2 else value[rows]

        return self._each(cut)

    def to(self, device: torch.device) -> Self:
        def moved(value: object) -> object:
            if isinstance(value, dict):
                return {name: numbers.to(device) for name, numbers in value.items()}
            return value.to(device) if isinstance(value, Sequences | Tensor) else value

        return self._each(moved)

    def _each(self, change: Callable[[object], object]) -> Self:
        record: Any = self
        return type(record)(**{f.name: change(getattr(self, f.name)) for f in fields(record)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(Rows):
    """B sampled responses. Never mutated.

    sequences · logprobs, reference_logprobs (B, T) under the policy that sampled and under the reference,
    from the training forward · values (B, T) or None without a critic · scores (B,) after the missing-EOS
    rule · group (B,) which rows answer the same prompt · ended (B,) bool, whether EOS was written ·
    valid (B,) bool, which rows have a score, or None if all have: nothing may be learnt from the others ·
    sampler_logprobs (B, T) by another sampler's own account, None where the one here drew them; cap, where
    importance weights against it are cut off · by_function: what each reward function gave, (B,) by name.

    Two prompts, two responses each: group = [0, 0, 1, 1].
    """

    sequences: Sequences
    logprobs: Tensor
    reference_logprobs: Tensor
    scores: Tensor
    values: Tensor | None = None
    group: Tensor | None = None
    ended: Tensor | None = None
    valid: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    cap: float | None = None
    by_function: dict[str, Tensor] = field(default_factory=dict)

    @property
    def learnable(self) -> Sequences:
        """The sequences, with no response in rows that have no score: weight, gradient and statistics 0."""
        rows = self.sequences
        if self.valid is None:
            return rows
        return Sequences(rows.ids, rows.attention, rows.response & self.valid.unsqueeze(1))

    @property
    def valid_scores(self) -> Tensor:
        """The scores there are: (rows with a score,)."""
        return self.scores if self.valid is None else self.scores[self.valid]


def of_all(rollout: Rollout, gather: Callable[[Tensor], Tensor], responses_per_prompt: int) -> Rollout:
    """The rollout of all processes, from that of this one: `gather` concatenates their rows."""
    sequences, values, sampler_logprobs = rollout.sequences, rollout.values, rollout.sampler_logprobs
    valid = gather(
        torch.ones_like(sequences.ids[:, 0], dtype=torch.bool) if rollout.valid is None else rollout.valid
    )
    ended = rollout.ended
    return Rollout(
        sequences=Sequences(gather(sequences.ids), gather(sequences.attention), gather(sequences.response)),
        logprobs=gather(rollout.logprobs),
        reference_logprobs=gather(rollout.reference_logprobs),
        values=None if values is None else gather(values),
        scores=gather(rollout.scores),
        group=torch.arange(len(valid), device=valid.device) // responses_per_prompt,
        ended=None if ended is None else gather(ended),
        valid=None if bool(valid.all()) else valid,
        sampler_logprobs=None if sampler_logprobs is None else gather(sampler_logprobs),
        cap=rollout.cap,
        by_function={name: gather(numbers) for name, numbers in rollout.by_function.items()},
    )

"""The record of sampled responses."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from preftune.data.batch import Rows, Sequences


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
    whole = replace(rollout, valid=None, group=None).map_tensors(gather)
    all_rows = torch.ones_like(rollout.sequences.ids[:, 0], dtype=torch.bool)
    valid = gather(all_rows if rollout.valid is None else rollout.valid)
    group = torch.arange(len(whole), device=valid.device) // responses_per_prompt
    return replace(whole, group=group, valid=None if bool(valid.all()) else valid)

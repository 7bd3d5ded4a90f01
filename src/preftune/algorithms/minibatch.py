"""What PPO and GRPO share: minibatches of a rollout, and numbers about the responses."""

from collections.abc import Iterator
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from preftune.algorithms.base import Metrics
from preftune.rollout.rollout import Rollout


class Rows(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice | Tensor) -> Self: ...


R = TypeVar("R", bound=Rows)


def minibatches(experience: R, count: int, seed: int) -> Iterator[R]:
    """`count` parts of nearly equal size in an order drawn from `seed`; one part keeps the order as it is."""
    if count == 1:
        yield experience
        return
    order = torch.randperm(len(experience), generator=torch.Generator().manual_seed(seed))
    for rows in order.tensor_split(count):
        yield experience[rows]


def response_metrics(rollout: Rollout, max_new_tokens: int, epochs: int) -> Metrics:
    """Lengths in tokens (EOS counted) and the share of responses that were cut: without EOS where that is on
    record, else as long as the limit. Tokens sampled, and tokens of prompt and response that the step's
    updates pass through the policy; the share of responses left out because a reward function failed.
    """
    whole = rollout.sequences.attention.sum().item()
    lengths = rollout.sequences.response.sum(1).float()
    cut = lengths >= max_new_tokens if rollout.ended is None else ~rollout.ended
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/max_length": lengths.max().item(),
        "completions/min_length": lengths.min().item(),
        "completions/clipped_ratio": cut.float().mean().item(),
        "tokens/sampled": lengths.sum().item(),
        "tokens/trained": epochs * whole,
        "frac_reward_masked": 1 - len(rollout.valid_scores) / len(rollout),
    }

"""What PPO and GRPO share: minibatches of a rollout, and numbers about the responses."""

from collections.abc import Iterator
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from preftune.algorithms.base import Metrics
from preftune.data.batch import Sequences


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


def response_metrics(sequences: Sequences, max_new_tokens: int) -> Metrics:
    """Lengths in tokens (EOS counted) and the share of responses cut at the limit."""
    lengths = sequences.response.sum(1).float()
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/max_length": lengths.max().item(),
        "completions/min_length": lengths.min().item(),
        "completions/clipped_ratio": (lengths >= max_new_tokens).float().mean().item(),
    }

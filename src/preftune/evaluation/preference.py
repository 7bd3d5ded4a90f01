"""Which of two responses a policy itself prefers: its log-probabilities as a reward model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from preftune.data import Encoder, Preference
from preftune.evaluation import stats
from preftune.models.roles import Policy, Reference


@dataclass(frozen=True, slots=True)
class PairLogprobs:
    """log π(y | x) of both responses of every pair, summed over tokens, and their lengths: (n, 2) each."""

    sums: np.ndarray
    lengths: np.ndarray


@torch.no_grad()
def pair_logprobs(
    role: Policy | Reference,
    encoder: Encoder,
    pairs: Sequence[Preference],
    batch_size: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> PairLogprobs:
    """Chosen in column 0, rejected in column 1."""
    sums, lengths = [], []
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        batch = encoder.pairs(chunk)
        sides = [side.to(device) for side in (batch.chosen, batch.rejected)]
        sums.append(np.stack([role.logprobs(side).sum(1).cpu().numpy() for side in sides], axis=1))
        lengths.append(np.stack([side.response.sum(1).cpu().numpy() for side in sides], axis=1))
        advance(len(chunk))
    return PairLogprobs(np.concatenate(sums).astype(float), np.concatenate(lengths).astype(float))


def preference(
    policy: PairLogprobs, reference: PairLogprobs | None, resamples: int, seed: int
) -> dict[str, Any]:
    """How often the chosen response is the likelier one, ties half: in sum, per token, and by the implicit
    reward log π - log π_ref (Rafailov et al. 2023, arXiv:2305.18290, eq. 5), None for the reference itself.
    """
    result: dict[str, Any] = {
        "n": len(policy.sums),
        "accuracy": None,
        "mean_margin": None,
        "accuracy_logprob": stats.beats(*policy.sums.T),
        "accuracy_logprob_per_token": stats.beats(*(policy.sums / policy.lengths).T),
    }
    if reference is not None:
        implicit = policy.sums - reference.sums
        margin = implicit[:, 0] - implicit[:, 1]
        result["accuracy"] = stats.beats(*implicit.T)
        result["mean_margin"] = stats.mean(margin, resamples, seed)
    return result

"""Which of two responses a policy itself prefers: its log-probabilities as a reward model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from preftune.data import Encoder, Preference, row_key
from preftune.evaluation import stats
from preftune.models.roles import Policy, Reference


@dataclass(frozen=True, slots=True)
class PairLogprobs:
    """log π(y | x) of both responses of every pair, summed over tokens, and their lengths: (n, 2) each.
    `prompts`: those of the pairs; None where each has its own.
    """

    sums: np.ndarray
    lengths: np.ndarray
    prompts: stats.Groups | None = None


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
    prompts = np.unique([row_key(pair) for pair in pairs], return_inverse=True)[1]
    return PairLogprobs(np.concatenate(sums).astype(float), np.concatenate(lengths).astype(float), prompts)


def preference(
    policy: PairLogprobs, reference: PairLogprobs | None, resamples: int, seed: int
) -> dict[str, Any]:
    """How often the chosen response is the likelier one, ties half: in sum, per token, and by the implicit
    reward log π - log π_ref (Rafailov et al. 2023, arXiv:2305.18290, eq. 5), None for the reference itself.
    Pairs of one prompt are not independent: intervals are over prompts where they repeat.
    """
    prompts = np.arange(len(policy.sums)) if policy.prompts is None else policy.prompts
    result: dict[str, Any] = {
        "n": len(policy.sums),
        "accuracy": None,
        "mean_margin": None,
        "accuracy_logprob": _beats(policy.sums, prompts),
        "accuracy_logprob_per_token": _beats(policy.sums / policy.lengths, prompts),
    }
    if reference is not None:
        implicit = policy.sums - reference.sums
        margin = implicit[:, 0] - implicit[:, 1]
        result["accuracy"] = _beats(implicit, prompts)
        result["mean_margin"] = stats.mean(margin, resamples, seed, prompts)
    return result


def _beats(values: np.ndarray, prompts: stats.Groups) -> dict[str, Any]:
    """A record of how often the first column is the larger one; of NaN nothing is known."""
    credits = stats.wins(*values.T)
    return stats.beats(*values.T) if np.isnan(credits).any() else stats.share_by_group(credits, prompts)

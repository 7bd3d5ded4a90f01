"""The three reductions as weights, and the one sum that uses them.

Losses stay unreduced; the weights of a *global* minibatch sum to 1 (`constant_length`: to at most 1) and are
built before any forward pass from global counts, so that neither microbatches nor ranks can change a gradient
beyond rounding.
"""

import math

from torch import Tensor

from .checks import check_range
from .masked import as_mask, promote, zero_off


def token_mean(mask: Tensor, total: float | Tensor | None = None) -> Tensor:
    """1 / total on every token: all tokens count the same (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 8).

    `total`: tokens of the global minibatch, by default this mask's. (B, T) -> (B, T).
    """
    tokens, total = _numbers(mask, total)
    return tokens / _at_least_one(tokens.sum() if total is None else total)


def sequence_mean(mask: Tensor, total: float | Tensor | None = None) -> Tensor:
    """1 / (length of the row · total): all responses count the same (GRPO, Shao et al. 2024, eq. 3).

    `total`: non-empty rows of the global minibatch, by default this mask's. (B, T) -> (B, T).
    """
    tokens, total = _numbers(mask, total)
    lengths = tokens.sum(1, keepdim=True)  # (B, 1)
    return tokens / lengths.clamp(min=1) / _at_least_one((lengths > 0).sum() if total is None else total)


def constant_length(mask: Tensor, max_length: int, total: float | Tensor | None = None) -> Tensor:
    """1 / (max_length · total) on every token: no bias towards any length (Dr. GRPO, arXiv:2503.20783).

    `total`: all rows of the global minibatch, empty ones too, by default this mask's; one that counted only
    what there is to learn from would weigh a token by its neighbours' fate. TRL's "dr_grpo" does the same.
    (B, T) -> (B, T). ValueError: max_length below 1.
    """
    check_range(1, math.inf, max_length=max_length)
    tokens, total = _numbers(mask, total)
    return tokens / max_length / _at_least_one(len(mask) if total is None else total)


def weighted_sum(terms: Tensor, weights: Tensor) -> Tensor:
    """Σ terms · weights where weights != 0; elsewhere a term is ignored, NaN and inf too. -> scalar.

    ValueError: different shapes, since (B,) terms would broadcast against (B, T) weights the wrong way.
    """
    if terms.shape != weights.shape:
        raise ValueError(f"terms {tuple(terms.shape)} and weights {tuple(weights.shape)} differ in shape")
    terms, weights = promote(terms, weights)
    return (zero_off(terms, weights != 0) * weights).sum()


def _numbers(mask: Tensor, total: float | Tensor | None) -> tuple[Tensor, float | Tensor | None]:
    """The mask as 0 and 1 in the dtype of the result, and the total in that dtype too.

    ValueError: a negative total.
    """
    check_range(0, math.inf, total=total)
    values, total = promote(mask, total)
    return as_mask(values).to(values.dtype), total


def _at_least_one(count: float | Tensor) -> float | Tensor:
    """A count to divide by: an empty mask has weights 0, not NaN."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)

"""An interval that holds at every look: whoever watches a labelling may stop when it pleases."""

import math

import numpy as np
from numpy.typing import ArrayLike

from preftune.evaluation.stats import Floats, Interval

TRUNCATION = 0.5  # c of the paper: a bet never risks more than this share of the capital
_BLOCK = 512  # observations at a time, so that memory does not grow with them


def confidence_sequence(x: ArrayLike, level: float = 0.95, steps: int = 1000) -> Interval:
    """Interval of the mean of values in [0, 1], in the order in which they came.

    With probability `level` every interval that is ever shown holds the mean, however often one looks and
    whatever decides when to stop; the values need a common conditional mean and no distribution. The set of
    means m against which neither bet, on more than m or on less, has ever multiplied its capital by
    2 / (1 - level): Waudby-Smith & Ramdas 2024 (JRSS B 86, 1-27; arXiv:2010.09686), Theorem 3, hedged capital
    with predictable plug-in bets and the running intersection. On a grid of `steps`, rounded outwards. No
    values say nothing: (0, 1).
    ValueError: outside [0, 1].
    """
    x = np.asarray(x, dtype=np.float64).reshape(-1)
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError("a value lies outside of [0, 1]")
    means = np.arange(steps + 1) / steps
    with np.errstate(divide="ignore"):  # no bet is too large where there is nothing to lose
        most_up, most_down = TRUNCATION / means, TRUNCATION / (1 - means)
    bets, most = _bets(x, 1 - level), math.log(2 / (1 - level))
    up, down, highest = np.zeros(len(means)), np.zeros(len(means)), np.zeros(len(means))
    for start in range(0, len(x), _BLOCK):
        gain = x[start : start + _BLOCK, None] - means
        bet = bets[start : start + _BLOCK, None]
        ups = up + np.log1p(np.minimum(bet, most_up) * gain).cumsum(0)
        downs = down + np.log1p(-np.minimum(bet, most_down) * gain).cumsum(0)
        highest = np.maximum(highest, np.maximum(ups, downs).max(0))
        up, down = ups[-1], downs[-1]
    plausible = means[highest < most]
    if len(plausible) == 0:  # the interval lies between two points of the grid
        plausible = means[[int(highest.argmin())]]
    return Interval(max(float(plausible[0]) - 1 / steps, 0.0), min(float(plausible[-1]) + 1 / steps, 1.0))


def _bets(x: Floats, alpha: float) -> Floats:
    """λ_t = √(2 ln(2/α) / (σ²_{t-1} t ln(1 + t))), each from the values before it; (n,)."""
    t = np.arange(1, len(x) + 1)
    mean = (0.5 + x.cumsum()) / (t + 1)
    variance = (0.25 + ((x - mean) ** 2).cumsum()) / (t + 1)
    before = np.concatenate([[0.25], variance])[: len(x)]
    return np.sqrt(2 * math.log(2 / alpha) / (before * t * np.log1p(t)))

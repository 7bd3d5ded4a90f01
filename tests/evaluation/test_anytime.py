"""The confidence sequence: its definition by hand, and that it holds when one looks all the time."""

import math

import numpy as np
import pytest

from preftune.evaluation.anytime import confidence_sequence
from preftune.evaluation.stats import wilson


def capital(x: list[float], m: float, alpha: float) -> float:
    """The largest hedged capital against m, value by value as Theorem 3 writes it."""
    up = down = most = 0.5
    total, squares = 0.0, 0.0
    for t, value in enumerate(x, start=1):
        variance = (0.25 + squares) / t
        bet = math.sqrt(2 * math.log(2 / alpha) / (variance * t * math.log(1 + t)))
        up *= 1 + min(bet, 0.5 / m) * (value - m)
        down *= 1 - min(bet, 0.5 / (1 - m)) * (value - m)
        most = max(most, up, down)
        total += value
        squares += (value - (0.5 + total) / (t + 1)) ** 2
    return most


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_ends_are_where_the_capital_of_the_definition_crosses(level: float) -> None:
    x = np.random.default_rng(0).choice([0.0, 0.5, 1.0], p=[0.2, 0.2, 0.6], size=700).tolist()
    low, high = confidence_sequence(x, level)
    threshold = 1 / (1 - level)
    for inside in (low + 2e-3, high - 2e-3):
        assert capital(x, inside, 1 - level) < threshold
    for outside in (low - 2e-3, high + 2e-3):
        assert capital(x, outside, 1 - level) >= threshold


def test_by_hand() -> None:
    """Ones only: the bet on more than m wins 1 + c (1 - m) / m each time while c / m is the smaller bet."""
    n, threshold = 8, 40.0
    m = 1 / (1 + 2 * (threshold ** (1 / n) - 1))  # (1 + (1 - m) / 2m)^n = 40
    low, high = confidence_sequence([1.0] * n)
    assert math.sqrt(2 * math.log(40) / (0.25 / n * n * math.log(1 + n))) > 0.5 / m  # so it is
    assert low == pytest.approx(m, abs=2e-3)
    assert high == 1.0


def _ever_missed(mean: float, runs: int, n: int) -> tuple[float, float]:
    """Shares of runs in which some interval missed: of the sequence, and of Wilson's at each n."""
    rng = np.random.default_rng(7)
    missed, by_wilson = 0, 0
    for _ in range(runs):
        x = (rng.random(n) < mean).astype(float)
        low, high = confidence_sequence(x, steps=200)  # the intersection of those at every look
        missed += not low <= mean <= high
        wins = x.cumsum()
        looks = [wilson(wins[i], i + 1) for i in range(9, n, 5)]
        by_wilson += any(not low <= mean <= high for low, high in looks)
    return missed / runs, by_wilson / runs


@pytest.mark.parametrize("mean", [0.5, 0.63])
def test_it_holds_when_one_looks_at_every_judgement(mean: float) -> None:
    missed, by_wilson = _ever_missed(mean, runs=300, n=400)
    assert missed <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)
    assert by_wilson > 0.15  # an interval for one look does not


def test_it_narrows_to_the_mean() -> None:
    low, high = confidence_sequence([0.0, 0.5, 1.0, 1.0] * 1500)
    assert low < 0.625 < high
    assert high - low < 0.06


def test_nothing_seen_says_nothing() -> None:
    assert confidence_sequence([]) == (0.0, 1.0)


def test_values_outside_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        confidence_sequence([0.5, 1.2])
    with pytest.raises(ValueError, match="outside"):
        confidence_sequence([math.nan])

"""Length control on made-up policies whose dependence on length is known."""

from typing import Any

import numpy as np
import pytest

from preftune.config import EvaluationConfig
from preftune.evaluation.best_of_n import best_of, not_picked_from
from preftune.evaluation.length import controlled_win_rate, length_controlled, matched_gain

SETTINGS = EvaluationConfig(resamples=300)


def rows(scores: np.ndarray, lengths: np.ndarray) -> list[dict[str, Any]]:
    return [{"score": float(s), "length": int(n)} for s, n in zip(scores, lengths, strict=True)]


def test_a_policy_that_is_only_longer_has_no_length_controlled_lead() -> None:
    rng = np.random.default_rng(0)
    longer = np.where(rng.random(1500) < 0.8, 1, -1) * rng.integers(5, 30, 1500)
    wins = (rng.random(1500) < 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))).astype(float)
    found = controlled_win_rate(wins, longer.astype(float), 300, seed=0)
    assert wins.mean() > 0.65
    assert found["value"] == pytest.approx(0.5, abs=0.05)
    assert found["interval"][0] < 0.5 < found["interval"][1]


def test_a_lead_that_has_nothing_to_do_with_length_stays() -> None:
    rng = np.random.default_rng(1)
    longer = rng.integers(-20, 21, 1500).astype(float)
    wins = (rng.random(1500) < 0.7).astype(float)
    found = controlled_win_rate(wins, longer, 300, seed=0)
    assert found["value"] == pytest.approx(wins.mean(), abs=0.02)
    assert found["interval"][0] > 0.6


@pytest.mark.parametrize("wins", [np.ones(40), np.zeros(40)])
def test_a_clean_sweep_stays_finite(wins: np.ndarray) -> None:
    found = controlled_win_rate(wins, np.zeros(40), 50, seed=0)
    assert abs(found["value"] - wins.mean()) < 0.02
    low, high = found["interval"]
    assert 0 <= low <= found["value"] <= high <= 1


def test_where_nearly_all_are_longer_equal_length_is_not_guessed() -> None:
    """Wins of 70 % whatever the length: read off at 0 it would be 0.60 with a narrow interval."""
    rng = np.random.default_rng(0)
    wins = rng.permutation(np.repeat([1.0, 0.0], [140, 60]))
    found = controlled_win_rate(wins, 20 + np.round(rng.normal(0, 2, 200)), 100, seed=0)
    assert found["value"] is None
    assert "not identified" in found["reason"]


@pytest.mark.parametrize("shift", [0.0, pytest.param(2.0, marks=pytest.mark.slow), 2.5])
def test_intervals_hold_the_rate_as_far_as_it_is_said(shift: float) -> None:
    rng, held = np.random.default_rng(5), 0
    for i in range(100):
        found = controlled_win_rate(
            (rng.random(200) < 0.7).astype(float), np.round(rng.normal(shift, 2, 200)), 200, seed=i
        )
        low, high = found["interval"] or (0, 1)
        held += low <= 0.7 <= high
    assert held >= 88


def pool(n: int, size: int, per_token: float) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Reference responses whose score grows by `per_token`, and the noise of their scores."""
    rng = np.random.default_rng(2)
    lengths = rng.integers(10, 41, (n, size))
    scores = per_token * lengths + rng.normal(scale=0.1, size=(n, size))
    return rows(scores.ravel(), lengths.ravel()), lengths


def test_a_gain_that_is_all_length_does_not_survive() -> None:
    reference, _ = pool(200, 16, 0.1)
    longer = np.full(200, 38)
    found = matched_gain(rows(0.1 * longer, longer), reference, 300, seed=0)
    assert found["gain"]["mean"] == pytest.approx(0.1 * (38 - 25), abs=0.1)
    assert found["share_surviving"]["value"] == pytest.approx(0.0, abs=0.15)
    assert found["n"] > 150  # nearly every prompt has a reference response of 35 to 41 tokens


def test_a_gain_at_equal_length_survives_whole() -> None:
    reference, _ = pool(200, 16, 0.0)
    found = matched_gain(rows(np.ones(200), np.full(200, 25)), reference, 300, seed=0)
    assert found["gain_length_matched"]["mean"] == pytest.approx(1.0, abs=0.05)
    low, high = found["share_surviving"]["interval"]
    assert low <= 1 <= high
    assert high - low < 0.2


def test_choosing_the_best_of_four_keeps_its_gain_where_scores_have_nothing_to_do_with_length() -> None:
    """Matched with the very responses that it was chosen from, it would be matched with itself."""
    reference, _ = pool(400, 16, 0.0)
    chosen = best_of(reference, 4, 16)
    found = matched_gain(chosen, not_picked_from(reference, 4, 16), 300, seed=0)
    low, high = found["share_surviving"]["interval"]
    assert low <= 1 <= high
    assert high - low < 0.2
    assert matched_gain(chosen, reference, 300, seed=0)["share_surviving"]["value"] < 0.85
    assert matched_gain(chosen, [], 300, seed=0)["n"] == 0  # best_of = pool leaves nothing to compare with


def test_without_a_gain_there_is_no_share_and_without_a_match_nothing() -> None:
    reference, _ = pool(100, 16, 0.0)
    assert matched_gain(rows(np.zeros(100), np.full(100, 25)), reference, 100, 0)["share_surviving"] is None
    assert matched_gain(rows(np.ones(100), np.full(100, 500)), reference, 100, 0)["n"] == 0


def test_the_record_says_how_it_was_made() -> None:
    reference, _ = pool(20, 4, 0.0)
    own = rows(np.ones(20), np.full(20, 25))
    found = length_controlled(own, rows(np.zeros(20), np.full(20, 20)), reference, SETTINGS, 0)
    assert "arXiv:2404.04475" in found["source"]
    assert "arXiv:2310.03716" in found["source"]
    assert "raw_win_rate" not in found  # it is the policy's own win rate


@pytest.mark.parametrize(("win", "low", "high"), [(0.5, 0.254, 0.746), (1.0, 0.75, 1.0), (0.0, 0.0, 0.25)])
def test_wins_that_are_all_alike_leave_the_rate_as_open_as_wilson(
    win: float, low: float, high: float
) -> None:
    """12 prompts that all end alike: redrawn, they are the same again."""
    found = controlled_win_rate(np.full(12, win), np.tile([-3.0, 3.0], 6), 200, seed=0)
    assert found["value"] == pytest.approx(win, abs=0.01)
    assert found["interval"] == pytest.approx([low, high], abs=0.012)

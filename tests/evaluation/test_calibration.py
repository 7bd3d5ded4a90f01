"""Calibration against distributions whose calibration is known by construction."""

import math

import numpy as np
import pytest

from preftune.evaluation import stats
from preftune.evaluation.calibration import calibration, oriented, reliability, sigmoid, temperature


def overconfident(n: int, factor: float, seed: int = 0) -> np.ndarray:
    """Margins of a model that is right with probability σ(m / factor) where it says σ(m)."""
    rng = np.random.default_rng(seed)
    size = np.abs(rng.normal(scale=3.0, size=n))
    return np.where(rng.random(n) < sigmoid(size / factor), size, -size)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_planted_temperature_is_found(factor: float) -> None:
    found = temperature(overconfident(20_000, factor), seed=0)
    assert found is not None
    assert found["value"] == pytest.approx(factor, rel=0.08)
    assert found["nll_coin"] == pytest.approx(0.6931, abs=1e-4)
    if factor != 1.0:
        assert found["nll_after"] < found["nll_before"]


def test_margins_that_say_nothing_or_lie_have_an_infinite_temperature() -> None:
    found = temperature(-np.abs(np.random.default_rng(0).normal(size=100)), seed=0)
    assert found is not None
    assert found["value"] == math.inf
    assert found["nll_after"] == pytest.approx(math.log(2))
    assert temperature(np.ones(19), seed=0) is None


def test_the_fitted_loss_is_not_measured_on_the_pairs_it_was_fitted_to() -> None:
    """On noise an in-sample fit always looks better than a coin; over many draws the cross-fit does not."""
    after = [temperature(np.random.default_rng(s).normal(size=40), s) for s in range(60)]
    assert np.mean([each["nll_after"] for each in after if each]) > math.log(2)


def test_pairs_of_one_prompt_are_not_counted_as_several() -> None:
    margins = overconfident(60, 3.0)
    prompts = np.repeat(np.arange(60), 5)
    label, p = oriented(margins, seed=1)
    once, found = reliability(p, label), reliability(np.repeat(p, 5), np.repeat(label, 5), prompts)
    for alone, many in zip(once, found, strict=True):
        assert many["n"] == 5 * alone["n"]
        assert many["interval"] == pytest.approx(alone["interval"], abs=0.02)
    wide = temperature(np.repeat(margins, 5), 0, 400, prompts)
    narrow = temperature(np.repeat(margins, 5), 0, 400)
    assert wide is not None
    assert narrow is not None
    assert wide["nll_gain"]["mean"] == narrow["nll_gain"]["mean"]
    assert np.ptp(wide["nll_gain"]["interval"]) > 1.7 * np.ptp(narrow["nll_gain"]["interval"])


def test_reliability_bins_add_up_to_the_calibration_error() -> None:
    label, p = oriented(overconfident(3000, 3.0), seed=5)
    bins = reliability(p, label)
    assert sum(b["n"] for b in bins) == 3000
    total = sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in bins if b["n"]) / 3000
    assert total == pytest.approx(stats.ece(p, label), abs=1e-12)
    assert bins[-1]["accuracy"] < bins[-1]["confidence"] - 0.05  # surer than right, as planted


def test_the_diagram_does_not_depend_on_the_order_of_chosen_and_rejected() -> None:
    margins = overconfident(500, 1.0)
    label, _ = oriented(margins, seed=1)
    assert 0.4 < label.mean() < 0.6
    first, second = (calibration(margins, seed) for seed in (1, 2))
    assert first["brier"] == pytest.approx(second["brier"])  # (p - y)² is the same either way round
    assert first["ece"] == pytest.approx(second["ece"])


def test_what_chance_makes_of_perfect_calibration_is_said_beside_the_error() -> None:
    """A calibrated model stays below it 19 times in 20, one that is three times too sure does not."""
    found = [calibration(overconfident(400, 1.0, seed), seed, 200) for seed in range(60)]
    below = sum(each["ece"] <= each["ece_if_calibrated"] for each in found)
    assert 52 <= below <= 60
    surer = calibration(overconfident(400, 3.0), 0, 200)
    assert surer["ece"] > surer["ece_if_calibrated"]


def test_pairs_of_one_prompt_are_no_independent_witnesses_of_miscalibration() -> None:
    """A calibrated model, 40 prompts whose one pair is there six times: taken for 240 pairs, it would be
    called miscalibrated nearly always.
    """
    prompts, above = np.arange(40).repeat(6), 0
    for i in range(40):
        rng = np.random.default_rng(i)
        margins = rng.normal(size=40)
        right = rng.random(40) < sigmoid(np.abs(margins))
        margins = np.where(right, np.abs(margins), -np.abs(margins)).repeat(6)
        found = calibration(margins, i, 100, prompts)
        above += found["ece"] > found["ece_if_calibrated"]
    assert above <= 6


def test_a_temperature_helps_only_where_its_interval_says_so() -> None:
    planted = calibration(overconfident(2000, 3.0), 0, 300)["temperature"]["nll_gain"]
    assert planted["interval"][0] > 0
    helped = [calibration(overconfident(300, 1.0, s), s, 200)["temperature"]["nll_gain"] for s in range(20)]
    assert sum(each["interval"][0] > 0 for each in helped) <= 2


def test_brier_and_margin_have_intervals() -> None:
    found = calibration(overconfident(400, 1.0), 0, 200)
    low, high = found["brier_interval"]
    assert low < found["brier"] < high < 0.25

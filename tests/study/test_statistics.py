"""Intervals over seeds and prompts, and fitted laws, against known answers."""

import math
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from scipy.stats import t as student

from preftune.evaluation.laws import fit_law
from preftune.evaluation.pooled import pooled_gain, pooled_means, pooled_verdict, seed_widening
from preftune.evaluation.stats import number_needed
from preftune.records.verdict import BETTER, UNCLEAR, WORSE
from preftune.study.design import Design
from preftune.study.pool import _numbers
from preftune.study.sweep import sweep_records
from preftune.study.values import COLUMNS


def drawn(
    rng: np.random.Generator, seeds: int, prompts: int, between: float, within: float
) -> list[np.ndarray]:
    """Seeds whose means vary by sd `between`, with prompts of sd `within`; the truth is 0."""
    return [rng.normal(rng.normal(0, between), within, size=(prompts, 1)) for _ in range(seeds)]


# --- pooled means -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seeds", "between", "within"), [(5, 1.0, 0.5), (5, 0.2, 2.0), (3, 1.0, 0.5)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(
    seeds: int, between: float, within: float
) -> None:
    """300 studies: 95 % ± 4 sd of a count of 300 if seeds dominate; prompts drawn on top can only widen."""
    rng = np.random.default_rng(1)
    covered = 0
    for study in range(300):
        found = pooled_means(drawn(rng, seeds, 20, between, within), resamples=300, seed=study)
        covered += found.low[0] <= 0 <= found.high[0]
    assert covered / 300 >= 0.90
    assert covered / 300 <= 0.995


def test_a_plain_bootstrap_over_five_seeds_would_be_too_narrow() -> None:
    """Why deviations between seeds are widened: without that, coverage falls well below 95 %."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        means = np.array([each.mean() for each in drawn(rng, 5, 20, 1.0, 0.1)])
        redrawn = means[rng.integers(5, size=(300, 5))].mean(1)
        low, high = np.quantile(redrawn, [0.025, 0.975])
        covered += low <= 0 <= high
    assert covered / 300 < 0.90


@pytest.mark.parametrize("seeds", [2, 5, 20])
def test_seeds_without_prompt_noise_give_students_interval(seeds: int) -> None:
    means = np.random.default_rng(seeds).normal(size=seeds)
    found = pooled_means([np.full((3, 1), mean) for mean in means], resamples=20_000)
    half = student.ppf(0.975, seeds - 1) * means.std(ddof=1) / math.sqrt(seeds)
    assert found.mean[0] == pytest.approx(means.mean())
    # a sum of few redrawn seeds is not normal: two seeds give three values only
    tolerance = 0.4 if seeds == 2 else 0.12 if seeds == 5 else 0.06
    assert (found.high[0] - found.low[0]) / 2 == pytest.approx(half, rel=tolerance)


def test_one_seed_speaks_for_its_prompts_only() -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, size=(400, 1))
    found = pooled_means([values], resamples=5000)
    se = values.std() / 20
    assert found.mean[0] == pytest.approx(values.mean())
    assert (found.high[0] - found.low[0]) / 2 == pytest.approx(1.96 * se, rel=0.06)
    assert seed_widening(1) == 1.0


def test_columns_of_a_seed_are_redrawn_together() -> None:
    """A difference between two noisy but equal columns plus a constant has no width."""
    rng = np.random.default_rng(3)
    seeds = []
    for _ in range(4):
        noise = rng.normal(size=(30, 1))
        seeds.append(np.hstack([noise, noise + 0.5]))
    found = pooled_means(seeds, resamples=500)
    assert found.low[1] - found.low[0] == pytest.approx(0.5)
    assert found.high[1] - found.high[0] == pytest.approx(0.5)


def test_seeds_count_the_same_however_many_prompts_they_have() -> None:
    found = pooled_means([np.zeros((100, 1)), np.ones((10, 1))], resamples=50)
    assert found.mean[0] == 0.5


def test_nothing_has_no_mean() -> None:
    with pytest.raises(ValueError, match="at least one seed"):
        pooled_means([])
    with pytest.raises(ValueError, match="at least one seed"):
        pooled_means([np.zeros((0, 1))])


def test_one_seed_of_few_prompts_allows_no_claim() -> None:
    """As within a run (`records.verdict`): such an interval leaves out a true 0 in one case of six."""
    few = np.array([1.0, 1.1, 0.9, 1.2, 1.0])
    assert pooled_gain([few])["low"] > 0
    assert pooled_gain([few])["verdict"] == UNCLEAR
    assert pooled_gain([np.tile(few, 2)])["verdict"] == BETTER
    assert pooled_gain([few, few + 0.01, few - 0.01])["verdict"] == BETTER


def test_equal_gains_say_nothing_of_their_spread() -> None:
    """Of S equal seeds a share of up to 1 - 0.025^(1/S) may still be otherwise, as within a run."""
    two = pooled_gain([np.ones(3), np.ones(3)])
    half = 2 * (1 - 0.025**0.5)
    assert (two["low"], two["high"]) == (pytest.approx(1 - half), pytest.approx(1 + half))
    assert two["verdict"] == UNCLEAR
    one = pooled_gain([np.full(200, -2.0)])
    assert (one["high"] - one["low"]) / 2 == pytest.approx(4 * (1 - 0.025 ** (1 / 200)))
    assert one["verdict"] == WORSE
    assert pooled_gain([np.ones(1)])["low"] is pooled_gain([np.ones(1)])["high"] is None
    nothing = pooled_gain([np.zeros(3), np.zeros(3)])
    assert nothing["low"] == nothing["high"] == 0  # as of the reference against itself
    tables = [np.tile([1.0 if "gain" in name else 0.0 for name in COLUMNS], (3, 1)) for _ in range(2)]
    numbers = _numbers(tables, 50)
    assert numbers["gold_gain_low"] == numbers["score_gain_low"] == pytest.approx(1 - half)
    assert numbers["gold_verdict"] == numbers["score_verdict"] == UNCLEAR


def test_two_seeds_have_less_than_students_interval() -> None:
    """A redraw is one of three values: 4.58 times the difference of the seeds' means, and not 6.35."""
    found = pooled_means([np.zeros((3, 1)), np.ones((3, 1))], resamples=4000)
    t = student.ppf(0.975, 1)
    assert (found.high[0] - found.low[0]) / 2 == pytest.approx(t / 1.959964 * math.sqrt(2) / 2, rel=1e-3)
    assert 2 / math.pi * math.atan(t / 1.959964 * math.sqrt(2)) == pytest.approx(0.931, abs=1e-3)  # coverage


def test_verdicts_come_from_intervals_only() -> None:
    ends = [(0.1, 1), (-1, -0.1), (-0.1, 1), (0, 1)]
    assert [pooled_verdict(*each) for each in ends] == [BETTER, WORSE, UNCLEAR, UNCLEAR]


def test_the_number_that_would_be_needed() -> None:
    gains = [0.9, 1.1, 1.0, 0.8, 1.2]
    sd = np.std(gains, ddof=1)
    needed = ((1.959964 + 0.841621) * sd) ** 2
    assert number_needed(gains) == math.ceil(needed)
    assert number_needed(gains, least=2) == max(2, math.ceil(needed))
    noisy = [1.0, -0.8, 0.9, -0.7]
    assert number_needed(noisy) == math.ceil(((1.959964 + 0.841621) * np.std(noisy, ddof=1) / 0.1) ** 2)
    assert [number_needed(few) for few in ([1.0], [1.0, -1.0], [1.0, math.nan])] == [None, None, None]


# --- laws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "fitted"), [(3, False), (4, True)])
def test_two_coefficients_want_four_points_of_training(values: int, fitted: bool) -> None:
    stages = {str(i): f"ppo-{i}" for i in range(values)}
    gains = (
        "gold_gain",
        "score_gain",
        "gold_gain_low",
        "gold_gain_high",
        "score_gain_low",
        "score_gain_high",
    )
    numbers = {
        name: dict.fromkeys(gains, 1.0 + i % 2)
        | {"kl": 1.0 + i, "eos_rate": 1, "length": 9, "collapsed": False}
        for i, name in enumerate(stages.values())
    }
    study = {"seeds": [{"seed": 0, "policies": numbers}], "policies": numbers, "best_of_n": []}
    laws = sweep_records(cast(Design, SimpleNamespace(sweeps={"kl_coef": stages})), study)[0]["laws"]
    assert [laws[name] is not None for name in ("rl_gold", "rl_score")] == [fitted, fitted]


def test_planted_coefficients_come_back() -> None:
    d = np.linspace(0.3, 4, 12)
    best = fit_law("best_of_n", d, d * (1.5 - 0.2 * d))
    tuned = fit_law("rl", d, d * (1.1 - 0.4 * np.log(d)))
    assert best is not None
    assert tuned is not None
    assert (best.alpha, best.beta) == pytest.approx((1.5, 0.2))
    assert (tuned.alpha, tuned.beta) == pytest.approx((1.1, 0.4))
    assert best.r2 == pytest.approx(1)
    assert best.peak == pytest.approx(1.5 / 0.4)
    assert tuned.peak == pytest.approx(math.exp(1.1 / 0.4 - 1))
    for law in (best, tuned):  # the peak is one
        peak = law.peak or 0.0
        around = law([peak - 0.1, peak, peak + 0.1])
        assert around.argmax() == 1


def test_standard_errors_are_the_spread_of_refits() -> None:
    rng, d = np.random.default_rng(0), np.linspace(0.5, 3, 40)
    drawn_fits = [
        fit_law("rl", d, d * (1 - 0.3 * np.log(d)) + rng.normal(0, 0.3, d.size)) for _ in range(400)
    ]
    fits = [fit for fit in drawn_fits if fit is not None]
    alphas, betas = ([getattr(fit, name) for fit in fits] for name in ("alpha", "beta"))
    assert np.mean(alphas) == pytest.approx(1, abs=0.02)
    assert np.mean([fit.alpha_se for fit in fits]) == pytest.approx(np.std(alphas), rel=0.15)
    assert np.mean([fit.beta_se for fit in fits]) == pytest.approx(np.std(betas), rel=0.15)


def test_errors_shared_by_a_seed_widen_the_standard_error() -> None:
    """Twenty seeds, each off by a slope of its own: only the errors by seed tell how far α may be off."""
    rng, d, robust, naive, alphas = np.random.default_rng(0), np.linspace(0.5, 3, 30), [], [], []
    for _ in range(100):
        slopes = rng.normal(0, 0.3, 20)
        x = np.tile(d, 20)
        y = np.concatenate([d * (1 + slope - 0.3 * np.log(d)) for slope in slopes]) + rng.normal(0, 0.01, 600)
        clusters = np.repeat(np.arange(20), 30).tolist()
        by_seed, alone = fit_law("rl", x, y, clusters), fit_law("rl", x, y)
        assert by_seed is not None
        assert alone is not None
        robust.append(by_seed.alpha_se)
        naive.append(alone.alpha_se)
        alphas.append(by_seed.alpha)
    assert np.mean(robust) == pytest.approx(np.std(alphas), rel=0.2)
    assert np.mean(naive) < 0.75 * np.std(alphas)


def test_too_few_points_make_no_law() -> None:
    assert fit_law("rl", [1.0, 1.0], [0.5, 0.6]) is None
    assert fit_law("rl", [0.0, 1.0], [0.0, 0.6]) is None  # d = 0 says nothing: every law is 0 there
    two = fit_law("rl", [1.0, 2.0], [0.5, 0.6])
    assert two is not None
    assert math.isnan(two.alpha_se)


def test_a_law_that_does_not_bend_down_has_no_peak() -> None:
    d = np.array([1.0, 2.0, 3.0])
    rising = fit_law("best_of_n", d, d * (1 + 0.1 * d))
    assert rising is not None
    assert rising.peak is None

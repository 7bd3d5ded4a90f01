"""Evaluation statistics: golden values, other implementations, known cases."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats as scipy_stats

from golden import agree
from preftune.evaluation import stats


def test_golden_entry() -> None:
    agree("evaluation_stats")


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (10, 10), (3, 10), (430, 1000), (1, 1)])
def test_wilson_is_scipys(wins: int, n: int) -> None:
    expected = scipy_stats.binomtest(wins, n).proportion_ci(method="wilson")
    low, high = stats.wilson(wins, n)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= wins / n <= high <= 1


def test_wilson_edges() -> None:
    assert stats.wilson(0, 0) == (0.0, 1.0)
    narrow, wide = stats.wilson(5, 10, z=1.0), stats.wilson(5, 10, z=2.0)
    assert wide.low < narrow.low < 0.5 < narrow.high < wide.high
    for wins, n in ((11, 10), (-1, 10), (1, 0)):
        with pytest.raises(ValueError, match="wins out of"):
            stats.wilson(wins, n)


def test_win_rate_counts_ties_half() -> None:
    assert stats.win_rate([1, 2, 3, 4], [0, 2, 5, 1]) == 0.625
    assert stats.win_rate([1, 2], [1, 2]) == 0.5
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    assert stats.win_rate(a, b) + stats.win_rate(b, a) == pytest.approx(1.0, rel=1e-12)


def test_paired_difference_by_hand() -> None:
    mean, se = stats.paired_difference([1.0, 2.0, 6.0], [0.0, 2.0, 1.0])
    assert mean == 2.0
    assert se == pytest.approx(math.sqrt(7 / 3), rel=1e-12)  # differences 1, 0, 5: variance 7
    assert math.isnan(stats.paired_difference([1.0], [0.0])[1])


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.win_rate([], []),
        lambda: stats.paired_difference([1.0], [1.0, 2.0]),
        lambda: stats.brier([0.5], []),
        lambda: stats.ece([], []),
        lambda: stats.paired_bootstrap([1.0], [1.0, 2.0]),
        lambda: stats.bootstrap_mean([]),
        lambda: stats.holm([0.1, 1.5]),
        lambda: stats.holm([0.1, math.nan]),
        lambda: stats.distinct_n([1, 2], 0),
    ],
)
def test_value_errors(call) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        call()


def test_brier() -> None:
    assert stats.brier([1.0, 0.0], [1, 0]) == 0.0
    assert stats.brier([0.5] * 4, [1, 0, 1, 0]) == 0.25
    assert stats.brier([0.8], [0]) == pytest.approx(0.64, rel=1e-12)


def test_ece_by_hand() -> None:
    # confidences 0.9, 0.9 (one right) and 0.6, 0.6 (both right): 0.5 · |0.5 - 0.9| + 0.5 · |1 - 0.6|
    assert stats.ece([0.9, 0.1, 0.6, 0.4], [1, 1, 1, 0], bins=5) == pytest.approx(0.4, rel=1e-12)
    assert stats.ece([1.0, 0.0], [1, 0]) == 0.0
    assert stats.ece([0.5], [0]) == pytest.approx(
        0.5, rel=1e-12
    )  # one half predicts 0: right at confidence 0.5
    assert stats.ece([0.5], [1]) == pytest.approx(0.5, rel=1e-12)


def test_ece_does_not_depend_on_orientation() -> None:
    rng = np.random.default_rng(0)
    p, label = rng.uniform(size=200), rng.integers(0, 2, size=200)
    flip = rng.integers(0, 2, size=200).astype(bool)
    turned = stats.ece(np.where(flip, 1 - p, p), np.where(flip, 1 - label, label))
    assert turned == pytest.approx(stats.ece(p, label), rel=1e-12)


def test_ece_of_calibrated_predictions_is_small_and_of_others_is_not() -> None:
    rng = np.random.default_rng(1)
    p = rng.uniform(size=20_000)
    label = rng.uniform(size=20_000) < p
    assert stats.ece(p, label) < 0.03
    assert stats.ece(np.where(p > 0.5, 0.99, 0.01), label) > 0.2


def test_ngrams() -> None:
    assert stats.distinct_n([1, 2, 1, 2, 1], 1) == pytest.approx(2 / 5)
    assert stats.distinct_n([1, 2, 1, 2, 1], 2) == pytest.approx(2 / 4)
    assert stats.repetition_n([1, 2, 1, 2, 1], 2) == pytest.approx(2 / 4)
    assert stats.repetition_n([1, 2, 3, 4], 2) == 0.0
    assert stats.distinct_n(["a", "b", "a"], 1) == pytest.approx(2 / 3)
    assert stats.distinct_n(np.array([1, 1, 1]), 1) == pytest.approx(1 / 3)
    for function in (stats.distinct_n, stats.repetition_n):
        assert function([1, 2], 3) == 0.0
        assert function([], 1) == 0.0


def test_corpus_ngrams_do_not_cross_rows() -> None:
    assert stats.corpus_distinct_n([[1, 2], [1, 2]], 2) == 0.5
    assert stats.corpus_distinct_n([[1], [2]], 2) == 0.0
    assert stats.corpus_distinct_n([[1, 2], [2, 1]], 1) == 0.5


def test_bootstrap_mean() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = stats.bootstrap_mean(x, 2000, seed=1)
    half = 1.96 * x.std(ddof=1) / 20
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.15 * half)
    assert stats.bootstrap_mean(x, 2000, seed=1) == (low, high)
    assert stats.bootstrap_mean(x, 2000, seed=2) != (low, high)
    narrow = stats.bootstrap_mean(x, 2000, seed=1, level=0.5)
    assert low < narrow.low < x.mean() < narrow.high < high


def test_bootstrap_mean_always_holds_the_mean() -> None:
    for seed in range(20):
        x = np.random.default_rng(seed).pareto(1.0, size=5)
        low, high = stats.bootstrap_mean(x, 3, seed)
        assert low <= x.mean() <= high
    assert stats.bootstrap_mean([0.1] * 3, 50, 0) == pytest.approx((0.1, 0.1))


def test_paired_bootstrap_against_itself() -> None:
    x = np.random.default_rng(0).normal(size=30)
    result = stats.paired_bootstrap(x, x, 200, 0)
    assert result == (0.0, (0.0, 0.0), 1.0)


def test_paired_bootstrap_sees_a_difference_and_only_a_real_one() -> None:
    rng = np.random.default_rng(0)
    noise, b = rng.normal(size=(2, 100))
    clear = stats.paired_bootstrap(b + 0.5 + noise, b, 2000, 0)
    assert clear.interval.low > 0
    assert clear.p_value < 0.01
    assert clear.mean == pytest.approx((0.5 + noise).mean())
    none = stats.paired_bootstrap(b + noise - noise.mean(), b, 2000, 0)
    assert none.interval.low < 0 < none.interval.high
    assert none.p_value > 0.9
    swapped = stats.paired_bootstrap(b, b + 0.5 + noise, 2000, 0)
    assert swapped.mean == -clear.mean
    assert swapped.p_value == clear.p_value


def test_sign_flip_p_value_is_that_of_all_flips() -> None:
    difference = np.array([1.0, 2.0, 3.0, -0.5, 1.5, 0.7])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
    exact = np.mean(np.abs(difference @ signs) >= abs(difference.sum()) - 1e-9)
    assert stats.sign_flip_test(difference, 20_000, 0) == pytest.approx(exact, abs=0.01)
    assert stats.sign_flip_test(np.ones(50), 99, 0) == 0.01  # 1 / (1 + 99): never 0


def test_holm() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.9]) == [1.0, 1.0]
    assert stats.holm([0.02]) == [0.02]
    assert stats.holm([]) == []


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, preftune.evaluation.stats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

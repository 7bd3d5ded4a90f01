"""Evaluation statistics: golden values, other implementations, known cases."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from golden import agree
from preftune.evaluation import stats
from preftune.evaluation.baselines import power


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


def test_rows_of_a_group_count_together() -> None:
    """Twelve groups of three rows that are alike: variance between groups p (1 - p) / 11, of 36 rows
    p (1 - p) / 36, so that they are worth 11 rows."""
    hits, groups = np.repeat([1, 1, 1, 0, 0, 1] * 2, 3), np.repeat(np.arange(12), 3)
    found = stats.share_by_group(hits, groups)
    assert (found["value"], found["n"]) == (pytest.approx(2 / 3), 36)
    assert found["interval"] == pytest.approx(stats.wilson(22 / 3, 11))
    assert stats.by_group([1, 2, 3, 6], np.array([0, 0, 0, 1])).tolist() == [3, 3]  # of mean 3, as 12 / 4
    assert stats.share_by_group(np.ones(36), groups)["interval"] == list(stats.wilson(12, 12))
    assert stats.share_by_group(hits, np.zeros(36, int))["interval"] == pytest.approx(stats.wilson(2 / 3, 1))
    assert stats.design_effect([1, 0, 1, 0], np.array([0, 0, 1, 1])) == 2  # two groups do not show it


def test_pairs_that_are_alike_are_worth_fewer() -> None:
    tests = [{"baseline": "longer", "difference": 0.1, "model_right_only": 30, "baseline_right_only": 10}]
    alone, alike = power(0.6, 400, tests), power(0.6, 400, tests, 2.0)
    assert alike["chance"]["n_needed"] == 2 * alone["chance"]["n_needed"]
    assert alike["baseline"]["n_needed"] == 2 * alone["baseline"]["n_needed"]
    assert alike["chance"]["detectable"] == power(0.6, 200, tests)["chance"]["detectable"]


def test_where_no_group_has_two_rows_nothing_changes() -> None:
    x = np.random.default_rng(0).normal(size=50)
    for function in (stats.by_group, stats.spread_by_group):
        assert function(x, np.arange(50)[::-1]).tolist() == x.tolist()
    credits = np.where(x > 0, 1.0, 0.5)
    assert stats.share_by_group(credits, np.arange(50)) == stats.share(float(credits.sum()), 50)
    assert stats.share_by_group([], np.array([], int)) == stats.share(0, 0)


def test_an_interval_over_groups_holds_the_mean_where_one_over_rows_does_not() -> None:
    """Groups of 1 to 6 rows that share half of their variance. A 95 % interval misses 5 of 100."""
    rng, missed = np.random.default_rng(0), [0, 0]
    for seed in range(100):
        groups = np.repeat(np.arange(60), rng.choice([1, 3, 6], size=60))
        x = 0.7 + rng.normal(size=60)[groups] / 2**0.5 + rng.normal(size=len(groups)) / 2**0.5
        for i, values in enumerate((stats.spread_by_group(x, groups), x)):
            low, high = stats.bootstrap_mean(values, 200, seed)
            missed[i] += not low <= 0.7 <= high
    assert missed[0] <= 12 < missed[1]


def test_what_is_not_known_is_no_loss() -> None:
    assert math.isnan(stats.win_rate([math.nan, 1], [0, 0]))
    assert math.isnan(stats.win_rate([0, 0], [1, math.nan]))
    assert stats.win_rate([math.inf, -math.inf], [math.inf, 0]) == 0.25
    assert math.isnan(stats.brier([math.nan], [1]))


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
        lambda: stats.wilson(1, 3, z=-1.0),
        lambda: stats.brier([1.5], [1]),
        lambda: stats.brier([0.5], [-1]),
        lambda: stats.ece([0.5, -0.1], [1, 0]),
        lambda: stats.ece([0.5], [2]),
        lambda: stats.ece([0.5], [1], bins=0),
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


def test_bootstrap_mean() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = stats.bootstrap_mean(x, 2000, seed=1)
    half = 1.96 * x.std(ddof=1) / 20
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.15 * half)
    assert stats.bootstrap_mean(x, 2000, seed=1) == (low, high)
    assert stats.bootstrap_mean(x, 2000, seed=2) != (low, high)


def test_bootstrap_mean_always_holds_the_mean() -> None:
    for seed in range(20):
        x = np.random.default_rng(seed).pareto(1.0, size=5)
        low, high = stats.bootstrap_mean(x, 3, seed)
        assert low <= x.mean() <= high


def test_paired_bootstrap_against_itself() -> None:
    x = np.random.default_rng(0).normal(size=30)
    result = stats.paired_bootstrap(x, x, 200, 0)
    assert result == (0.0, (-np.inf, np.inf), 1.0)  # values all the same say nothing of their spread


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


# -- reward-model audit and best-of-n -----------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(0, 0), (5, 1), (1, 5), (20, 33), (400, 300)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(a: int, b: int) -> None:
    expected = scipy_stats.binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
    assert stats.mcnemar_exact(a, b) == pytest.approx(expected, rel=1e-9)


def test_best_of_weights_are_the_shares_of_subsets() -> None:
    """All subsets of 3 out of 6, counted by hand: which element is the largest of each?"""
    largest = [max(subset) for subset in itertools.combinations(range(6), 3)]
    expected = [largest.count(i) / len(largest) for i in range(6)]
    assert stats.best_of_weights(3, 6) == pytest.approx(expected)
    assert stats.best_of_weights(1, 4) == pytest.approx([0.25] * 4)
    assert stats.best_of_weights(4, 4) == pytest.approx([0, 0, 0, 1])
    for n in (0, 5):
        with pytest.raises(ValueError, match="from 4"):
            stats.best_of_weights(n, 4)


def test_pairs_needed_by_hand() -> None:
    """((1.95996 * 0.5 + 0.84162 * sqrt(0.24)) / 0.1)² = (0.97998 + 0.41231)² / 0.01 = 193.8."""
    assert stats.pairs_needed(0.6) == 194
    assert stats.pairs_needed(0.5) is None
    assert stats.pairs_needed(0.4) is None
    # 30 and 10 of 100: d = 0.4, g = 0.2; (1.95996 * 0.63246 + 0.84162 * 0.6)² / 0.04 = 76.1
    assert stats.paired_pairs_needed(30, 10, 100) == 77
    assert stats.paired_pairs_needed(10, 30, 100) is None


def test_columns_are_bootstrapped_with_the_same_rows() -> None:
    x = np.random.default_rng(0).normal(size=(50, 2))
    both = stats.bootstrap_columns(np.stack([x[:, 0], 2 * x[:, 0] + 1], axis=1), 500, seed=1)
    assert both[0] == pytest.approx(stats.bootstrap_mean(x[:, 0], 500, seed=1), abs=1e-12)
    assert both[1].low == pytest.approx(2 * both[0].low + 1)  # other rows would give another interval


def test_a_statistic_of_resampled_rows() -> None:
    x = np.random.default_rng(0).normal(size=80)
    low, high = stats.bootstrap_statistic(lambda rows: x[rows].mean(), len(x), 2000, seed=3)
    plain = stats.bootstrap_mean(x, 2000, seed=3)
    assert plain.low <= low < x.mean() < high <= plain.high
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 80**0.5, rel=0.05)
    assert stats.bootstrap_statistic(lambda rows: float("nan"), 5, 10, 0) == (-np.inf, np.inf)


def test_a_statistic_is_redrawn_by_groups() -> None:
    """Each value twice: 80 rows are worth the 40 groups that they are of."""
    x, groups = np.repeat(np.random.default_rng(0).normal(size=40), 2), np.repeat(np.arange(40)[::-1], 2)
    low, high = stats.bootstrap_statistic(lambda rows: x[rows].mean(), 80, 2000, 3, groups)
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 40**0.5, rel=0.05)
    sizes: list[int] = []
    stats.bootstrap_statistic(
        lambda rows: sizes.append(len(rows)) or 0.0, 3, 60, 0, np.array([0, 1, 1])
    )  # the row of its own twice, one of each, or the two rows twice
    assert set(sizes) == {2, 3, 4}
    alone = [
        stats.bootstrap_statistic(lambda r: x[r].mean(), 80, 50, 1, g) for g in (None, np.arange(80)[::-1])
    ]
    assert alone[0] == alone[1]


def test_a_statistic_that_no_redraw_changes_has_no_interval() -> None:
    """Two points lie on a line, whatever they are: a correlation of 1 that shows nothing."""
    x, y = np.array([1.0, 2.0]), np.array([3.0, 5.0])
    interval = stats.bootstrap_statistic(
        lambda rows: np.corrcoef(x[rows], y[rows])[0, 1] if x[rows].std() else np.nan, 2, 2000, 0
    )
    assert interval == (-np.inf, np.inf)


@pytest.mark.parametrize("values", [[0.7], [0.0] * 3, [1.0, np.nan, 2.0], [1.0, np.inf, 2.0]])
def test_values_that_say_nothing_of_their_spread_have_no_interval(values: list[float]) -> None:
    assert stats.bootstrap_mean(values, 50, 0) == (-np.inf, np.inf)


def test_equal_values_may_still_have_been_luck() -> None:
    """Clopper and Pearson: 60 of 60 leave up to 1 - 0.025^(1/60) = 5.96 % for the others."""
    assert stats.bootstrap_mean([-1.0] * 60, 50, 0) == pytest.approx((-1.1192, -0.8808), abs=1e-4)
    low, high = stats.bootstrap_mean([0.5] * 5, 50, 0)
    assert low < 0 < high


def test_values_are_equal_but_for_rounding() -> None:
    """Of two policies that differ by the same 0.1 on every prompt; and where a sum over groups rounds."""
    b = np.array([0.2, 1, 2, 3, 5, 7, 11, 13, 17, 19, 23, 29])
    interval = stats.paired_bootstrap(b + 0.1, b, 50, 0).interval
    assert interval == pytest.approx(stats.bootstrap_mean([0.1] * 12, 50, 0), rel=1e-6)
    assert interval.high - interval.low > 0.1
    assert not stats.equal_values(np.array([[1.0, np.inf], [1.0 + 1e-6, np.inf]])).any()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_never_significant(wrong: float) -> None:
    result = stats.paired_bootstrap([wrong] + [0.0] * 19, [0.0] * 20)
    assert result.p_value == 1.0
    assert result.interval == (-np.inf, np.inf)


@pytest.mark.parametrize(
    ("n", "skewed", "least"), [(5, False, 0.93), (10, False, 0.93), (10, True, 0.91), (30, True, 0.92)]
)
def test_intervals_hold_the_mean_in_small_samples(n: int, skewed: bool, least: float) -> None:
    """Plain percentiles hold it in 84 % (n = 5) and 90 % (n = 10) of normal samples, 85 % of exponential."""
    rng = np.random.default_rng(4)
    held = 0
    for i in range(600):
        x = rng.exponential(size=n) - 1 if skewed else rng.normal(size=n)
        low, high = stats.bootstrap_mean(x, 400, i)
        held += low <= 0 <= high
    assert held / 600 > least

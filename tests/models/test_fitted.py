"""The head that a reward model begins with where it is fitted first."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from preftune.models.fitted import FOLDS, PENALTIES, fit_head


def told(n: int, d: int, seed: int, noise: float = 1.0) -> np.ndarray:
    """Differences (n, d) of pairs: numbers of several sizes, of which some tell the chosen response."""
    random = np.random.default_rng(seed)
    true = random.normal(size=d) * (np.arange(d) < d // 2)
    x = random.normal(size=(n, d)) * np.geomspace(0.01, 100, d)
    right = x / np.geomspace(0.01, 100, d) @ true + noise * random.logistic(size=n) > 0
    return np.where(right[:, None], x, -x)


def test_the_head_is_that_of_a_logistic_regression() -> None:
    """scikit-learn's, of the pairs both ways round, at the penalty that was chosen."""
    x = told(400, 6, 0)
    found = fit_head(x, [str(i).encode() for i in range(400)])
    spread = np.sqrt((x**2).mean(0))
    theirs = LogisticRegression(C=1 / (found.penalty * 800), fit_intercept=False, tol=1e-10, max_iter=1000)
    theirs.fit(np.vstack([x, -x]) / spread, [1] * 400 + [0] * 400)
    assert found.weight * spread == pytest.approx(theirs.coef_[0], abs=2e-3)


def test_the_penalty_is_that_of_the_least_loss_on_pairs_not_seen() -> None:
    """Weak where pairs tell much; where they tell nothing, so strong that the loss is that of a coin."""
    clear = fit_head(told(600, 6, 1, noise=0.1), [str(i).encode() for i in range(600)])
    blind = fit_head(np.random.default_rng(3).normal(size=(60, 40)), [str(i).encode() for i in range(60)])
    assert clear.penalty < 0.01
    assert clear.loss < 0.3
    assert clear.accuracy > 0.85
    assert blind.penalty == PENALTIES[0]
    assert blind.loss == pytest.approx(np.log(2), abs=0.01)


def test_pairs_of_one_prompt_are_never_on_both_sides() -> None:
    """Each of 30 prompts has ten times the same pair, of which nothing is true of another prompt's."""
    x = np.repeat(np.random.default_rng(3).normal(size=(30, 40)), 10, axis=0)
    apart = fit_head(x, [str(i // 10).encode() for i in range(300)])
    mixed = fit_head(x, [str(i).encode() for i in range(300)])
    assert apart.penalty == PENALTIES[0]
    assert apart.loss > 0.65
    assert mixed.loss < 0.5


def test_with_few_prompts_the_penalty_is_the_strongest() -> None:
    found = fit_head(told(40, 6, 4), [str(i % (FOLDS - 1)).encode() for i in range(40)])
    assert found.penalty == PENALTIES[0]
    assert np.abs(found.weight).max() > 0


def test_a_number_that_never_differs_has_no_weight() -> None:
    x = told(100, 6, 5)
    x[:, 2] = 0.0
    assert fit_head(x, [str(i).encode() for i in range(100)]).weight[2] == 0

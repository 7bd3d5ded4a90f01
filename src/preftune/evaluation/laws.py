"""The laws of reward over-optimisation (Gao, Schulman & Hilton 2022, arXiv:2210.10760, eqs. 1 and 2).

With d = √KL(policy || initial policy), the gain over the initial policy is
    best-of-n:  R(d) = d (α - β d)          RL:  R(d) = d (α - β log d)
for the gold score; α says how fast it rises, β how soon it bends. Both are linear in (α, β).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Kind = Literal["best_of_n", "rl"]
LEAST_POINTS = 4  # of training that a law is fitted to: two for each of its coefficients
FORMULAS: dict[Kind, str] = {"best_of_n": "d (alpha - beta d)", "rl": "d (alpha - beta log d)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """Fitted coefficients. `errors` says what the standard errors rest on; NaN where the points give none."""

    kind: Kind
    alpha: float
    beta: float
    alpha_se: float
    beta_se: float
    n: int
    r2: float  # 1 - residual / total sum of squares about 0: the law has no constant
    errors: str

    def __call__(self, d: ArrayLike) -> NDArray[np.float64]:
        """The gain at distances d > 0."""
        return _design(self.kind, np.asarray(d, dtype=float)) @ np.array([self.alpha, self.beta])

    @property
    def peak(self) -> float | None:
        """The distance from which on more optimisation loses gold; None where the law does not bend down."""
        if self.beta <= 0:
            return None
        if self.kind == "best_of_n":
            return self.alpha / (2 * self.beta) if self.alpha > 0 else None
        return math.exp(min(self.alpha / self.beta - 1, 700))


def fit_law(kind: Kind, d: ArrayLike, gain: ArrayLike, cluster: Sequence[int] | None = None) -> Law | None:
    """Least squares of the gains at distances d > 0; None from fewer than two different distances.

    `cluster` numbers what points share (their seed): with two or more clusters the standard errors are robust
    to any correlation within a cluster (the sandwich of Liang & Zeger 1986, times C / (C - 1)). Without, they
    are those of independent points.
    """
    x, y = np.asarray(d, dtype=float), np.asarray(gain, dtype=float)
    usable = (x > 0) & np.isfinite(x) & np.isfinite(y)
    groups = np.zeros(len(x), dtype=int) if cluster is None else np.asarray(cluster)
    x, y, groups = x[usable], y[usable], groups[usable]
    if len(np.unique(x)) < 2:
        return None
    design = _design(kind, x)
    inverse = np.linalg.pinv(design.T @ design)
    coefficients = inverse @ design.T @ y
    residual = y - design @ coefficients
    clusters = np.unique(groups)
    if len(clusters) >= 2:
        scores = np.stack([design[groups == g].T @ residual[groups == g] for g in clusters])
        covariance = inverse @ (scores.T @ scores) @ inverse * len(clusters) / (len(clusters) - 1)
        errors = f"robust to correlation within each of {len(clusters)} seeds"
    else:
        freedom = len(y) - 2
        variance = float(residual @ residual) / freedom if freedom > 0 else math.nan
        covariance = variance * inverse
        errors = "of independent points, which points of one seed are not: too small"
    se = np.sqrt(np.diag(covariance))
    total = float(y @ y)
    return Law(
        kind=kind,
        alpha=float(coefficients[0]),
        beta=float(coefficients[1]),
        alpha_se=float(se[0]),
        beta_se=float(se[1]),
        n=len(y),
        r2=1 - float(residual @ residual) / total if total > 0 else math.nan,
        errors=errors,
    )


def _design(kind: Kind, d: NDArray[np.float64]) -> NDArray[np.float64]:
    """The columns that α and β multiply: (n, 2)."""
    return np.stack([d, -d * d if kind == "best_of_n" else -d * np.log(d)], axis=-1)

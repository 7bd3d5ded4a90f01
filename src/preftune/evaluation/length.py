"""Better, or only longer? Win rate and gain with the length of responses held equal."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from preftune.config import EvaluationConfig
from preftune.evaluation import stats
from preftune.evaluation.policy import Row

METHOD = (
    "win rate: logistic regression of the win on tanh(length difference / its sd), read at equal lengths; "
    "gain: against the mean of several reference responses to the same prompt; at equal length, of those of "
    "its length, give or take 10 % or 2 tokens"
)
SOURCE = (
    "Dubois et al. 2024 (arXiv:2404.04475), without the term for the difficulty of instructions; "
    "Singhal et al. 2023 (arXiv:2310.03716) for gains at matched length"
)
CALIPER, MIN_TOKENS = 0.1, 2
SIDE, LEAST = 0.1, 5  # share and number of comparisons that are needed on either side of equal length
NOT_IDENTIFIED = "not identified at these lengths: nearly all responses are longer, or nearly all shorter"
RIDGE = 0.01  # keeps the fit finite where every comparison is won
STEPS, BLOCK = 25, 200  # Newton steps at most; resamples fitted at a time


def length_controlled(
    rows: Sequence[Row], reference: Sequence[Row], pool: Sequence[Row], settings: EvaluationConfig, seed: int
) -> dict[str, Any]:
    """`rows` and `reference`: one response a prompt; `pool`: several of the reference to every prompt."""
    wins = stats.wins([row["score"] for row in rows], [row["score"] for row in reference])
    longer = np.array([a["length"] - b["length"] for a, b in zip(rows, reference, strict=True)], dtype=float)
    n = len(wins)
    return {
        "method": METHOD,
        "source": SOURCE,
        "win_rate": {**controlled_win_rate(wins, longer, settings.resamples, seed), "n": n},
        **matched_gain(rows, pool, settings.resamples, seed),
    }


def controlled_win_rate(wins: np.ndarray, longer: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """σ(θ) of P(win) = σ(θ + φ tanh(Δlength / sd)): the win rate at equal lengths, bootstrapped over prompts.

    `wins` 0, ½ or 1, `longer` the difference in tokens, (n,) each. The interval is nowhere narrower than
    Wilson's of that rate: wins that are all alike have no spread to redraw. Not known, null with a reason,
    unless a tenth of the comparisons and at least five lie on either side of equal length: the rate there
    would be read off the curve outside the data.
    """
    enough = max(SIDE * len(longer), LEAST)
    if min((longer >= 0).sum(), (longer <= 0).sum()) < enough:
        return {"value": None, "interval": None, "reason": NOT_IDENTIFIED}
    sd = longer.std()
    x = np.tanh(longer / sd) if sd > 0 else np.zeros_like(longer)
    x = np.stack([np.ones_like(x), x], axis=1)  # (n, 2)
    value = float(_fit(x, wins, np.ones((1, len(wins))))[0])
    rng = np.random.default_rng(seed)
    rates: list[float] = []
    for start in range(0, resamples, BLOCK):
        count = min(BLOCK, resamples - start)
        rates += _fit(x, wins, rng.multinomial(len(wins), np.full(len(wins), 1 / len(wins)), count)).tolist()
    low, high = np.quantile(rates, [0.025, 0.975])
    least = stats.wilson(value * len(wins), len(wins))
    return {"value": value, "interval": [float(min(low, least.low)), float(max(high, least.high))]}


def _fit(x: np.ndarray, wins: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """σ(θ) of the ridge logistic regression under each row of weights (R, n), by Newton's method: (R,)."""
    beta = np.zeros((len(weights), 2))
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-np.clip(beta @ x.T, -30, 30)))  # (R, n)
        slope = (weights * (wins - p)) @ x - RIDGE * beta
        curvature = np.einsum("rn,ni,nj->rij", weights * p * (1 - p), x, x) + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, slope[:, :, None])[:, :, 0]
        beta += np.clip(step, -2, 2)  # far from the optimum a full Newton step can overshoot
        if np.abs(step).max() < 1e-10:
            break
    return 1 / (1 + np.exp(-beta[:, 0]))


def matched_gain(rows: Sequence[Row], pool: Sequence[Row], resamples: int, seed: int) -> dict[str, Any]:
    """The gain in score over the reference, and what is left of it at equal length; prompts whose response
    has no reference response of its length are left out of both. The share is null unless there is a gain.
    """
    size = len(pool) // len(rows)
    scores = np.array([row["score"] for row in pool]).reshape(len(rows), size)
    lengths = np.array([row["length"] for row in pool]).reshape(len(rows), size)
    policy_scores = np.array([row["score"] for row in rows])
    length = np.array([row["length"] for row in rows])
    near = np.abs(lengths - length[:, None]) <= np.maximum(MIN_TOKENS, CALIPER * length)[:, None]
    matchable = near.any(1)
    if not matchable.any():
        return {"gain": None, "gain_length_matched": None, "share_surviving": None, "n": 0}
    policy_scores, scores, near = policy_scores[matchable], scores[matchable], near[matchable]
    gain = policy_scores - scores.mean(1)
    matched = policy_scores - (scores * near).sum(1) / near.sum(1)
    intervals = stats.bootstrap_columns(np.stack([gain, matched], axis=1), resamples, seed)
    share = None
    if intervals[0].low > 0:
        interval = stats.bootstrap_statistic(
            lambda drawn: matched[drawn].mean() / gain[drawn].mean(), len(gain), resamples, seed
        )
        share = {"value": float(matched.mean() / gain.mean()), "interval": list(interval)}
    return {
        "gain": {"mean": float(gain.mean()), "interval": list(intervals[0]), "n": len(gain)},
        "gain_length_matched": {
            "mean": float(matched.mean()),
            "interval": list(intervals[1]),
            "n": len(gain),
        },
        "share_surviving": share,
        "n": len(gain),
    }

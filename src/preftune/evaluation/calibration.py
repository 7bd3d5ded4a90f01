"""Is σ(margin) a probability? Brier score, calibration error, reliability diagram and fitted temperature."""

import random
from typing import Any

import numpy as np

from preftune.evaluation import stats
from preftune.seeding import derive_seed

BINS = 10
MIN_PAIRS = 20  # fewer cannot be cut into two halves that say anything about a temperature


def calibration(
    margins: np.ndarray, seed: int, resamples: int = 2000, prompts: stats.Groups | None = None
) -> dict[str, Any]:
    """The keys brier, ece, reliability and temperature of evaluation/reward_model.json. `prompts`: those of
    the pairs; None where each has its own.
    """
    label, probability = oriented(margins, seed)
    groups = np.arange(len(margins)) if prompts is None else prompts
    return {
        "brier": stats.brier(probability, label),
        "brier_interval": stats.mean((probability - label) ** 2, resamples, seed, groups)["interval"],
        "ece": stats.ece(probability, label, BINS),
        "ece_if_calibrated": ece_if_calibrated(probability, resamples, seed, groups),
        "reliability": reliability(probability, label, groups),
        "temperature": temperature(margins, seed, resamples, groups),
    }


def ece_if_calibrated(probability: np.ndarray, resamples: int, seed: int, groups: stats.Groups) -> float:
    """The calibration error that so few pairs would show, 19 times in 20 at most, were each exactly as likely
    to be right as the model says. An error below it is no sign of miscalibration: it is never 0 by chance.

    `groups`: the prompts. Pairs of one prompt are drawn right and wrong together, the most that they can
    depend on each other.
    """
    rng = np.random.default_rng(derive_seed(seed, "calibrated"))
    prompts, prompt_of = np.unique(groups, return_inverse=True)
    prediction, confidence = probability > 0.5, np.maximum(probability, 1 - probability)

    def label() -> np.ndarray:
        if len(prompts) == len(probability):
            return rng.random(len(probability)) < probability
        return (rng.random(len(prompts))[prompt_of] < confidence) == prediction

    drawn = [stats.ece(probability, label(), BINS) for _ in range(resamples)]
    return float(np.quantile(drawn, 0.95))


def oriented(margins: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and σ(margin) with each pair turned at random: always chosen first would make every label 1."""
    rng = random.Random(derive_seed(seed, "orientation"))
    sign = np.array([rng.choice((-1.0, 1.0)) for _ in margins])
    return (sign > 0).astype(float), sigmoid(sign * margins)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def reliability(
    probability: np.ndarray, label: np.ndarray, groups: stats.Groups | None = None
) -> list[dict[str, Any]]:
    """How often the model is right where it is so sure: one record per part of [0.5, 1], as `stats.ece` cuts.
    `groups` are the prompts.

    Guo et al. 2017 (arXiv:1706.04599), figure 1.
    """
    confidence, correct, bin_of = stats.by_confidence(probability, label, BINS)
    edges, groups = np.linspace(0.5, 1, BINS + 1), np.arange(len(label)) if groups is None else groups
    records = []
    for i in range(BINS):
        rows = bin_of == i
        n, accuracy = int(rows.sum()), stats.share_by_group(correct[rows], groups[rows])
        records.append(
            {
                "low": float(edges[i]),
                "high": float(edges[i + 1]),
                "n": n,
                "confidence": float(confidence[rows].mean()) if n else None,
                "accuracy": accuracy["value"],
                "interval": accuracy["interval"],
            }
        )
    return records


def temperature(
    margins: np.ndarray, seed: int, resamples: int = 2000, groups: stats.Groups | None = None
) -> dict[str, Any] | None:
    """The T of σ(margin / T) with the least loss, and the loss before and after. None for very few pairs.

    `nll_after` is cross-fitted: each half of the pairs is judged with the T of the other, so that fitting
    cannot look like an improvement where there is none; `nll_gain` is before minus after, by pairs, with an
    interval over prompts (`groups`). T is infinite where no margin is better than a coin.
    """
    if len(margins) < MIN_PAIRS:
        return None
    order = np.random.default_rng(derive_seed(seed, "temperature")).permutation(len(margins))
    by_half = np.concatenate([order[::2], order[1::2]])
    halves = margins[order[::2]], margins[order[1::2]]
    before = nll(np.concatenate(halves))
    after = np.concatenate([nll(ours * _best_scale(theirs)) for ours, theirs in (halves, halves[::-1])])
    gain = before - after
    scale = _best_scale(margins)
    return {
        "value": 1 / scale if scale > 0 else float("inf"),
        "nll_before": float(before.mean()),
        "nll_after": float(after.mean()),
        "nll_gain": stats.mean(gain, resamples, seed, None if groups is None else groups[by_half]),
        "nll_coin": float(np.log(2)),
        "n": len(margins),
    }


def nll(margins: np.ndarray) -> np.ndarray:
    """-log σ(margin), elementwise, in nats: the Bradley-Terry loss of a pair."""
    return np.logaddexp(0.0, -margins)


def _best_scale(margins: np.ndarray) -> float:
    """The 1 / T >= 0 that minimises the mean loss of σ(margin / T), a convex problem of one number."""
    from scipy.optimize import brentq  # slow to import; only an evaluation fits anything

    def slope(scale: float) -> float:
        return float(-(margins * sigmoid(-scale * margins)).mean())

    if slope(0.0) >= 0:  # scaling up only harms: at best the margins say nothing
        return 0.0
    high = 1.0
    while slope(high) < 0 and high < 1e6:  # all pairs in the right order: the surer the better
        high *= 4
    root: Any = brentq(slope, 0.0, high) if slope(high) > 0 else high
    return float(root)

"""Best-of-n of the reference: what its reward model can get out of it without any training.

One pool of responses to every prompt serves all n: the mean over all subsets of n responses is computed, not
sampled.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from preftune.config import EvaluationConfig
from preftune.evaluation import stats
from preftune.evaluation.policy import Row

ESTIMATOR = (
    "mean over all subsets of n of the sampled responses to a prompt, the response with the highest score of "
    "each subset; intervals by bootstrap over prompts"
)
SOURCE = (
    "as pass@k in Chen et al. 2021 (arXiv:2107.03374), eq. 1; KL: Stiennon et al. 2020 (arXiv:2009.01325)"
)


def kl_formula(n: int) -> float:
    """An upper bound on the KL of best-of-n (Stiennon et al. 2020): ln n - (n - 1)/n, in nats."""
    return math.log(n) - (n - 1) / n


def best_of(pool: Sequence[Row], n: int, size: int) -> list[Row]:
    """Of each prompt's `size` responses the one with the highest score among the first `n`, the first among
    equals.
    """
    groups = [pool[i : i + n] for i in range(0, len(pool), size)]
    return [max(group, key=lambda row: row["score"]) for group in groups]


def not_picked_from(pool: Sequence[Row], n: int, size: int) -> list[Row]:
    """The responses to each prompt that `best_of` did not choose from: what it may be held against."""
    return [row for i in range(0, len(pool), size) for row in pool[i + n : i + size]]


def over_subsets(scores: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """From a value of each response (prompts, size) to its mean over all subsets of n = 1..size, of each the
    response with the highest score: (prompts, n).
    """
    size, order = scores.shape[1], scores.argsort(axis=1, kind="stable")
    weights = np.stack([stats.best_of_weights(n, size) for n in range(1, size + 1)], axis=1)  # (size, n)
    return lambda values: np.take_along_axis(values, order, axis=1) @ weights


def curve(pool: Sequence[Row], size: int, settings: EvaluationConfig, seed: int) -> list[dict[str, Any]]:
    """Score, gold and held-out score of best-of-n for n = 1..size, chosen by score each time."""
    best_by = over_subsets(_by_prompt(pool, "score", size))
    columns: dict[str, list[dict[str, Any]] | None] = {}
    for name in ("score", "gold", "held_out"):
        if pool[0].get(name) is None:
            columns[name] = None
            continue
        best = best_by(_by_prompt(pool, name, size))
        intervals = stats.bootstrap_columns(best, settings.resamples, seed)
        columns[name] = [
            {"mean": float(mean), "interval": list(interval), "n": len(best)}
            for mean, interval in zip(best.mean(0), intervals, strict=True)
        ]
    return [
        {"n": n, "kl_formula": kl_formula(n)}
        | {name: None if column is None else column[n - 1] for name, column in columns.items()}
        for n in range(1, size + 1)
    ]


def _by_prompt(pool: Sequence[Row], key: str, size: int) -> np.ndarray:
    """(prompts, size)"""
    return np.array([row[key] for row in pool], dtype=float).reshape(-1, size)

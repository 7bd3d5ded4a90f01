"""The curve of best-of-n against brute force over all subsets."""

import itertools
import math
import random
from typing import Any

import pytest

from preftune.config import EvaluationConfig
from preftune.evaluation.best_of_n import best_of, curve, kl_formula, not_picked_from

SIZE, PROMPTS = 5, 3


def pool() -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {"row": i // SIZE, "score": rng.gauss(0, 1), "gold": rng.gauss(0, 1), "held_out": None}
        for i in range(SIZE * PROMPTS)
    ]


def test_the_curve_is_the_mean_over_all_subsets() -> None:
    rows = pool()
    found = curve(rows, SIZE, EvaluationConfig(resamples=50), seed=0)
    assert [each["n"] for each in found] == [1, 2, 3, 4, 5]
    for n, each in enumerate(found, start=1):
        for name in ("score", "gold"):
            best = [
                max(subset, key=lambda row: row["score"])[name]
                for i in range(PROMPTS)
                for subset in itertools.combinations(rows[i * SIZE : (i + 1) * SIZE], n)
            ]
            assert each[name]["mean"] == pytest.approx(sum(best) / len(best), abs=1e-12)
            assert each[name]["interval"][0] <= each[name]["mean"] <= each[name]["interval"][1]
        assert each["held_out"] is None


def test_its_kl_is_the_formula() -> None:
    assert kl_formula(1) == 0
    assert kl_formula(16) == pytest.approx(math.log(16) - 15 / 16)


def test_best_of_n_takes_from_the_first_n_of_each_prompt() -> None:
    rows = [{"score": s} for s in (1, 5, 9, 2, 2, 0)]
    assert [row["score"] for row in best_of(rows, 2, 3)] == [5, 2]
    assert best_of(rows, 2, 3)[1] is rows[3]  # the first among equals


def test_what_was_not_picked_from_is_the_rest_of_each_prompt() -> None:
    rows = [{"score": s} for s in range(6)]
    assert not_picked_from(rows, 2, 3) == [rows[2], rows[5]]
    assert not_picked_from(rows, 3, 3) == []

"""Which replies become pairs, and which of two is chosen; numbers by hand."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from preftune.data.dialogue import Dialogue, Turn
from preftune.data.pairing import Pair, Rule, best_reachable, pairs_of, prompt_of, reply_of

TEXTS = ("a", "b", "c", "d")


def rule(**changes: Any) -> Rule:
    values: dict[str, Any] = {"pairing": "best_worst", "ties": "drop", "tie_margin": 0.0, "temperature": None}
    return Rule(**{**values, **changes})


def places(made: Sequence[Pair | None]) -> list[tuple[int, int] | None]:
    return [None if pair is None else (pair.chosen, pair.rejected) for pair in made]


def test_the_best_is_chosen_and_the_worst_rejected() -> None:
    assert places(pairs_of(TEXTS, [1.0, 3.0, -2.0, 0.0], rule(), seed=0)) == [(1, 2)]


def test_all_pairs_are_labelled_by_the_higher_score() -> None:
    made = pairs_of(TEXTS[:3], [1.0, 3.0, 1.0], rule(pairing="all"), seed=0)
    assert places(made) == [(1, 0), None, (1, 2)]  # the first and the third are a tie


def test_one_random_pair_comes_of_the_seed() -> None:
    def drawn(seed: int) -> set[int]:
        (pair,) = pairs_of(TEXTS, [0.0, 1.0, 2.0, 3.0], rule(pairing="random"), seed)
        assert pair is not None
        assert pair.chosen > pair.rejected
        return {pair.chosen, pair.rejected}

    assert drawn(5) == drawn(5)
    assert len({frozenset(drawn(seed)) for seed in range(100)}) == 6


def test_scores_within_the_margin_are_a_tie_and_equal_texts_are_no_pair() -> None:
    assert places(pairs_of(("a", "b"), [1.0, 1.5], rule(tie_margin=0.5), seed=0)) == [None]
    assert places(pairs_of(("a", " a "), [1.0, 9.0], rule(), seed=0)) == [None]


def test_a_tie_is_labelled_by_a_fair_coin_if_asked() -> None:
    made = [pairs_of(("a", "b"), [1.0, 1.0], rule(ties="random"), seed)[0] for seed in range(2000)]
    first = sum(pair is not None and pair.chosen == 0 for pair in made)
    assert abs(first / 2000 - 0.5) < 4 * math.sqrt(0.25 / 2000)
    assert best_reachable([pair for pair in made if pair]) == 0.5


def test_noise_is_that_of_bradley_and_terry_at_the_stated_temperature() -> None:
    """Scores 2 apart at temperature 2: the better one is chosen with sigmoid(1) = 0.7311."""
    made = [pairs_of(("a", "b"), [0.0, 2.0], rule(temperature=2.0), seed)[0] for seed in range(4000)]
    known = [pair for pair in made if pair is not None]
    better = sum(pair.chosen == 1 for pair in known)
    assert abs(better / 4000 - 0.7311) < 4 * math.sqrt(0.7311 * 0.2689 / 4000)
    assert best_reachable(known) == pytest.approx(0.731059, abs=1e-6)


def test_without_noise_the_best_is_perfect_and_scores_far_apart_do_not_overflow() -> None:
    (pair,) = pairs_of(("a", "b"), [0.0, 1e6], rule(temperature=0.01), seed=0)
    assert pair == Pair(1, 0, 1.0)
    assert best_reachable([pair]) == 1.0
    assert best_reachable([]) is None


def test_rows_are_written_as_trl_takes_them() -> None:
    asked = Dialogue([Turn("system", " Be kind."), Turn("human", " Hi "), Turn("assistant", " Yes?")])
    assert prompt_of(asked, plain=False) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
    ]
    assert prompt_of(Dialogue([Turn("human", " A film")]), plain=True) == "A film"
    assert reply_of(" Good. ", plain=False) == [{"role": "assistant", "content": "Good."}]
    assert reply_of(" Good. ", plain=True) == " Good. "

"""How varied many responses are together."""

from itertools import combinations

import numpy as np
import pytest

from preftune.evaluation.variety import corpus_distinct_n, rarefied_distinct_n


def test_corpus_ngrams_do_not_cross_rows() -> None:
    assert corpus_distinct_n([[1, 2], [1, 2]], 2) == 0.5
    assert corpus_distinct_n([[1], [2]], 2) == 0.0
    assert corpus_distinct_n([[1, 2], [2, 1]], 1) == 0.5


def test_rarefied_is_what_drawn_groups_have_on_average() -> None:
    """Groups of one size, so that the mean over all draws is the ratio of both means."""
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 3, (6, 2, 5)).tolist()
    for size in (1, 2, 4):
        drawn = [
            corpus_distinct_n([row for group in some for row in group], 2)
            for some in combinations(groups, size)
        ]
        assert rarefied_distinct_n(groups, 2, size) == pytest.approx(float(np.mean(drawn)))


def test_rarefied_does_not_fall_as_text_grows() -> None:
    """Ten times the prompts of one source: distinct-2 of all falls by half, that of forty prompts stays."""
    rng = np.random.default_rng(1)
    many = [[rng.zipf(1.5, 20).clip(max=99).tolist()] for _ in range(400)]
    few = many[:40]
    all_of_few, all_of_many = (corpus_distinct_n([row for (row,) in rows], 2) for rows in (few, many))
    assert all_of_many < 0.55 * all_of_few
    assert rarefied_distinct_n(few, 2, 40) == all_of_few
    assert rarefied_distinct_n(many, 2, 40) == pytest.approx(all_of_few, rel=0.05)


def test_rarefied_of_nothing() -> None:
    assert rarefied_distinct_n([], 2, 3) == 0.0
    assert rarefied_distinct_n([[[1]], [[2]], [[3]]], 2, 2) == 0.0
    with pytest.raises(ValueError, match="at least one"):
        rarefied_distinct_n([[[1, 2]]], 2, 0)

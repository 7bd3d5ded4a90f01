"""Krippendorff's α against the worked examples of its author (2011, "Computing Krippendorff's
Alpha-Reliability").
"""

import math

import pytest

from preftune.evaluation.agreement import alpha_interval, krippendorff_alpha

# Section A: two observers, two values. B: two observers, five values. C: four observers with gaps.
A = ("0100000010", "1110010000")
B = ("aabbdcccedda", "babbbccceddd")
C = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")


def units(observers: tuple[str, ...]) -> list[list[str]]:
    return [[value for value in column if value != "."] for column in zip(*observers, strict=True)]


@pytest.mark.parametrize(("observers", "alpha"), [(A, 0.095), (B, 0.692), (C, 0.743)])
def test_the_worked_examples(observers: tuple[str, ...], alpha: float) -> None:
    assert krippendorff_alpha(units(observers)) == pytest.approx(alpha, abs=5e-4)


def test_nothing_to_agree_on() -> None:
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([["a"], ["b"]]) is None
    assert krippendorff_alpha([["a", "a"], ["a", "a", "a"]]) is None


def test_agreement_is_one_and_of_few_items_that_is_not_certain() -> None:
    assert krippendorff_alpha([["a", "a"], ["b", "b", "b"]]) == 1.0
    assert alpha_interval([["a", "a"], ["b", "b", "b"]]) == (-math.inf, math.inf)


def test_the_interval_holds_alpha_and_narrows_with_units() -> None:
    few, many = alpha_interval(units(C)), alpha_interval(units(C) * 25)
    assert few.low < 0.743 < few.high
    assert many.low < 0.743 < many.high
    assert many.high - many.low < (few.high - few.low) / 3  # 5 in the limit of many

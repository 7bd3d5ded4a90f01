"""Baselines and their tests on pairs that are made up for them."""

import random

import numpy as np
import pytest

from preftune.data import Dialogue, Preference, Turn
from preftune.evaluation.baselines import baseline_tests, fit_bag_of_words, power, rule_accuracy

WORDS = ["the", "a", "one", "red", "blue", "house", "tree", "walks", "sings", "slowly", "never"]


def pairs(n: int, seed: int, good: str = "please") -> list[Preference]:
    """Random words; `good` is in the chosen one, and nothing else tells them apart."""
    rng = random.Random(seed)

    def text(extra: list[str]) -> str:
        words = rng.choices(WORDS, k=6) + extra
        rng.shuffle(words)
        return " " + " ".join(words)

    prompt = Dialogue((Turn("human", " Hello"),))
    return [Preference(prompt=prompt, chosen=text([good]), rejected=text(["thing"]), row=i) for i in range(n)]


def test_a_bag_of_words_learns_a_word_and_nothing_from_noise() -> None:
    bag = fit_bag_of_words(pairs(200, 0), seed=0)
    assert bag is not None
    assert (bag.advantages(pairs(100, 1)) > 0).mean() == 1.0
    assert max(bag.words, key=lambda word: bag.weights[bag.words[word]]) == "please"
    noise = fit_bag_of_words(pairs(400, 0, good="thing"), seed=0)
    assert noise is not None
    assert (noise.advantages(pairs(400, 1, good="thing")) > 0).mean() == pytest.approx(0.5, abs=0.1)
    assert fit_bag_of_words(pairs(10, 0), seed=0) is None


def test_a_bag_of_words_is_antisymmetric() -> None:
    bag = fit_bag_of_words(pairs(100, 0), seed=0)
    assert bag is not None
    rows = pairs(20, 3)
    swapped = [Preference(prompt=p.prompt, chosen=p.rejected, rejected=p.chosen) for p in rows]
    assert bag.advantages(swapped) == pytest.approx(-bag.advantages(rows))


def test_discordant_pairs_are_counted_by_hand() -> None:
    margins = np.array([1.0, 1.0, 1.0, -1.0, 0.0, 1.0])  # right, right, right, wrong, tie is wrong, right
    rule = np.array([1.0, -1.0, 0.0, 1.0, 1.0, -2.0])  # right, wrong, undecided, right, right, wrong
    (record,) = baseline_tests(margins, {"longer": rule}, np.arange(6), 200, seed=0)
    assert (record["model_right_only"], record["baseline_right_only"]) == (2, 2)
    assert record["difference"] == pytest.approx(4 / 6 - 3.5 / 6)
    assert record["p_value"] == 1.0
    assert record["verdict"] == "no detectable difference"
    assert rule_accuracy(rule, np.arange(6))["value"] == pytest.approx(3.5 / 6)


def test_a_clear_lead_is_called_better_and_its_reverse_worse() -> None:
    margins, rule = np.ones(60), np.where(np.arange(60) < 20, 1.0, -1.0)
    lead, behind = (
        baseline_tests(margins, {"a": rule}, np.arange(60), 500, 0)[0],
        baseline_tests(-rule, {"a": rule}, np.arange(60), 500, 0)[0],
    )
    assert (lead["verdict"], lead["model_right_only"]) == ("better", 40)
    assert behind["difference"] == pytest.approx(20 / 60)
    worse = baseline_tests(-margins, {"a": margins}, np.arange(60), 500, 0)[0]
    assert worse["verdict"] == "worse"
    assert worse["p_value"] == pytest.approx(2 * 0.5**60)


def test_pairs_of_one_prompt_are_no_new_evidence() -> None:
    """Ten prompts with six pairs each: at most 2 of 2¹⁰ signs of whole prompts are as extreme."""
    margins, rule = np.ones(60), -np.ones(60)
    (alone,) = baseline_tests(margins, {"a": rule}, np.arange(60), 500, 0)
    (ranked,) = baseline_tests(margins, {"a": rule}, np.repeat(np.arange(10), 6), 500, 0)
    assert alone["p_value"] < 1e-16
    assert 1e-3 < ranked["p_value"] < 0.02
    assert (ranked["difference"], ranked["n_discordant"]) == (alone["difference"], 60)
    few, many = rule_accuracy(rule, np.repeat(np.arange(10), 6)), rule_accuracy(rule, np.arange(60))
    assert few["interval"][1] > 4 * many["interval"][1]


def test_power_names_the_strongest_baseline() -> None:
    tests = [
        {"baseline": "weak", "difference": 0.2, "model_right_only": 40, "baseline_right_only": 20},
        {"baseline": "strong", "difference": 0.05, "model_right_only": 30, "baseline_right_only": 25},
    ]
    found = power(0.6, 100, tests)
    assert found["chance"]["n_needed"] == 194
    assert found["baseline"]["name"] == "strong"
    # d = 0.55, g = 0.05: (1.95996 * 0.74162 + 0.84162 * 0.73993)² / 0.0025 = 1724.4
    assert found["baseline"]["n_needed"] == 1725
    # 100 pairs: the smallest accuracy that they tell from a coin 4 times in 5 is 0.638
    assert found["chance"]["detectable"] == pytest.approx(0.638, abs=0.001)
    assert power(0.4, 100, [])["baseline"] is None

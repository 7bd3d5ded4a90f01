"""Gains by kind of prompt: by source and by how often the human speaks."""

from typing import Any

import pytest

from preftune.config import EvaluationConfig
from preftune.data import Dialogue, Preference, Turn
from preftune.evaluation import stats
from preftune.evaluation.by_prompt import NO_SOURCE, gains_by_prompt, turns_name

SETTINGS = EvaluationConfig()


def prompt(source: str, turns: int = 1) -> Preference:
    speakers = ["human", "assistant"] * turns
    dialogue = Dialogue(tuple(Turn(speaker, " Hello") for speaker in speakers[: 2 * turns - 1]))
    return Preference(prompt=dialogue, chosen=" a", rejected=" b", row=0, source=source)


def rows(*scores: float | None, **more: list[float]) -> list[dict[str, Any]]:
    return [{"score": score} | {k: v[i] for k, v in more.items()} for i, score in enumerate(scores)]


def test_a_gain_is_the_mean_difference_on_prompts_of_one_kind() -> None:
    prompts = [prompt("harmless"), prompt("helpful", 2), prompt("harmless"), prompt("helpful", 5)]
    policy = rows(1.0, 5.0, 3.0, 6.0, held_out=[1.0, 1.0, 1.0, 4.0])
    reference = rows(2.0, 2.0, 6.0, 2.0, held_out=[0.0, 0.0, 0.0, 0.0])
    gains = gains_by_prompt(policy, reference, prompts, SETTINGS, 0)
    assert {
        (kind, name): (gain["n"], gain["score"]["mean"], gain["held_out"]["mean"])
        for kind, groups in gains.items()
        for name, gain in groups.items()
    } == {
        ("source", "harmless"): (2, -2.0, 1.0),
        ("source", "helpful"): (2, 3.5, 2.5),
        ("turns", "1"): (2, -2.0, 1.0),
        ("turns", "2"): (1, 3.0, 1.0),
        ("turns", "4+"): (1, 4.0, 4.0),
    }
    low, high = gains["source"]["harmless"]["score"]["interval"]
    assert low <= -2.0 <= high
    assert "gold" not in gains["source"]["harmless"]


def test_what_does_not_divide_the_prompts_and_what_was_not_scored_is_left_out() -> None:
    alike = [prompt("one"), prompt("one")]
    assert gains_by_prompt(rows(1.0, 2.0), rows(0.0, 0.0), alike, SETTINGS, 0) == {}
    mixed = [prompt("one"), prompt(""), prompt("two")]
    gains = gains_by_prompt(rows(1.0, 2.0, None), rows(0.5, 1.0, 1.0), mixed, SETTINGS, 0)["source"]
    assert gains["two"] == {"n": 1}  # its reply has no score
    assert (gains["one"]["score"]["mean"], gains[NO_SOURCE]["score"]["mean"]) == (0.5, 1.0)


@pytest.mark.parametrize(("turns", "name"), [(1, "1"), (3, "3"), (4, "4+"), (9, "4+")])
def test_many_turns_are_counted_together(turns: int, name: str) -> None:
    assert turns_name(prompt("", turns)) == name


def test_p_values_are_corrected_over_all_kinds_of_prompt() -> None:
    prompts = [prompt("lost")] * 12 + [prompt("even", 2)] * 12 + [prompt("won", 3)] * 12
    differences = [-1.0] * 12 + [1.0, -1.0] * 6 + [1.0] * 12
    gains = gains_by_prompt(rows(*differences), rows(*[0.0] * 36), prompts, SETTINGS, 0)
    assert set(gains) == {"source", "turns"}  # six kinds: the three of each hold the same prompts
    p = stats.sign_flip_test([1.0] * 12, SETTINGS.resamples, 0)
    for groups in gains.values():
        first, second, third = sorted(gain["score"]["p_holm"] for gain in groups.values())
        assert first == second == pytest.approx(6 * p)
        assert first < 0.05
        assert third == 1.0  # of what is even

"""The reward functions that are shipped, on cases whose value is known without them."""

import sys
from typing import Any

import pytest

from preftune.errors import InputMissing
from preftune.judges import answers, style
from preftune.rollout.calls import Case, load_functions


@pytest.mark.parametrize(
    ("response", "answer", "value"),
    [
        ("It is 3 + 4 = 7.", 7, 1.0),
        ("7 apples, no, 8", "7", 0.0),
        ("so 1,234.50 in all", "1234.5", 1.0),
        ("#### 12", 12, 1.0),
        ("#### 12\nThat is all.", 12, 1.0),
        ("so it is 12", "6 + 6 = <<6+6=12>>12. #### 12", 1.0),  # GSM8K's column is a solution
        ("so it is 6", "6 + 6 = <<6+6=12>>12. #### 12", 0.0),
        (r"thus \boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.0),  # MATH's answers have braces
        (r"thus \boxed{\frac{1}{3}}", r"\frac{1}{2}", 0.0),
        (r"thus \boxed{12} or 13", "12", 1.0),
        ("<answer> Paris. </answer>", "paris", 1.0),
        (" Paris!", "Paris", 1.0),
        ("It is Paris", "Paris", 0.0),
        ("no number", 7, 0.0),
        ("100", 10, 0.0),
        ("half: .5", 0.5, 1.0),
        ("-.50", "-0.5", 1.0),
        (".5", "5", 0.0),
        ("see p.5", "5", 1.0),
        ("...5", "5", 1.0),
        ("between 10-15", 15, 1.0),
        ("between 10-15", -15, 0.0),
        ("the COVID-19 one", 19, 1.0),
        ("x=-5", -5, 1.0),
        ("anything", None, None),
    ],
)
def test_an_answer_is_right_or_wrong(response: str, answer: Any, value: float | None) -> None:
    assert answers.exact("Q", response, answer) == value


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("<think>2+2</think>\n<answer>4</answer>", 1.0),
        ("<think>2+2</think><answer>4</answer> bye", 0.0),
        ("<think></think><answer>4</answer>", 0.0),
        ("<answer>4</answer>", 0.0),
        ("<think>a</think><think>b</think><answer>4</answer>", 0.0),
    ],
)
def test_the_format_is_kept_or_not(response: str, value: float) -> None:
    assert answers.tagged("Q", response) == value


@pytest.mark.parametrize(
    ("words", "value"), [(0, 0.0), (10, 0.5), (20, 1.0), (60, 1.0), (90, 0.5), (200, 0.0)]
)
def test_the_band_of_lengths(words: int, value: float) -> None:
    assert style.length_band("Q", "word " * words) == pytest.approx(value)


def test_readability_is_flesch_s_formula() -> None:
    """Six words of one syllable in one sentence: 206.835 - 6.09 - 84.6 = 116.145."""
    assert style.readability("Q", "The cat sat on the mat.") == pytest.approx(1.16145)
    # two sentences, five words, nine syllables: un-der-stand-ing, ta-ble
    hard = style.readability("Q", "Understanding. One big table here.")
    assert hard == pytest.approx((206.835 - 1.015 * 2.5 - 84.6 * 9 / 5) / 100)
    assert style.readability("Q", "123 !") is None


def test_sentiment_is_that_of_vader_s_own_page() -> None:
    pytest.importorskip("vaderSentiment")
    assert style.sentiment("Q", "VADER is smart, handsome, and funny!") == 0.8439
    assert style.sentiment("Q", "The book was good.") == 0.4404


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    style._vader.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(InputMissing, match="needs the package vaderSentiment") as caught:
        style.sentiment("Q", "fine")
    assert "preftune[judges]" in caught.value.hint
    style._vader.cache_clear()


def test_profanity_is_the_share_of_rude_words() -> None:
    assert style.profanity("Q", "Damn, this is it") == -0.25
    assert style.profanity("Q", "The class assessed Scunthorpe.") == 0.0
    assert style.profanity("Q", "") == 0.0


def test_they_are_called_as_every_reward_function() -> None:
    """With the columns of the row, in one weighted sum."""
    terms = "preftune.judges.answers:exact + 0.5 * preftune.judges.style:length_band"
    right, band = load_functions(terms)
    case = Case("Q", "word " * 10 + "7", {"answer": "7", "row": 0, "source": "", "ended": True})
    assert right.values([case], stop=True) == [1.0]
    assert band.values([case], stop=True) == [pytest.approx(11 / 20)]

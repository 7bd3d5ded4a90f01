"""What is said of collected replies, against counts by hand."""

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest

import prose
from preftune.config import load_recipe
from preftune.data.pairing import Pair
from preftune.evaluation.stats import wilson
from preftune.rundir import RunDir, write_jsonl
from preftune.runs.collected import data_card, earlier, labels
from preftune.runs.session import Session
from preftune.version import __version__

WORDS = (
    "stage.pairs.algorithm=collect",
    "stage.pairs.judge=a:f",
    "stage.dpo.data=pairs",
    "stage.dpo.rounds=2",
)
ROW = {"row": 0, "prompt": "Hi?", "replies": ["one", "one two", "two one"], "scores": [1.0, 0.0, 0.0]}


def session(tmp_path: Any, *words: str) -> Session:
    config = load_recipe("tiny", [*WORDS, *words]).config
    return cast(Session, SimpleNamespace(config=config, run=RunDir(tmp_path)))


def test_labels_are_held_against_scores_and_lengths() -> None:
    made = [Pair(0, 1, 0.9), Pair(1, 0, 0.1), Pair(1, 2, 0.5)]  # by the scores, against them, a tie
    found = labels([(ROW, pair) for pair in made], 0.5)
    assert found["labels_agree"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["best_reachable"] == pytest.approx((0.9 + 0.9 + 0.5) / 3)
    assert found["longer_wins"] == {"value": 0.5, **wilson(1, 2)._asdict(), "n": 2}


def test_a_round_is_compared_with_the_one_before_on_the_same_prompts(tmp_path: Any) -> None:
    of = session(tmp_path)
    before = [{"prompt": "Hi?", "scores": [0.0, 2.0]}, {"prompt": "Ho?", "scores": [1.0, 1.0]}]
    write_jsonl(of.run.collected("pairs") / "replies.jsonl", [*before, {"prompt": "x", "scores": [9.0, 9.0]}])
    now = [{"prompt": "Ho?", "scores": [1.0, 2.0]}, {"prompt": "Hi?", "scores": [1.0, 3.0]}]
    found = earlier(of, "pairs-2", [*now, {"prompt": "new", "scores": [0.0, 0.0]}])
    # Ho?: 1 ties with 1, 1 and 2 beats both: (0.5 + 0.5 + 1 + 1) / 4. Hi?: 1 beats 0 only, 3 beats both.
    assert found["pairs"]["value"] == pytest.approx((0.75 + 0.75) / 2)
    assert (found["pairs"]["n"], set(found)) == (2, {"pairs"})
    assert earlier(of, "pairs", now) == {}


@pytest.mark.parametrize("judge", ["b:f", "llm:some"])
def test_scores_of_other_judges_are_not_compared(tmp_path: Any, judge: str) -> None:
    url = ["stage.pairs.llm.url=http://127.0.0.1:1/v1"] if judge.startswith("llm") else []
    of = session(tmp_path, f"stage.pairs.judge={judge}", *url)
    if not url:
        stages = dict(of.config.stage)
        stages["pairs-2"] = stages["pairs-2"].model_copy(update={"judge": "a:f"})
        of = cast(Session, SimpleNamespace(config=SimpleNamespace(stage=stages), run=of.run))
    assert earlier(of, "pairs-2", [{"prompt": "Hi?", "scores": [0.0, 1.0]}]) == {}


def test_a_card_shows_names_of_others_as_code(tmp_path: Any) -> None:
    share = {"value": None, "low": 0.0, "high": 1.0, "n": 0}
    asked = {"questions": 12, "ties": 1, "no_verdict": 2, "refused": 1, "both_orders": share}
    asked |= {"first_wins": {**share, "value": 0.75, "n": 4}, "answered_by": ["a`b\n# c"]}
    facts = {"judge": "llm:`x\n\n# y", "policy_sha256": "f" * 64, "prompts": 2, "replies": 4, "pairs": 2}
    facts |= {"left_out_pairs": 0, "label_temperature": 0.5, "labels_agree": 0.5, "best_reachable": 0.75}
    facts |= {"longer_wins": share, "beats": {"pairs": {**share, "value": 0.625}}, "llm": asked}
    card = data_card(session(tmp_path), "pairs", facts)
    assert "judged by `llm: x  # y`" in card
    assert "answered by `a b # c`" in card
    assert "temperature 0.5: they agree" in card
    assert "in 50.0%" in card
    assert re.search("`pairs` .*: 62.5%", card)
    assert "first wins 75.0% [0.0%, 100.0%] (n = 4)" in card
    assert "\n# y" not in card
    prose.compare("runs/collected: the card", card.replace(f"preftune {__version__}", "preftune VERSION"))


def test_scores_under_another_rule_are_not_compared(tmp_path: Any) -> None:
    of = session(tmp_path)
    write_jsonl(of.run.collected("pairs") / "replies.jsonl", [{"prompt": "Hi?", "scores": [0.0, 2.0]}])
    stages = dict(of.config.stage)
    stages["pairs-2"] = stages["pairs-2"].model_copy(update={"missing_eos_score": -1.0})
    other = cast(Session, SimpleNamespace(config=SimpleNamespace(stage=stages), run=of.run))
    assert earlier(other, "pairs-2", [{"prompt": "Hi?", "scores": [0.0, 1.0]}]) == {}

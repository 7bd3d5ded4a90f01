"""Judges that no training sees: how they are named, which are refused, and where their scores stand."""

from pathlib import Path

import pytest

from preftune.config import load_recipe
from preftune.config.rewards import judges_in
from preftune.errors import ConfigError
from preftune.evaluation.policy import gold_columns


def test_several_are_named_by_commas_or_in_a_list(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    shipped = Path(__file__).parents[2] / "src" / "preftune" / "recipes" / "tiny.toml"
    recipe.write_text(
        shipped.read_text().replace("[evaluation]\n", '[evaluation]\ngold = ["a:f", "./judge"]\n')
    )
    one = load_recipe(str(recipe)).config.evaluation.gold
    assert one == load_recipe("tiny", ["evaluation.gold=a:f, ./judge"]).config.evaluation.gold
    assert judges_in(one) == ("a:f", "./judge")


def test_the_first_is_gold_unless_the_world_has_one() -> None:
    given = {"a:f": 1.0, "./judge": 2.0}
    assert gold_columns(given, of_the_world=False) == {"gold": 1.0, "gold:./judge": 2.0}
    assert gold_columns(given, of_the_world=True) == {"gold:a:f": 1.0, "gold:./judge": 2.0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluation.gold=judge"], "'judge' is no judge"),
        (["evaluation.gold=a:f, a:f"], "a judge occurs twice"),
        (
            ["evaluation.gold=a:f", "stage.ppo.reward_functions=0.5 * a:f"],
            "evaluation.gold = a:f: stage ppo is scored by it, so that training sees it",
        ),
    ],
)
def test_what_is_no_gold_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", words)
    assert message in caught.value.message


@pytest.mark.parametrize(
    "words",
    [
        ["stage.pairs.algorithm=collect", "stage.pairs.judge=a:f"],
        ["stage.ppo.reward_model=none", "stage.ppo.reward_functions=2 * a:f"],
    ],
    ids=["labels pairs", "ceiling"],
)
def test_gold_may_label_pairs_and_train_a_ceiling(words: list[str]) -> None:
    assert load_recipe("tiny", ["evaluation.gold=a:f", *words]).config.evaluation.gold == "a:f"

"""An own run beside the runs that its recipe was measured with."""

import json
from pathlib import Path
from typing import Any

import expected as measuring
import numpy as np
import pytest
from synthetic import make_run

import prose
from preftune.config import load_recipe, recipe_names
from preftune.measure import expected
from preftune.records.expected import ExpectedRecord
from preftune.report.load import load_run

ROOT = Path(__file__).parents[2]
MEASURED = [name for name in recipe_names() if expected.expectation(name)]


def record(**numbers: tuple[float, ...]) -> ExpectedRecord:
    config = load_recipe("tiny").config
    return ExpectedRecord(
        recipe="tiny",
        settings_sha256=expected.settings_sha256(config),
        made="2026-11-28, commit abc",
        machine="one",
        seeds=(0, 1, 2),
        seconds=(1.0, 1.0, 1.0),
        numbers=numbers or {"PPO gain": (0.1, 0.2, 0.3), "PPO KL": (1.0, 1.0, 1.0)},
    )


def test_the_band_holds_19_of_20_further_runs() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(3.0, 2.0, (4000, 6))
    bands = [expected.band(tuple(row[:5])) for row in draws]
    inside = [
        ends is not None and ends[0] <= row[5] <= ends[1] for ends, row in zip(bands, draws, strict=True)
    ]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)
    assert expected.band((1.0,)) is None


def test_policies_on_too_few_prompts_have_no_numbers_to_expect(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    every = expected.numbers_of(load_run(run))
    file = run.evaluation("policy_ppo")
    file.write_text(json.dumps({**json.loads(file.read_text()), "n_prompts": 9}))
    left = expected.numbers_of(load_run(run))
    assert {name for name in every if name not in left} == {name for name in every if "PPO" in name}
    assert left.items() < every.items()


def outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: ExpectedRecord | None, *words: str
) -> Any:
    monkeypatch.setattr(expected, "expectation", lambda recipe: known)
    return expected.outcome(load_run(make_run(tmp_path)), load_recipe("tiny", words).config)


def test_a_run_of_the_recipe_is_compared_number_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = expected.numbers_of(load_run(make_run(tmp_path / "own")))
    near = record(**{name: (value - 0.1, value, value + 0.1) for name, value in own.items()})
    met = outcome(tmp_path / "a", monkeypatch, near)
    assert met.startswith(f"as expected: {len(own)} of {len(own)} numbers")
    for said in ("3 runs", "2026-11-28", "commit abc"):
        assert said in met
    far = record(**{name: (value + 5, value + 5.1, value + 5.2) for name, value in own.items()})
    said = outcome(tmp_path / "b", monkeypatch, far)
    assert said.startswith(f"not as expected: {len(own)} of {len(own)} numbers")
    assert "PPO gain" in said or "reward model accuracy" in said
    prose.compare("report/expected: a run as expected, and one that is not", met, said)


def test_a_number_that_all_runs_share_was_rounded_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expected, "numbers_of", lambda run: {"PPO EOS rate": 13 / 128})
    near, far = (record(**{"PPO EOS rate": (share,) * 3}) for share in (0.101562, 0.101))
    assert outcome(tmp_path / "a", monkeypatch, near).startswith("as expected: 1 of 1")
    assert outcome(tmp_path / "b", monkeypatch, far).startswith("not as expected")


@pytest.mark.parametrize("words", [["stage.ppo.steps=4"], ["data.pairs=301"]])
def test_a_run_of_other_settings_is_not_compared(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outcome(tmp_path, monkeypatch, record(), *words) is None


def test_the_seed_and_the_place_of_data_do_not_matter() -> None:
    own = [
        load_recipe("sentiment", [f"data.name={name}", f"seed={seed}"]) for name, seed in (("a", 0), ("b", 3))
    ]
    assert len({expected.settings_sha256(each.config) for each in own}) == 1


@pytest.mark.parametrize("recipe", MEASURED)
def test_what_stands_beside_a_recipe_is_of_its_settings(recipe: str) -> None:
    known = expected.expectation(recipe)
    assert known is not None
    files = ("sentiment", "hh-rm", "hh-scratch", "hh-smollm2")  # where they lie is no part of it
    own_data = ["data.name=a"] if recipe in files else []
    assert known.settings_sha256 == expected.settings_sha256(load_recipe(recipe, own_data).config)
    assert len(known.seeds) >= {"hh-rm": 3, "hh-smollm2": 2}.get(recipe, 5)
    assert all(len(values) == len(known.seeds) for values in known.numbers.values())


def head_of(recipe: str) -> str:
    """The comment at the top of a recipe, on one line."""
    text = (ROOT / "src/preftune/recipes" / f"{recipe}.toml").read_text(encoding="utf-8")
    return " ".join(line.lstrip("# ") for line in text.partition("\nname = ")[0].splitlines())


def row_of(recipe: str) -> str:
    lines = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"| `{recipe}` |"))


@pytest.mark.parametrize("recipe", MEASURED)
def test_the_recipes_head_and_the_table_say_what_its_file_does(recipe: str) -> None:
    """`python benchmarks/expected.py RECIPE --say` prints the words."""
    known = expected.expectation(recipe)
    assert known is not None
    for words in (measuring.cost(known), measuring.main_numbers(known)):
        assert words in head_of(recipe)
        assert words in row_of(recipe)


def test_words_of_a_record_are_means_with_students_intervals() -> None:
    known = record(**{"PPO gain": (0.1, 0.2, 0.3), "PPO KL": (1.0, 1.0, 1.0), "base gain": (9.0, 9.0, 9.0)})
    known = known.model_copy(update={"seconds": (60.0, 90.0, 600.0), "peak_mib": 1000.0})
    assert measuring.cost(known) == "1 to 10 min, median 2 (one), 1.0 GB"
    # t(2) = 4.303, standard error 0.1 / √3
    numbers = "gain PPO +0.20 [-0.05, +0.45]; KL PPO 1.00 [1.00, 1.00]"
    assert measuring.main_numbers(known) == f"3 seeds, mean [95 % t-interval]: {numbers}"
    two = known.model_copy(
        update={"seeds": (2, 3), "numbers": {name: values[:2] for name, values in known.numbers.items()}}
    )
    each = ["2 seeds, each: gain PPO +0.10 and +0.20", "KL PPO 1.00 and 1.00"]
    assert measuring.main_numbers(two).split("; ") == each
    gold = known.model_copy(update={"numbers": {**known.numbers, "PPO gold gain": (0.0, 0.0, 0.0)}})
    assert "; ".join(["gold gain PPO +0.00 [+0.00, +0.00]", "KL"]) in measuring.main_numbers(gold)


def test_four_of_five_runs_of_sentiment_keep_within_what_its_head_says() -> None:
    known = expected.expectation("sentiment")
    assert known is not None
    assert f"our of five runs within {max(sorted(known.seconds)[:4]) / 60:.0f} min" in head_of("sentiment")
    assert f"four of five within {max(sorted(known.seconds)[:4]) / 60:.0f} min" in row_of("sentiment")


@pytest.mark.parametrize("recipe", ["hh-gpt2", "hh-colab"])
def test_a_recipe_that_never_ran_says_so(recipe: str) -> None:
    assert "Never run" in head_of(recipe)
    assert "| never run: needs" in row_of(recipe)

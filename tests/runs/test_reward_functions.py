"""Reward functions in whole runs: in training, in evaluation and best-of-n, and when they fail."""

import math
from pathlib import Path
from typing import Any

import pytest

import preftune
from preftune import cli
from preftune.config import load_recipe
from preftune.errors import DataError
from preftune.rundir import read_json, read_jsonl
from preftune.runs.inputs import check_columns
from preftune.runs.sources import dataset_of

SMALL = (
    "model.scratch.steps=4",
    "data.pairs=60",
    "stage.sft.rows=16",
    "evaluation.prompts=6",
    "evaluation.pool=4",
    "evaluation.max_new_tokens=8",
    *(f"stage.{name}=none" for name in ("rm", "dpo", "ppo")),
)
ALONE = ("stage.grpo.reward_model=none", "stage.grpo.steps=2", "stage.grpo.max_new_tokens=8")
CALLS: list[int] = []
pytestmark = pytest.mark.usefixtures("few_pairs")


def words(prompt: str, response: str) -> int:
    return len(response.split())


def needs_answer(prompt: str, response: str, answer: str, difficulty: int = 0) -> float:
    return float(answer in response)


def needs_ids(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def sometimes_nan(prompt: str, response: str, **columns: Any) -> float:
    """Fails on the first response of each step of 16."""
    CALLS.append(1)
    return math.nan if len(CALLS) % 16 == 1 else float(len(response))


@pytest.mark.parametrize(("name", "column"), [("needs_answer", "answer"), ("needs_ids", "completion_ids")])
def test_a_function_without_its_column_is_refused_before_any_training(
    tmp_path: Path, name: str, column: str
) -> None:
    """A default, or `**columns`, is no need."""
    settings = (*SMALL, *ALONE, f"stage.grpo.reward_functions={__name__}:{name}")
    with pytest.raises(DataError, match=f"takes '{column}', a column which no row of the data has"):
        preftune.run("tiny", *settings, out=str(tmp_path / "run"))
    assert not (tmp_path / "run" / "models").exists()


def test_columns_of_what_a_stage_will_collect_are_not_asked_for_beforehand() -> None:
    """Collected rows have columns that the run's data have not."""
    function = f"stage.grpo.reward_functions={__name__}:needs_answer"
    collects = ("stage.pairs.algorithm=collect", "stage.pairs.judge=rm", "stage.grpo.data=pairs")
    data = dataset_of(load_recipe("tiny").config.data, 0)
    check_columns(load_recipe("tiny", [function, *collects]).config, data)
    with pytest.raises(DataError, match="'answer'"):
        check_columns(load_recipe("tiny", [function]).config, data)


def test_evaluation_and_best_of_n_go_by_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any reward model: the score is the function's, and best-of-n picks the longest replies. An
    edited function is another one.
    """
    settings = (*SMALL, "stage.grpo=none", "evaluation.reward_functions=mine:words")
    mine = tmp_path / "mine.py"
    mine.write_text("def words(prompt, response):\n    return len(response.split())\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = preftune.run("tiny", *settings, out=str(tmp_path / "run"))
    for name, file in run.samples_files().items():
        for row in read_jsonl(file):
            assert row["score"] == words("", row["response"]), name
    sft, best = (read_json(run.evaluation(name))["score"]["mean"] for name in ("policy_sft", "best_of_4"))
    assert best > sft
    before = read_json(run.stage_json("evaluation"))["key"]
    assert (
        read_json(preftune.run("tiny", *settings, out=str(run.path)).stage_json("evaluation"))["key"]
        == before
    )
    mine.write_text(mine.read_text() + "# edited\n")
    assert (
        read_json(preftune.run("tiny", *settings, out=str(run.path)).stage_json("evaluation"))["key"]
        != before
    )


def test_a_stage_learns_from_functions_alone_and_counts_what_it_masks(tmp_path: Path) -> None:
    terms = "stage.grpo.reward_functions=0.5 * test_reward_functions:sometimes_nan"
    CALLS.clear()
    path = preftune.grpo_train(
        "tiny", *SMALL, *ALONE, terms, "stage.grpo.on_reward_error=mask", out=str(tmp_path)
    )
    assert (path / "model.safetensors").is_file()
    rows = read_jsonl(tmp_path / "stages" / "grpo" / "metrics.jsonl")
    assert [row["frac_reward_masked"] for row in rows] == [1 / 16, 1 / 16]
    recorded = read_json(tmp_path / "stages" / "grpo" / "stage.json")["inputs"]
    assert set(recorded["reward_functions"]) == {"test_reward_functions:sometimes_nan"}


def test_a_watched_function_is_logged_and_changes_nothing(tmp_path: Path) -> None:
    """Gold too: a watched judge is none that training has seen. The weights are those without it."""
    terms = "stage.grpo.reward_functions=0.5 * preftune.judges.style:length_band"
    watched = "stage.grpo.watched_functions=test_reward_functions:words, preftune.world.gold:gold"
    gold = "evaluation.gold=preftune.world.gold:gold"
    rows, weights = [], []
    for name, settings in (("with", (watched, gold)), ("without", ())):
        out = tmp_path / name
        path = preftune.grpo_train("tiny", *SMALL, *ALONE, terms, *settings, out=str(out))
        weights.append((path / "model.safetensors").read_bytes())
        rows.append(read_jsonl(out / "stages" / "grpo" / "metrics.jsonl"))
    assert weights[0] == weights[1]
    for one, other in zip(*rows, strict=True):
        more = {f"rewards/{name}/{what}" for name in ("words", "gold") for what in ("mean", "std")}
        assert set(one) - set(other) == more
        assert one["reward"] == pytest.approx(0.5 * one["rewards/length_band/mean"], abs=1e-6)
        assert 0 < one["rewards/words/mean"] <= 8


def test_a_failing_function_ends_the_run_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CALLS.clear()
    terms = "stage.grpo.reward_functions=test_reward_functions:sometimes_nan"
    assert cli.main(["train", "tiny", "grpo", *SMALL, *ALONE, terms, f"out={tmp_path}"]) == 65
    said = capsys.readouterr().err
    assert "test_reward_functions:sometimes_nan, row " in said
    assert "returned nan" in said


def test_a_function_that_is_not_there_stops_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terms = "stage.grpo.reward_functions=no_module_of_this_name:f"
    assert cli.main(["run", "tiny", *SMALL, *ALONE, terms, f"out={tmp_path}"]) == 66
    assert "no_module_of_this_name:f" in capsys.readouterr().err
    assert not (tmp_path / "stages").exists()


def test_the_frozen_settings_name_the_functions(tmp_path: Path) -> None:
    from preftune.config import dump_toml

    config = load_recipe(
        "tiny", ["stage.ppo.reward_functions=0.5 * a:f + b:g", "stage.ppo.reward_model=none"]
    ).config
    file = tmp_path / "x.toml"
    file.write_text(dump_toml(config), encoding="utf-8")
    assert load_recipe(str(file)).config == config

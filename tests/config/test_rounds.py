"""Rounds: the stages that a chain becomes, and who starts from whom."""

import pytest

from preftune import api
from preftune.config import dump_toml, load_recipe, stage_order
from preftune.errors import ConfigError
from preftune.rundir import RunDir

PAIRS = ("stage.pairs.algorithm=collect", "stage.pairs.judge=a:f", "stage.ppo=none", "stage.grpo=none")
DPO = (*PAIRS, "stage.dpo.data=pairs", "stage.dpo.rounds=3")


def test_iterative_dpo_goes_on_from_the_policy_of_the_round_before() -> None:
    stages = load_recipe("tiny", DPO).config.stage
    order = [name for name in stage_order(stages) if name.startswith(("pairs", "dpo"))]
    assert order == ["pairs", "dpo", "pairs-2", "dpo-2", "pairs-3", "dpo-3"]
    assert [stages[name].init for name in order] == ["sft", "sft", "dpo", "dpo", "dpo-2", "dpo-2"]
    assert [stages[name].data for name in order[1::2]] == ["pairs", "pairs-2", "pairs-3"]
    assert stages["dpo-3"].reference_stage == "dpo-2"
    assert stages["dpo-3"].learning_rate == stages["dpo"].learning_rate


def test_a_value_of_a_later_round_comes_from_where_the_first_one_does() -> None:
    origins = load_recipe("tiny", [*DPO, "stage.dpo.beta=0.3"]).origins
    assert origins["stage.dpo-3.beta"] == "command line"
    assert origins["stage.dpo-2.algorithm"] == "recipe"
    assert origins["stage.pairs-2.judge"] == "command line"
    assert origins["stage.dpo-2.optimizer.eps"] == "default"


def test_the_reference_may_stay_sft() -> None:
    stages = load_recipe("tiny", [*DPO, "stage.dpo.reference=sft"]).config.stage
    assert {stages[name].reference_stage for name in ("dpo", "dpo-2", "dpo-3")} == {"sft"}
    assert stages["dpo-3"].parents() == ("dpo-2", "sft", "pairs-3")


def test_a_reference_on_collected_pairs_is_part_of_the_round() -> None:
    low = ("stage.low.algorithm=dpo", "stage.low.data=pairs", "stage.dpo.reference=low")
    stages = load_recipe("tiny", [*DPO, *low]).config.stage
    assert [stages[name].reference_stage for name in ("dpo", "dpo-2", "dpo-3")] == ["low", "low-2", "low-3"]


def test_a_reward_model_on_collected_pairs_is_part_of_the_round() -> None:
    words = ["stage.pairs.algorithm=collect", "stage.pairs.judge=a:f", "stage.rm.data=pairs"]
    stages = load_recipe("tiny", [*words, "stage.ppo.rounds=2"]).config.stage
    assert stages["ppo-2"].scored_by == "rm-2"
    assert (stages["rm-2"].data, stages["rm-2"].init) == ("pairs-2", "sft")
    assert (stages["pairs-2"].init, stages["ppo-2"].init) == ("ppo", "ppo")
    assert "sft-2" not in stages


def test_a_function_named_after_an_algorithm_trains_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def recorded(*words: object, until: str, **others: object) -> RunDir:
        asked.append(until)
        return RunDir("run")

    monkeypatch.setattr(api, "run_recipe", recorded)
    assert api.dpo_train("tiny", *DPO) == RunDir("run").model_dir("dpo-3")
    assert asked == ["dpo-3"]


def test_settings_that_are_written_out_are_read_as_the_same_run(tmp_path: object) -> None:
    from pathlib import Path

    config = load_recipe("tiny", DPO).config
    file = Path(str(tmp_path)) / "config.toml"
    file.write_text(dump_toml(config))
    assert load_recipe(str(file)).config == config


def test_rounds_of_what_collects_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"stage\.dpo\.rounds = 2: nothing it learns from is collected"):
        load_recipe("tiny", ["stage.dpo.rounds=2"])


def test_a_reference_that_is_no_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'stage\.dpo\.reference = "rm": expected a stage that trains'):
        load_recipe("tiny", ["stage.dpo.reference=rm"])

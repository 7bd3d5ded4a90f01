"""The order of stages, the plan as text, and the generated reference."""

from pathlib import Path

import pytest

from preftune.config import (
    judge_of,
    judges_of,
    load_recipe,
    options,
    options_markdown,
    parents,
    show_plan,
    stage_order,
    stages_until,
)
from preftune.errors import ConfigError, UsageError


def test_stages_run_after_their_parents_in_any_file_order() -> None:
    stages = load_recipe("hh-colab").config.stage
    assert next(iter(stages)) == "rm"  # the file names it first
    assert stage_order(stages) == ["sft", "rm", "ppo", "grpo", "dpo"]
    assert parents(stages["ppo"]) == ("sft", "rm")
    assert parents(stages["sft"]) == ()


def test_reward_model_first_when_it_starts_from_base() -> None:
    stages = load_recipe("hh-colab", ["stage.rm.init=base"]).config.stage
    assert stage_order(stages)[0] == "rm"


def test_a_dpo_stage_can_be_the_judge() -> None:
    overrides = ["stage.prefs.algorithm=dpo", "stage.ppo.reward_model=prefs"]
    stages = load_recipe("tiny", overrides).config.stage
    order = stage_order(stages)
    assert order.index("prefs") < order.index("ppo")  # although the recipe names it last
    assert parents(stages["ppo"]) == ("sft", "prefs")
    assert (judge_of(stages), judges_of(stages)) == ("prefs", ["rm", "prefs"])
    plain = load_recipe("tiny").config.stage
    assert (judge_of(plain), judges_of(plain)) == ("rm", ["rm"])  # dpo is there, and judges nobody


def test_without_online_stages_the_first_reward_stage_judges() -> None:
    stages = load_recipe("tiny", ["stage.ppo=none", "stage.grpo=none"]).config.stage
    assert judge_of(stages) == "rm"
    assert judge_of({"sft": stages["sft"]}) is None


def test_one_stage_needs_its_ancestors_only() -> None:
    stages = load_recipe("tiny").config.stage
    assert stages_until(stages, "dpo") == ["sft", "dpo"]
    assert stages_until(stages, "ppo") == ["sft", "rm", "ppo"]
    with pytest.raises(UsageError, match="no stage 'kto'"):
        stages_until(stages, "kto")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("stage.rm.init=nobody", "choose one of: base, sft, dpo"),  # ppo and grpo wait for rm
        ("stage.ppo.init=nobody", "choose one of: base, sft, grpo, dpo"),
        ("stage.sft=none", "choose one of: base, dpo"),
        ("stage.ppo.reward_model=nobody", "choose one of: rm, dpo"),
    ],
)
def test_no_stage_is_offered_that_waits_for_the_one_in_question(override: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", [override])
    assert caught.value.hint == hint


def test_plan_shows_graph_and_origins() -> None:
    resolved = load_recipe("tiny", ["stage.ppo.steps=9"])
    text = show_plan(resolved)
    assert "9 steps of 16 responses" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["steps", "=", "9", "command", "line"] in rows
    assert ["gamma", "=", "1.0", "default"] in rows
    shown = [
        key
        for section, *lines in (part.splitlines() for part in text.split("\n[")[1:])
        for key in (
            f"{section.rstrip(']')}.{line.split()[0]}".removeprefix("run.") for line in lines if " = " in line
        )
    ]
    assert len(shown) == len(set(shown))
    assert set(shown) > set(resolved.origins)  # those too that config.toml leaves out at their defaults
    assert {"evaluation.gold", "stage.ppo.kl_target", "stage.rm.members"} <= set(shown)
    assert "  ppo" not in show_plan(resolved, until="dpo").split("[")[0]


def test_options_cover_every_key_of_a_run_and_describe_it() -> None:
    rows = list(options())
    keys = {row.key for row in rows}
    assert keys >= load_recipe("quickstart").origins.keys()
    assert len(keys) == len(rows)
    assert all(row.description.endswith(".") for row in rows)
    defaults = {row.key: row.default for row in rows}
    assert defaults["stage.ppo.optimizer.eps"] == "1e-05"
    assert defaults["stage.dpo.optimizer.eps"] == "1e-08"
    assert defaults["stage.sft.rows"] == "none"
    assert defaults["name"] == "required"


def test_config_page_is_generated_from_the_models() -> None:
    page = Path(__file__).parents[2] / "docs/config.md"
    message = "run `preftune options --markdown > docs/config.md`"
    assert page.read_text(encoding="utf-8") == options_markdown(), message

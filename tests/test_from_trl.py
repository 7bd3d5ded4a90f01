"""docs/from-trl.md against both sides: TRL's arguments and metrics (trl_names.json), and our settings."""

import dataclasses
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from transformers import TrainingArguments

from preftune.config import ALGORITHM_CONFIGS
from preftune.config.schema import settings
from test_docs import METRICS, first_column, tables

PAGE = Path(__file__).resolve().parents[1] / "docs" / "from-trl.md"
TRL = json.loads((Path(__file__).parent / "trl_names.json").read_text(encoding="utf-8"))
TRAINERS = {
    "SFT": ("SFTConfig", "sft", "sft"),
    "Reward model": ("RewardConfig", "reward", "rm"),
    "DPO": ("DPOConfig", "dpo", "dpo"),
    "KTO": ("KTOConfig", "kto", "kto"),
    "GRPO": ("GRPOConfig", "grpo", "grpo"),
    "RLOO": ("RLOOConfig", "rloo", "rloo"),
    "PPO": ("PPOConfig", "ppo", "ppo"),
}
EVERY = "Every trainer"


def names(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def column(heading: str, which: int) -> set[str]:
    """Names in one column of the table under a heading, without those of its head."""
    return {name for row in tables(PAGE)[heading][1:] for name in names(row[which])}


def section(heading: str) -> str:
    return PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]


def not_there(heading: str) -> set[str]:
    return names(section(heading).split("<summary>Not available</summary>")[1])


def test_there_is_a_table_for_every_algorithm() -> None:
    assert {algorithm for _, algorithm, _ in TRAINERS.values()} == set(ALGORITHM_CONFIGS)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_argument_of_trl_is_there_and_none_is_made_up(trainer: str) -> None:
    arguments = set(TRL[TRAINERS[trainer][0]]["arguments"])
    left, rest = column(trainer, 0), not_there(trainer)
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert not left & rest
    assert left | rest <= arguments
    assert arguments - left - rest <= inherited  # told once, or left to transformers' own page


def test_what_every_trainer_has_is_transformers() -> None:
    assert column(EVERY, 0) <= {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_setting_of_ours_is_there_and_none_is_made_up(trainer: str) -> None:
    _, algorithm, stage = TRAINERS[trainer]
    known = set(settings({stage: algorithm}))
    shared = {key.replace("NAME", stage) for key in column(EVERY, 1)}
    ours = (f"stage.{stage}.", "data.", "model.", "sampler.")
    named = {name for name in names(section(trainer)) if name.startswith(ours)}
    own = {key for key in known if key.startswith(f"stage.{stage}.")} - {f"stage.{stage}.algorithm"}
    assert column(trainer, 1) <= named <= known
    assert own <= named | shared, "name it in docs/from-trl.md: under Every trainer, if every stage has it"
    assert shared - {f"stage.{stage}.epochs"} <= known


@pytest.mark.parametrize("trainer", TRAINERS)
def test_metric_names_are_those_of_both_sides(trainer: str) -> None:
    kind, algorithm, _ = TRAINERS[trainer]
    theirs, ours = set(TRL[kind]["metrics"]), first_column(METRICS, algorithm)
    (row,) = [row for row in tables(PAGE)["Metric names"] if row[0] == trainer]
    renamed = re.findall(r"`([^`]+)` → `([^`]+)`", row[2])
    assert names(row[1]) == (theirs & ours) - {old for old, _ in renamed}
    assert all(old in theirs and new in ours for old, new in renamed)


@pytest.mark.parametrize("kind", [kind for kind in TRL if kind != "PPOConfig"])
def test_the_recorded_arguments_are_those_of_the_installed_trl(kind: str) -> None:
    """`make trl-check` has TRL; PPO has left it since."""
    trl = pytest.importorskip("trl", reason="needs TRL: make trl-check")
    if trl.__version__ != TRL[kind]["trl"]:
        pytest.skip(f"names are of TRL {TRL[kind]['trl']}, installed is {trl.__version__}")
    fields = {field.name for field in dataclasses.fields(getattr(import_module("trl"), kind))}
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert fields - inherited <= set(TRL[kind]["arguments"]) <= fields

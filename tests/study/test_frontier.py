"""Gold at equal KL, between the values that a method was trained at and not beyond."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from study_helpers import wanted

from preftune.config import load_recipe
from preftune.errors import ConfigError
from preftune.records.study import SeedRecord
from preftune.runs.lengths import Lengths
from preftune.runs.sources import dataset_of
from preftune.study.design import Design, load_design, make_design, save_design
from preftune.study.frontier import LEVELS, frontier, section
from preftune.study.launch import _design
from preftune.study.values import COLUMNS, SeedValues

SWEEPS = {"stage.ppo.kl_coef": {"0.1": "ppo", "0.02": "ppo-low"}, "stage.dpo.beta": {"0.1": "dpo"}}


def table(kl: float, gain: float) -> np.ndarray:
    values = np.zeros((40, len(COLUMNS)))
    values[:, COLUMNS.index("kl")] = kl
    values[:, COLUMNS.index("gold_gain")] = gain
    return values


def seed(far: float = 4.0) -> SeedValues:
    policies = {
        "sft": table(0, 0),
        "ppo": table(1.0, 0.5),
        "ppo-low": table(far, 0.9),
        "dpo": table(2.0, 0.3),
    }
    best = {"gold": np.tile([0.0, 0.2], (40, 1))}
    return SeedValues(
        seed=0,
        facts=SeedRecord(seconds=1.0, policies=tuple(policies), reference="sft", tokens={}),
        tables={name: {"test": own} for name, own in policies.items()},
        best={"test": best},
        best_kl=(0.0, 1.0),
        sets={},
        best_sets={},
    )


@pytest.fixture
def design() -> Design:
    return Design(
        config=load_recipe("tiny").config,
        recipe="tiny",
        overrides=(),
        recipe_stages=("sft", "ppo", "dpo"),
        tokens=None,
        sweeps=SWEEPS,
        fresh_pairs=20,
        replies=2,
    )


def test_it_lies_between_the_points_in_root_kl(design: Design) -> None:
    ppo, best = frontier([seed()], design, "test", 100)
    assert (ppo["method"], ppo["setting"]) == ("PPO", "stage.ppo.kl_coef")
    at = dict(zip(LEVELS, ppo["at"], strict=True))
    assert at[1.0]["gain"] == pytest.approx(0.5)
    assert at[2.5]["gain"] == pytest.approx(0.5 + (2.5**0.5 - 1) * 0.4)
    assert at[5.0] is at[10.0] is None  # nothing was trained beyond 4 nats
    assert best["method"] == "best-of-n"
    assert best["at"][0]["gain"] == pytest.approx(0.2)
    assert best["at"][1] is None


def test_below_the_nearest_trained_value_nothing_is_known(design: Design) -> None:
    """SFT lies at 0 nats with a gain of 0, and no line is drawn from there."""
    far = seed()
    far.tables["ppo"]["test"][:, COLUMNS.index("kl")] = 1.2
    ppo, best = frontier([far], design, "test", 100)
    assert ppo["at"][0] is None
    assert ppo["at"][1] is not None
    assert best["at"][0] is not None  # n = 1 is SFT itself
    assert frontier([seed(), far], design, "test", 100)[0]["at"][0] is None


def test_a_level_that_one_seed_did_not_reach_is_left_out(design: Design) -> None:
    ppo = frontier([seed(), seed(far=2.0)], design, "test", 100)[0]
    assert ppo["at"][0] is not None
    assert ppo["at"][1] is None


def test_one_trained_value_is_no_frontier(design: Design) -> None:
    assert frontier([seed()], replace(design, sweeps={"stage.dpo.beta": {"0.1": "dpo"}}), "test", 100) == []
    assert section({})[1] == []


def test_several_settings_are_swept_together(tmp_path: Path) -> None:
    asked = wanted(sweep="stage.ppo.kl_coef=0.02,0.1; stage.dpo.beta=0.1,0.4; stage.ppo.kl_budget=2.0")
    config = load_recipe("tiny", asked.overrides).config
    made = make_design(asked, config, dataset_of(config.data, 0), Lengths(prompt=10, chosen=8, rejected=8))
    assert set(made.sweeps) == {"stage.ppo.kl_coef", "stage.dpo.beta", "stage.ppo.kl_budget"}
    assert "dpo-beta-0_4" in made.config.stage
    assert made.config.stage["ppo-kl_coef-0_02"].kl_coef == 0.02  # type: ignore[union-attr]
    assert made.config.stage["ppo-kl_budget-2_0"].kl_budget == 2.0  # type: ignore[union-attr]
    save_design(made, tmp_path)
    assert load_design(tmp_path).sweeps == made.sweeps


@pytest.mark.parametrize(
    ("word", "sweep"),
    [
        ("stage.ppo.kl_horizon=2000", "stage.ppo.kl_target=2,4"),
        ("model.lora.rank=8", "stage.dpo.trainable=lora,all"),
    ],
)
def test_what_a_sweep_gives_a_use_is_taken(word: str, sweep: str, tmp_path: Path) -> None:
    asked = wanted(sweep=sweep)
    made = _design(replace(asked, overrides=(*asked.overrides, word)), tmp_path)
    assert load_design(tmp_path).sweeps == made.sweeps


def test_points_of_a_sweep_that_nothing_reads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage\.ppo\.kl_horizon has no use"):
        _design(wanted(sweep="stage.ppo.kl_horizon=500,1000"), tmp_path)

"""The critic's head start: `stage.ppo.critic_warmup`, docs/algorithms/ppo.md."""

from pathlib import Path

import pytest
import torch
from resuming import STEPS, Killed, rows, run

from preftune.config import PPOConfig, load_recipe
from preftune.config.load import build
from preftune.errors import ConfigError
from preftune.measure.estimate import shortened
from preftune.runs.stages import settings_of
from tiny import roles, rollout, runner, same_weights


def test_the_policy_waits_while_the_critic_learns_and_then_moves() -> None:
    models = roles("ppo")
    made, recorders = runner("ppo", models, critic_warmup=2, epochs=2)
    for step in range(3):
        before = {name: len(recorder.steps) for name, recorder in recorders.items()}
        metrics = made.improve(rollout(4))
        moved = {name: len(recorder.steps) - before[name] for name, recorder in recorders.items()}
        assert moved == {"policy": 0 if step < 2 else 2, "critic": 2}
        assert (metrics["grad_norm"] == 0) == (step < 2)
        assert metrics["grad_norm/critic"] > 0
        assert metrics["policy/entropy_avg"] > 0  # measured, though nothing is learnt


def test_a_policy_that_waits_steers_no_coefficient() -> None:
    """Its KL is 0, whatever the coefficient: that says nothing of it."""
    made, _ = runner("ppo", roles("ppo"), critic_warmup=2, kl_target=6.0, kl_horizon=100)
    coefficients = []
    for _ in range(3):
        made.improve(rollout(4))
        coefficients.append(made.kl_coef)
    assert coefficients[0] == coefficients[1] == made.config.kl_coef
    assert coefficients[2] != coefficients[1]


def test_no_warmup_carries_no_count() -> None:
    made, _ = runner("ppo", roles("ppo"))
    made.improve(rollout(4))
    assert "critic_steps" not in made.learner.scalars


@pytest.mark.parametrize("kill_at", [1, 3])
def test_a_stage_killed_in_its_warmup_or_after_it_resumes_bit_for_bit(tmp_path: Path, kill_at: int) -> None:
    whole = run("ppo", tmp_path / "whole", critic_warmup=2)
    with pytest.raises(Killed):
        run("ppo", tmp_path / "pieces", kill_at=kill_at, critic_warmup=2)
    pieces = run("ppo", tmp_path / "pieces", critic_warmup=2)
    assert all(same_weights(pieces[name], whole[name]) for name in whole)
    assert rows(tmp_path / "pieces") == rows(tmp_path / "whole")
    norms = torch.tensor([row["grad_norm"] for row in rows(tmp_path / "whole")])
    assert (norms == 0).tolist() == [True, True] + [False] * (STEPS - 2)


def test_a_plan_measures_steps_that_train_both() -> None:
    config = load_recipe("tiny", ["stage.ppo.critic_warmup=1"]).config
    assert shortened(config).stage["ppo"] == load_recipe("tiny").config.stage["ppo"]


def test_a_warmup_that_leaves_the_policy_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="critic_warmup = 100 leaves the policy none of 100 steps"):
        build(PPOConfig, {"critic_warmup": 100})
    off, on = (settings_of(PPOConfig(critic_warmup=steps)).keys() for steps in (0, 3))
    assert on - off == {"critic_warmup"}

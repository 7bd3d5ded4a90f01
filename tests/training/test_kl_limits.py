"""The KL coefficient that is steered, and the budget that ends a stage: docs/algorithms/ppo.md."""

import math
import os
import shutil
import signal
from pathlib import Path

import pytest
from counting import Counting, play
from resuming import STEPS, Killed, rows, run

from preftune import faults
from preftune.algorithms.ppo import PPO
from preftune.config import PPOConfig
from preftune.config.load import build
from preftune.errors import ConfigError, DataError, StorageError
from preftune.records.run import RunRecord
from preftune.records.stage import StageRecord
from preftune.report.sections.cautions import cautions
from preftune.report.view import RunView, StageView
from preftune.rundir import read_json
from preftune.runs.stages import settings_of
from preftune.stops import Interrupted, handled
from preftune.training import checkpoint
from preftune.training.learner import Learner
from preftune.training.loop import EarlierState
from tiny import roles, same_weights

# Twice the target and more counts as 1.2 times it; 10 % below as that. 64 of 10,000 responses a step.
STEERED = [
    (12.0, 0.1 * 1.00128),
    (5.4, 0.1 * 1.00128 * (1 - 0.00064)),
    (math.nan, 0.1 * 1.00128 * (1 - 0.00064)),
]


def test_the_coefficient_moves_as_in_ziegler_et_al() -> None:
    learner = Learner()
    ppo = PPO(PPOConfig(kl_coef=0.1, kl_target=6.0), roles("ppo"), learner)
    for kl, expected in STEERED:
        ppo.steer(kl, 64)
        assert ppo.kl_coef == pytest.approx(expected, rel=1e-12)
    fixed = PPO(PPOConfig(kl_coef=0.1), roles("ppo"), Learner())
    fixed.steer(12.0, 64)
    assert fixed.kl_coef == 0.1


def test_a_coefficient_of_nothing_cannot_be_steered() -> None:
    with pytest.raises(ConfigError, match="cannot steer kl_coef = 0"):
        build(PPOConfig, {"kl_coef": 0.0, "kl_target": 6.0})


def test_a_horizon_counted_in_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="kl_horizon = 12 counts responses, and a step has 64"):
        build(PPOConfig, {"kl_target": 6.0, "kl_horizon": 12, "batch_size": 64})
    assert build(PPOConfig, {"kl_target": 6.0, "kl_horizon": 13, "batch_size": 64}).kl_horizon == 13


def test_a_steered_stage_resumes_bit_for_bit(tmp_path: Path) -> None:
    steered = {"kl_target": 0.5, "kl_horizon": 16}
    whole = run("ppo", tmp_path / "whole", **steered)
    with pytest.raises(Killed):
        run("ppo", tmp_path / "pieces", kill_at=4, **steered)
    pieces = run("ppo", tmp_path / "pieces", **steered)
    assert all(same_weights(pieces[name], whole[name]) for name in whole)
    assert rows(tmp_path / "pieces") == rows(tmp_path / "whole")
    used = [row["kl_coef"] for row in rows(tmp_path / "whole")]
    assert len(set(used)) == STEPS  # each step had another one: what is compared moves
    last = checkpoint.checkpoint_at(tmp_path / "whole" / "checkpoints", STEPS)
    assert read_json(last / "state.json")["kept"]["kl_coef"] != used[-1]  # that of the step to come


def drift(out: Path, every: int, most: float, kill_at: int = 0) -> tuple[EarlierState | None, float]:
    """Each step measures as its KL how many there were before it."""
    algorithm = Counting(lambda before: {"kl": float(before)})
    ended = play(algorithm, out, every, kill_at, budget=("kl", most))
    return ended, algorithm.moved


@pytest.mark.parametrize(
    ("every", "kept"),
    [
        (1, 3),  # step 5 measures the KL after step 4, which is too much; that after step 3 was not
        (2, 2),
        (4, 0),  # a checkpoint of step 4 is there, and is the one that is beyond the budget
        (50, 0),
    ],
)
def test_beyond_the_budget_the_last_healthy_checkpoint_is_kept(tmp_path: Path, every: int, kept: int) -> None:
    assert drift(tmp_path, every, 3.5) == (EarlierState(5, 4.0, kept), pytest.approx(kept, abs=1e-3))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_killed_after_it_was_beyond_it_ends_at_the_same_place(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        drift(tmp_path, 2, 3.5, kill_at=5)
    assert drift(tmp_path, 2, 3.5) == (EarlierState(5, 4.0, 2), pytest.approx(2, abs=1e-3))


@pytest.mark.parametrize(("every", "most", "after", "kept"), [(2, 3.5, 3, 2), (4, 7.5, 7, 4)])
def test_what_a_signal_left_is_no_place_to_end_at(
    tmp_path: Path, every: int, most: float, after: int, kept: int
) -> None:
    """A stopped stage ends as one that was not, and what was due is still there."""

    def measured(before: int) -> dict[str, float]:
        if before == after - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"kl": float(before)}

    whole = drift(tmp_path / "whole", every, most)
    assert whole[0] is not None
    assert whole[0].kept == kept
    with handled(), pytest.raises(Interrupted, match=f"after step {after} of 9"):
        play(Counting(measured), tmp_path / "pieces", every, budget=("kl", most))
    assert drift(tmp_path / "pieces", every, most) == whole


def test_without_a_checkpoint_to_go_back_to_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        drift(tmp_path, 4, 3.5, kill_at=5)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000000")
    with pytest.raises(DataError, match=r"step 5 measures 4, beyond the budget of 3\.5, and no"):
        drift(tmp_path, 4, 3.5)


def test_where_none_was_due_an_older_one_does(tmp_path: Path) -> None:
    """The interval was another before, or a stage that had ended was made longer."""
    with pytest.raises(Killed):
        drift(tmp_path, 3, 3.5, kill_at=5)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000000")
    assert drift(tmp_path, 50, 3.5) == (EarlierState(5, 4.0, 3), pytest.approx(3, abs=1e-3))


def test_a_state_to_go_back_to_is_written_once_every_process_has_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the others would find it, and take it for one to resume from."""
    happened, save = list[str](), checkpoint.save
    monkeypatch.setattr(Learner, "wait", lambda self: happened.append("wait"))
    monkeypatch.setattr(checkpoint, "save", lambda *all: happened.append("save") or save(*all))
    drift(tmp_path, 50, 100.0)
    assert happened[:3] == ["wait", "save", "wait"]


def test_without_a_state_to_go_back_to_no_stage_begins(tmp_path: Path) -> None:
    faults.arm("checkpoint.open:enospc")
    try:
        with pytest.raises(StorageError, match="cannot write a checkpoint"):
            drift(tmp_path, 2, 3.5)
    finally:
        faults.arm("")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_within_the_budget_nothing_ends(tmp_path: Path) -> None:
    assert drift(tmp_path, 3, 100.0) == (None, pytest.approx(9, abs=1e-3))


def test_record_and_report_say_that_it_ended_early() -> None:
    record = StageRecord.model_validate({"kl_budget": {"step": 5, "value": 12.34, "kept": 3}})
    stage = StageView(name="ppo", status="finished", record=record)
    none = dict.fromkeys(("policies", "comparisons", "mistakes", "missing"), ())
    run = RunView(
        name="run",
        config={},
        config_text="",
        record=RunRecord(),
        data=None,
        stages=(stage,),
        reward_model=None,
        samples={},
        **none,
    )
    words = "ppo stopped at step 5: its KL of 12.3 nats a response is beyond kl_budget; "
    words += "its model is that after step 3."
    assert words in cautions(run)


def test_what_is_off_is_in_no_key() -> None:
    off, on = PPOConfig(), PPOConfig(kl_target=6.0, kl_horizon=500, kl_budget=10.0)
    assert settings_of(on).keys() - settings_of(off).keys() == {"kl_target", "kl_horizon", "kl_budget"}

"""checkpoint.best: the checkpoint of most worth is what a stage ends with, however often it was killed."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from counting import Counting, play
from resuming import BATCHES, Killed, prepare

import prose
from preftune import faults
from preftune.algorithms import ALGORITHMS
from preftune.config import GRPOConfig, PPOConfig
from preftune.stops import Interrupted, handled, stopping_point
from preftune.training.checkpoint import newest_step
from preftune.training.loop import EarlierState, Worth
from tiny import online, same_weights, state

COURSE = [0.0, 1.0, 5.0, 3.0, 4.0, 4.5, 2.0, 1.0, 0.0]  # of what steps 1 ... 9 measure


def trained(
    out: Path,
    every: int,
    by_steps: bool,
    kill_at: int = 0,
    during: Callable[[int], None] = lambda step: None,
    **plan: Any,
) -> tuple[EarlierState | None, int]:
    algorithm = Counting(lambda before: {"score": COURSE[before]})

    def measure() -> float:
        during(algorithm.steps)
        stopping_point("forward")
        return COURSE[algorithm.steps - 1]

    worth = Worth(of_step=lambda row: row["score"]) if by_steps else Worth(measure=measure)
    ended = play(algorithm, out, every, kill_at, worth=worth, **plan)
    return ended, algorithm.steps


BY_STEPS = EarlierState(9, 4.25, 6, "best")  # steps 5 and 6; before them 0.5 and 4, after them 1.5 and 0
NOW = EarlierState(9, 4.5, 6, "best")  # checkpoints of 2, 4, 6, 8, 9 measure 1, 3, 4.5, 1, 0


@pytest.mark.parametrize(("by_steps", "best"), [(True, BY_STEPS), (False, NOW)])
@pytest.mark.parametrize("kills", [(), (5, 8), (7, 9)])
def test_the_best_checkpoint_is_kept(
    tmp_path: Path, by_steps: bool, best: EarlierState, kills: tuple[int, ...]
) -> None:
    for kill_at in kills:
        with pytest.raises(Killed):
            trained(tmp_path, 2, by_steps, kill_at)
    assert trained(tmp_path, 2, by_steps) == (best, 6)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000006", "step-000009"]


# KL is measured before a step's updates: step 6, after checkpoints of 1 ... 5, is beyond the budget of 4.5.
@pytest.mark.parametrize(
    ("course", "every", "kept"),
    [
        ([0.0, 5.0, 3.0, 4.0, 1.0, 2.0], 1, 2),  # the best of 1 ... 4
        ([0.0, 5.0, 3.0, 4.0, 9.0, 2.0], 1, 2),  # 5 is the best, and beyond the budget
        ([0.0, 1.0, 3.0, 4.0, 1.0, 2.0], 1, 4),
        ([0.0, 5.0, 3.0, 4.0, 1.0, 2.0], 2, 2),
        ([0.0, 5.0, 3.0, 4.0, 1.0, 2.0], 50, 0),
    ],
)
@pytest.mark.parametrize("kills", [(), (5, 6)])
def test_a_stage_that_ends_by_its_budget_ends_with_the_best_checkpoint_within(
    tmp_path: Path, course: list[float], every: int, kept: int, kills: tuple[int, ...]
) -> None:
    def attempt(kill_at: int = 0) -> tuple[EarlierState | None, int]:
        algorithm = Counting(lambda before: {"kl": float(before)})
        worth = Worth(measure=lambda: course[algorithm.steps - 1])
        ended = play(algorithm, tmp_path, every, kill_at, worth=worth, budget=("kl", 4.5))
        return ended, algorithm.steps

    for kill_at in kills:
        with pytest.raises(Killed):
            attempt(kill_at)
    assert attempt() == (EarlierState(6, 5.0, kept), kept)


def test_stopped_while_a_checkpoint_is_weighed_loses_nothing(tmp_path: Path) -> None:
    def stop(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with handled(), pytest.raises(Interrupted, match="after step 6 of 9;"):
        trained(tmp_path, 2, by_steps=False, during=stop)
    assert newest_step(tmp_path / "checkpoints") == 6
    assert trained(tmp_path, 2, by_steps=False) == (NOW, 6)


def test_a_best_one_that_could_not_be_written_is_none(tmp_path: Path) -> None:
    faults.arm("checkpoint.file@step=6:enospc")
    try:
        assert trained(tmp_path, 2, by_steps=False) == (EarlierState(9, 3.0, 4, "best"), 4)
    finally:
        faults.arm("")


def test_a_best_one_that_is_damaged_is_said(tmp_path: Path) -> None:
    best, said = tmp_path / "checkpoints" / "step-000006", list[str]()

    def damage(path: Path) -> None:
        if path.name == "step-000008":
            (best / "state.json").write_text("")

    found = trained(tmp_path, 2, by_steps=False, on_saved=damage, say=said.append)
    assert found == (None, 9)
    (line,) = said
    assert str(best) in line
    assert line.endswith("that of step 9")
    prose.compare("training/best: the best checkpoint is damaged", line.replace(str(best), "BEST"))


def test_with_a_budget_a_damaged_best_one_leaves_the_newest_within_it(tmp_path: Path) -> None:
    algorithm, best, said = Counting(lambda before: {"kl": float(before)}), "step-000002", list[str]()
    worth = Worth(measure=lambda: -abs(algorithm.steps - 2.0))

    def damage(path: Path) -> None:
        if path.name == "step-000004":
            (path.with_name(best) / "state.json").write_text("")

    budget = ("kl", 4.5)
    ended = play(algorithm, tmp_path, 1, worth=worth, budget=budget, on_saved=damage, say=said.append)
    assert (ended, algorithm.steps) == (EarlierState(6, 5.0, 4), 4)
    assert [line.rpartition(" of ")[2] for line in said] == ["step 4"]


def test_where_the_last_is_the_best_nothing_is_said(tmp_path: Path) -> None:
    assert trained(tmp_path, 9, by_steps=False) == (None, 9)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if not online(name)])
def test_a_held_out_loss_is_that_of_an_update_and_changes_nothing(algorithm: str) -> None:
    made, learner, models = prepare(algorithm)
    batch = BATCHES[ALGORITHMS[algorithm].Config.batch](3, 8)
    before = {name: state(models[name].model) for name in learner.trained}
    learner.begin_step()
    with learner.measuring():
        measured = made.step(batch)["loss"]
    assert learner.updates == 0
    assert all(same_weights(state(models[name].model), before[name]) for name in before)
    assert all(p.grad is None for name in before for p in models[name].model.parameters())
    assert measured == pytest.approx(made.step(batch)["loss"], abs=1e-6)
    assert not all(same_weights(state(models[name].model), before[name]) for name in before)


def test_the_worth_of_a_step_is_its_score_less_the_penalty() -> None:
    assert PPOConfig(kl_coef=0.1).worth({"objective/scores": 2.0, "objective/kl": 3.0}) == pytest.approx(1.7)
    assert GRPOConfig(kl_coef=0.1).worth({"reward": 2.0, "kl_per_sequence": 3.0}) == pytest.approx(1.7)

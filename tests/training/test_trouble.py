"""Numbers that are not finite, and disks that are full: what is skipped, what is kept, what is said."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import resuming
from resuming import EVERY, STEPS, prepare, rows, run
from torch import Tensor

from preftune import faults
from preftune.data import Sequences
from preftune.errors import BackendMissing, DataError, PreftuneError, StorageError
from preftune.rundir import read_jsonl
from preftune.stops import Interrupted, handled
from preftune.training import checkpoint, metrics
from preftune.training.checkpoint import check_space, newest_step
from tiny import online, same_weights


@EVERY
def test_a_step_that_is_not_finite_is_skipped_counted_and_written_down(
    algorithm: str, tmp_path: Path
) -> None:
    """It leaves the state as it was: the step before and this one give the same checkpoint."""
    said: list[str] = []
    faults.arm("loss@step=4,hit=3:nan" if online(algorithm) else "loss@step=4:nan")
    run(algorithm, tmp_path, say=said.append)
    made = rows(tmp_path)
    assert [row["skipped"] for row in made] == [0, 0, 0, 1, 0]
    written = json.loads((tmp_path / "nonfinite-step-4.json").read_text())
    assert written["rows"] == ["row 3"]
    assert (written["rewards"] is not None) == online(algorithm)
    assert "loss nan" in written["not_finite"][0]
    assert any("step 4 was skipped" in line for line in said)
    assert sorted(p.name for p in tmp_path.glob("nonfinite*")) == ["nonfinite-step-4.json"]


@pytest.mark.parametrize("algorithm", ["sft", "ppo"])
def test_a_skipped_step_changes_nothing(algorithm: str, tmp_path: Path) -> None:
    """PPO had made updates in this step before the bad one: they are undone."""
    faults.arm("loss@step=5,hit=4:nan" if algorithm == "ppo" else "loss@step=5:nan")
    after = run(algorithm, tmp_path / "bad")
    faults.arm("step@step=5:term")
    with handled(), pytest.raises(Interrupted):
        run(algorithm, tmp_path / "stopped")
    _, learner, models = prepare(algorithm)
    assert checkpoint.restore(tmp_path / "stopped" / "checkpoints", learner) == 4
    for name, weights in after.items():
        assert same_weights(dict(models[name].model.named_parameters()), weights)


def test_a_reward_that_is_not_finite_skips_the_step_and_is_written_down(tmp_path: Path) -> None:
    faults.arm("rewards@step=2:nan")
    run("grpo", tmp_path)
    written = json.loads((tmp_path / "nonfinite-step-2.json").read_text())
    assert all(math.isnan(float(reward)) for reward in written["rewards"])
    assert len(written["rewards"]) == 8


def test_three_in_a_row_stop_the_run_and_are_not_saved(tmp_path: Path) -> None:
    faults.arm("loss@step=3:nan;loss@step=4:nan;loss@step=5:nan")
    with pytest.raises(PreftuneError, match="3 steps in a row") as caught:
        run("sft", tmp_path)
    assert caught.value.code == 70
    assert "step 5: policy: loss nan" in caught.value.message
    assert "nonfinite-step-5.json" in caught.value.message
    assert "learning rate" in caught.value.hint
    assert len(caught.value.message.split("\n")) <= 6
    assert newest_step(tmp_path / "checkpoints") == 4  # its weights are those of step 2


def test_two_in_a_row_do_not_also_after_a_resume(tmp_path: Path) -> None:
    """The count is part of the state: bad, stop, bad, good, bad is no run of three."""
    faults.arm("loss@step=1:nan;step@step=2:term")
    with handled(), pytest.raises(Interrupted):
        run("sft", tmp_path / "a")
    faults.arm("loss@step=2:nan;loss@step=3:nan")
    with pytest.raises(PreftuneError, match="3 steps in a row"):
        run("sft", tmp_path / "a")
    faults.arm("loss@step=1:nan;loss@step=2:nan;loss@step=4:nan;loss@step=5:nan")
    run("sft", tmp_path / "b")


@pytest.mark.parametrize("error", [DataError, BackendMissing])
def test_a_reward_function_that_fails_costs_no_finished_step(
    error: type[PreftuneError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, rule = iter(range(STEPS)), resuming.rule

    def fails(batch: Sequences) -> Tensor:
        if next(calls) == 3:
            raise error("it has no reward for this")
        return rule(batch)

    monkeypatch.setattr(resuming, "rule", fails)
    with pytest.raises(error):
        run("grpo", tmp_path)
    assert newest_step(tmp_path / "checkpoints") == 3


def test_a_full_disk_costs_a_checkpoint_and_a_warning(tmp_path: Path) -> None:
    said: list[str] = []
    whole = run("ppo", tmp_path / "whole")
    faults.arm("checkpoint.file@step=2:enospc")
    pieces = run("ppo", tmp_path / "full", say=said.append)
    assert len(said) == 1
    assert "No space left" in said[0]
    assert sorted(p.name for p in (tmp_path / "full" / "checkpoints").iterdir()) == ["step-000005"]
    assert all(same_weights(pieces[name], whole[name]) for name in whole)


@pytest.mark.parametrize("place", ["open", "file", "manifest", "rename"])
def test_what_was_there_survives_a_full_disk(place: str, tmp_path: Path) -> None:
    faults.arm(f"checkpoint.{place}@step=4:enospc;checkpoint.{place}@step=5:enospc")
    run("sft", tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_rows_wait_in_memory_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    real, calls = metrics.append_jsonl, []

    def flaky(path: Path, row: dict) -> None:
        calls.append(row["step"])
        if 3 <= len(calls) <= 6:
            raise StorageError("No space left on device")
        real(path, row)

    monkeypatch.setattr(metrics, "append_jsonl", flaky)
    run("sft", tmp_path, say=said.append)
    for name in ("metrics", "ledger"):
        assert [row["step"] for row in read_jsonl(tmp_path / f"{name}.jsonl")] == list(range(1, STEPS + 1))
    assert len(said) == 2  # once a file, not once a step


def test_too_little_space_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, learner, _ = prepare("ppo")
    check_space(tmp_path / "deep" / "er", learner)
    needed = 2 * 3 * sum(p.numel() * 4 for t in learner.trained.values() for p in t.role.model.parameters())
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    check_space(tmp_path, learner)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(StorageError, match="are free") as caught:
        check_space(tmp_path, learner)
    assert caught.value.code == 74

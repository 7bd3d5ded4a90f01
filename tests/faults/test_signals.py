"""Signals and locks, as the command line shows them."""

import os
import signal
import time
from pathlib import Path

import pytest
from faultlab import Lab

from preftune.rundir import RunDir
from preftune.training.checkpoint import newest_step

pytestmark = pytest.mark.xdist_group("faults")


def said(lab: Lab, before: int) -> str:
    return lab.log.read_bytes()[before:].decode(errors="replace")


def test_sigterm_between_inner_epochs_saves_and_is_143(lab: Lab, out: Path) -> None:
    run, before = RunDir(lab.fresh("ppo", out)), lab.log.stat().st_size
    assert lab.run("ppo", out, "update@step=4,hit=3:term") == 143
    assert "stopped by SIGTERM after step 3 of 5; the same command resumes" in said(lab, before)
    assert newest_step(run.checkpoints("ppo")) == 3
    assert lab.run("ppo", out) == 0
    assert lab.differs("ppo", out) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_signals_from_outside(lab: Lab, out: Path, number: int, code: int) -> None:
    """Sent while a step sleeps: it is noted, and the step is not finished."""
    run = RunDir(lab.fresh("sft", out))
    life = lab.start("sft", out, "step@step=2:sleep=0.5")
    while not run.metrics("sft").is_file() or not run.metrics("sft").stat().st_size:
        time.sleep(0.005)
    assert life.pid is not None
    os.kill(life.pid, number)
    life.join()
    assert life.exitcode == code
    assert newest_step(run.checkpoints("sft")) == 1
    assert lab.run("sft", out) == 0
    assert lab.differs("sft", out) == []


def test_a_second_ctrl_c_leaves_at_once(lab: Lab, out: Path) -> None:
    run = RunDir(lab.fresh("sft", out))
    life = lab.start("sft", out, "step@step=2:sleep=30")
    while not run.metrics("sft").is_file() or not run.metrics("sft").stat().st_size:
        time.sleep(0.005)
    assert life.pid is not None
    os.kill(life.pid, signal.SIGINT)
    life.join(0.5)
    assert life.is_alive()  # it waits for the step
    began = time.monotonic()
    os.kill(life.pid, signal.SIGINT)
    life.join(20)
    assert life.exitcode == 130
    assert time.monotonic() - began < 15
    assert newest_step(run.checkpoints("sft")) == 0


def test_a_signal_during_a_save_waits_for_it(lab: Lab, out: Path) -> None:
    run = RunDir(lab.fresh("sft", out))
    assert lab.run("sft", out, "checkpoint.file@step=2:term") == 143
    assert newest_step(run.checkpoints("sft")) == 2


def test_before_the_first_step_nothing_is_written(lab: Lab, out: Path) -> None:
    run = RunDir(lab.fresh("ppo", out))
    assert lab.run("ppo", out, "rollout.token@step=1:term") == 143
    assert not run.checkpoints("ppo").exists()


def test_the_second_on_a_directory_leaves_at_once_and_the_first_is_unharmed(lab: Lab, out: Path) -> None:
    run = RunDir(lab.fresh("sft", out))
    life, before = lab.start("sft", out, "step@step=2:sleep=3"), lab.log.stat().st_size
    while not run.metrics("sft").is_file():
        time.sleep(0.005)
    assert lab.run("sft", out) == 73
    assert f"is in use by process {life.pid} on " in said(lab, before)
    life.join()
    assert life.exitcode == 0
    assert lab.differs("sft", out) == []

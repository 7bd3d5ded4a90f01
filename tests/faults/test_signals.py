"""Signals and locks, as the command line shows them."""

import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from faultlab import Lab

from patience import PATIENCE, wait_for
from preftune.rundir import RunDir
from preftune.training.checkpoint import newest_step

pytestmark = pytest.mark.xdist_group("forked")


def said(lab: Lab, before: int) -> str:
    return lab.log.read_bytes()[before:].decode(errors="replace")


def test_sigterm_between_inner_epochs_saves_and_is_143(lab: Lab, out: Path) -> None:
    run, before = RunDir(lab.fresh("ppo", out)), lab.log.stat().st_size
    assert lab.run("ppo", out, "update@step=4,hit=3:term") == 143
    assert "stopped by SIGTERM after step 3" in said(lab, before)
    assert newest_step(run.checkpoints("ppo")) == 3
    assert lab.run("ppo", out) == 0
    assert lab.differs("ppo", out) == []


def begin(lab: Lab, out: Path, fault: str) -> BaseProcess:
    """An SFT stage, as soon as it has come to its fault."""
    before = lab.log.stat().st_size
    life = lab.start("sft", out, fault)
    wait_for(lambda: "fault step: " in said(lab, before), life.is_alive)
    return life


def send(life: BaseProcess, number: int) -> None:
    assert life.pid is not None
    os.kill(life.pid, number)


def end(life: BaseProcess) -> int | None:
    """The exit code."""
    life.join(PATIENCE)
    if life.is_alive():
        life.kill()
        pytest.fail("it does not end")
    return life.exitcode


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_signals_from_outside(lab: Lab, out: Path, number: int, code: int) -> None:
    """Sent in the middle of a step: it is noted, and the step is not finished."""
    run = RunDir(lab.fresh("sft", out))
    life = begin(lab, out, "step@step=2:hold=600")
    send(life, number)
    assert end(life) == code
    assert newest_step(run.checkpoints("sft")) == 1
    assert lab.run("sft", out) == 0
    assert lab.differs("sft", out) == []


def test_a_second_ctrl_c_leaves_at_once(lab: Lab, out: Path) -> None:
    """The step would take twice as long as anybody waits here."""
    run, before = RunDir(lab.fresh("sft", out)), lab.log.stat().st_size
    life = begin(lab, out, f"step@step=2:sleep={2 * PATIENCE:.0f}")
    send(life, signal.SIGINT)
    wait_for(lambda: "saving, then stopping; Ctrl-C again" in said(lab, before), life.is_alive)
    assert life.is_alive()  # it waits for the step
    send(life, signal.SIGINT)
    assert end(life) == 130
    assert newest_step(run.checkpoints("sft")) == 0


@pytest.mark.slow
def test_a_signal_during_a_save_waits_for_it(lab: Lab, out: Path) -> None:
    run = RunDir(lab.fresh("sft", out))
    assert lab.run("sft", out, "checkpoint.file@step=2:term") == 143
    assert newest_step(run.checkpoints("sft")) == 2


@pytest.mark.slow
def test_before_the_first_step_nothing_is_written(lab: Lab, out: Path) -> None:
    run = RunDir(lab.fresh("ppo", out))
    assert lab.run("ppo", out, "rollout.token@step=1:term") == 143
    assert not run.checkpoints("ppo").exists()


def test_the_second_on_a_directory_leaves_at_once_and_the_first_is_unharmed(lab: Lab, out: Path) -> None:
    run, before = RunDir(lab.fresh("sft", out)), lab.log.stat().st_size
    life = begin(lab, out, "step@step=2:hold=600")
    assert lab.run("sft", out) == 73
    assert f"is in use by process {life.pid} on " in said(lab, before)
    assert life.is_alive()
    assert newest_step(run.checkpoints("sft")) == 0
    send(life, signal.SIGUSR2)
    assert end(life) == 0
    assert lab.differs("sft", out) == []

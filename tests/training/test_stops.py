"""Asked to stop at every place of a step: the state is saved, and the same command gives the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from resuming import Wholes, optimizer_digests, rows, run

from patience import wait_for
from preftune import faults, stops
from preftune.stops import Interrupted, deferred, handled, requested
from preftune.training.checkpoint import newest_step
from preftune.training.state import TrainState
from sweeps import ALL
from tiny import same_weights

pytestmark = pytest.mark.xdist_group("wholes")  # one worker trains them

# In step 4: after the checkpoint of step 2, before that of step 4; the first and later times of each place.
# An update of PPO's policy, of its critic, and in its second epoch again; all of them in `make sweeps`.
HITS = range(1, 9) if ALL else (1, 4, 5, 8)
PLACES = {
    "sft": ["step", "forward", "forward@hit=3", "updated", "checkpoint.file"],
    "dpo": ["forward@hit=2", "forward@hit=4", "update"],
    "reward": ["forward@hit=2"],
    "grpo": [
        "rollout.token",
        "rollout.token@hit=3",
        "update@hit=1",
        "update@hit=2",
        "update@hit=4",
        "updated@hit=4",
    ],
    "ppo": ["rollout.token", "forward@hit=3", *(f"update@hit={n}" for n in HITS), "updated@hit=8"],
}


def armed(place: str, action: str = "term", step: int = 4) -> None:
    name, _, hit = place.partition("@")
    faults.arm(f"{name}@step={step}{',' if hit else ''}{hit}:{action}")


@pytest.mark.parametrize(("algorithm", "place"), [(a, p) for a, places in PLACES.items() for p in places])
def test_stopped_anywhere_in_a_step_and_resumed_equals_uninterrupted(
    algorithm: str, place: str, tmp_path: Path, wholes: Wholes
) -> None:
    uninterrupted, whole = wholes(algorithm)
    armed(place)
    with handled(), pytest.raises(Interrupted) as caught:
        run(algorithm, tmp_path / "pieces")
    assert caught.value.code == 143
    # Nothing but the step that was under way is lost; a signal during a save waits for it.
    finished = 4 if place.startswith("checkpoint") or (place == "updated" and algorithm == "sft") else 3
    saved = newest_step(tmp_path / "pieces" / "checkpoints")
    assert saved == (4 if place == "updated@hit=4" or place == "updated@hit=8" else finished)
    faults.arm("")
    pieces = run(algorithm, tmp_path / "pieces")
    assert all(same_weights(pieces[name], whole[name]) for name in whole)
    assert optimizer_digests(tmp_path / "pieces") == optimizer_digests(uninterrupted)
    assert rows(tmp_path / "pieces") == rows(uninterrupted)
    ledgers = [(out / "ledger.jsonl").read_bytes() for out in (tmp_path / "pieces", uninterrupted)]
    assert ledgers[0] == ledgers[1]


def test_before_the_first_step_is_done_nothing_is_written(tmp_path: Path) -> None:
    armed("rollout.token", step=1)
    with handled(), pytest.raises(Interrupted, match="after step 0 of 5;"):
        run("ppo", tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_ctrl_c_is_130(tmp_path: Path) -> None:
    armed("update", "int")
    with handled(), pytest.raises(Interrupted) as caught:
        run("sft", tmp_path)
    assert caught.value.code == 130


def test_a_second_ctrl_c_is_at_once() -> None:
    with handled(), deferred(anywhere=False):
        os.kill(os.getpid(), signal.SIGINT)
        assert requested() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        stops._state.number = 0  # or leaving would raise


def test_outside_the_loop_a_signal_ends_the_command_at_once() -> None:
    with handled(), pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before


def test_the_message_names_step_and_what_is_lost(tmp_path: Path) -> None:
    armed("update@hit=2")
    with handled(), pytest.raises(Interrupted) as caught:
        run("ppo", tmp_path)
    assert caught.value.message == "stopped by SIGTERM after step 3 of 5; the same command resumes"
    faults.arm("update@step=4,hit=2:term;checkpoint.file@step=4:enospc")
    with handled(), pytest.raises(Interrupted, match="step 3 of 5, work since step 2 will be done"):
        run("ppo", tmp_path / "full")


def test_without_the_copy_in_memory_the_result_would_be_another(
    tmp_path: Path, wholes: Wholes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above can fail: the weights in the middle of a step are not those of its beginning."""
    _, whole = wholes("ppo")
    monkeypatch.setattr(TrainState, "copied", lambda self, into=None: self)
    armed("update@hit=5")
    with handled(), pytest.raises(Interrupted):
        run("ppo", tmp_path)
    assert newest_step(tmp_path / "checkpoints") == 3
    faults.arm("")
    assert not same_weights(run("ppo", tmp_path)["policy"], whole["policy"])


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals")
def test_a_terminal_that_closes_is_a_wish_to_stop_but_not_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the suite itself may run under nohup
    try:
        with pytest.raises(stops.Interrupted, match="SIGHUP") as caught, stops.handled():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(1)
        assert caught.value.code == 143
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stops.handled():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stops.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with stops.handled():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not stops.requested()
    finally:
        signal.signal(signal.SIGUSR1, before)


CHILD = """
import sys, time
from preftune import stops
try:
    with stops.handled():
        stops.end_with_parent()
        print("there", flush=True)
        time.sleep(600)
except stops.Interrupted as stop:
    sys.exit(stop.code)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_child_ends_with_its_parent_however_that_ends() -> None:
    words = [sys.executable, "-c", PARENT, CHILD]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    try:
        wait_for(lambda: over(child))
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        raise


def over(process: int) -> bool:
    """Gone, or ended with nobody to ask how."""
    try:
        return "State:\tZ" in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True

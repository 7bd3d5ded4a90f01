"""Two gloo processes: one notices the loss of the other, shares its trouble, waits for its files."""

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gloo import join, two
from patience import PATIENCE
from preftune import faults
from preftune.algorithms.base import Loss, Metrics
from preftune.config import load_recipe
from preftune.data import Sequences
from preftune.errors import ProcessLost
from preftune.functional import token_mean
from preftune.models.roles import Policy
from preftune.rundir import BASE
from preftune.runs import runner
from preftune.training import processes, summing
from preftune.training.learner import Learner
from preftune.training.processes import answering
from tiny import NO_CLIPPING, causal_lm, flat, sequences, state

SECONDS = 10.0  # that one process waits for the other: more than a busy machine keeps a process from running


def add_twice(rank: int, port: int, number: int, told: Connection) -> None:
    """Two sums over both processes; in between, process 1 gets the signal `number`."""
    join(rank, port)
    learner = Learner(process_timeout=SECONDS)
    at_exit: list[Any] = []
    processes.atexit = SimpleNamespace(register=lambda *what: at_exit.append(what))  # type: ignore[assignment]
    told.send(learner.total(torch.tensor(1.0)).item())
    if rank == 1:
        os.kill(os.getpid(), number)
    try:
        with answering(SECONDS):
            learner.total(torch.tensor(1.0))
            told.send("answered")
    except ProcessLost as error:
        told.send((error.message, error.code))
        for end, *arguments in at_exit:
            end(*arguments)
    os._exit(0)  # the process group cannot be taken down in order


@pytest.mark.xdist_group("forked")
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGSTOP, "process 1 of 2 (counted from 0) has not answered for 10 s"),
        (signal.SIGKILL, "another process of this run has ended"),
    ],
)
def test_a_process_that_hangs_or_dies_is_noticed_by_the_other(number: int, message: str) -> None:
    with two(add_twice, number) as ears:
        assert [ear.poll(PATIENCE) and ear.recv() for ear in ears] == [2.0, 2.0]
        assert ears[0].poll(PATIENCE)
        assert ears[0].recv() == (message, 75)
        assert ears[1].poll(PATIENCE)
        with pytest.raises(EOFError):  # the other is gone, too, if it was stopped before
            ears[1].recv()


def taught() -> tuple[Learner, Callable[[], Metrics], Callable[[], torch.Tensor], list[str]]:
    """A learner, one update of 8 rows in microbatches of 2, the weights, and what was said."""
    said: list[str] = []
    learner = Learner(microbatch_size=2, process_timeout=PATIENCE, say=said.append)
    policy = Policy(causal_lm(1))
    learner.adopt("policy", policy, torch.optim.SGD(policy.model.parameters(), lr=1.0), NO_CLIPPING)
    batch = sequences(5, 8)
    weights = token_mean(batch.response)

    def loss(part: Sequences) -> Loss:
        return Loss(-policy.logprobs(part))

    def update() -> Metrics:
        return learner.update("policy", learner.place(batch), learner.place(weights), loss)

    return learner, update, lambda: flat(state(policy.model)), said


def update_twice(rank: int, port: int, told: Connection) -> None:
    """Process 1 runs out of memory in its last microbatch, and meets a NaN in the next update."""
    join(rank, port)
    summing._LARGE = 500  # some gradients alone, others together
    learner, update, weights, said = taught()
    faults.arm("loss@hit=2:oom" if rank == 1 else "")
    told.send((update()["grad_norm"], said, weights().tolist()))
    faults.arm("loss@hit=1:nan" if rank == 1 else "")
    update()
    told.send((learner.not_finite, weights().tolist()))


@pytest.mark.xdist_group("forked")
def test_what_one_process_meets_in_an_update_both_take_together() -> None:
    _, update, weights, _ = taught()
    norm, alone = update()["grad_norm"], weights()
    with two(update_twice) as ears:
        first = [ear.poll(PATIENCE) and ear.recv() for ear in ears]
        second = [ear.poll(PATIENCE) and ear.recv() for ear in ears]
    quiet, (line,) = (said for _, said, _ in first)
    assert not quiet
    assert "with 2 rows at a time" in line
    assert line.endswith("going on with 1")
    assert first[0][2] == first[1][2]
    assert [got for got, _, _ in first] == pytest.approx([norm, norm], rel=1e-5)
    assert torch.tensor(first[0][2]) == pytest.approx(alone, abs=1e-6)
    for not_finite, after in second:
        assert "loss nan" in not_finite[0]
        assert after == first[0][2]


def gather_and_update(rank: int, port: int, told: Connection) -> None:
    """Rows of unequal number and width, and an update on one row: process 0 has none of it."""
    join(rank, port)
    learner = Learner(process_timeout=PATIENCE)
    told.send(learner.gather(torch.full((2 - rank, 2 + rank), rank + 1)).tolist())
    told.send(learner.gather(torch.tensor([rank == 1])).tolist())
    told.send(learner.share([1, 2, 3]))
    told.send(one_row(learner))


def one_row(learner: Learner) -> Any:
    policy = Policy(causal_lm(1))
    learner.adopt("policy", policy, torch.optim.SGD(policy.model.parameters(), lr=1.0), NO_CLIPPING)
    row = learner.share(sequences(5, 1))
    metrics = learner.update("policy", row, token_mean(row.response, 3), lambda part: one_loss(policy, part))
    return metrics, flat(state(policy.model)).tolist()


def one_loss(policy: Policy, part: Sequences) -> Loss:
    return Loss(-policy.logprobs(part), {"ones": torch.ones_like(part.response).float()})


@pytest.mark.xdist_group("forked")
def test_a_process_without_rows_takes_part_in_the_update_of_the_others() -> None:
    metrics, weights = one_row(Learner())
    with two(gather_and_update) as ears:
        heard = [[ear.poll(PATIENCE) and ear.recv() for _ in range(4)] for ear in ears]
    for rows, flags, share, (together, moved) in heard:
        assert (rows, flags) == ([[1, 1, 0], [1, 1, 0], [2, 2, 2]], [False, True])
        assert share in ([1], [2, 3])
        assert together == pytest.approx(metrics, rel=1e-5)
        assert moved == pytest.approx(weights, abs=1e-6)


def fetch_slowly(rank: int, port: int, file: Path, told: Connection) -> None:
    """Process 0 takes its time to fetch a stage from a mirror; what does each find when the stage begins?"""
    join(rank, port)

    def fetch(stage: str) -> None:
        time.sleep(1)
        file.touch()

    runner.run_stage = lambda session, stage: told.send(file.exists())
    runner.what_is_kept, runner.settle = (lambda session, names: ()), (lambda run, stage: None)
    session: Any = SimpleNamespace(
        config=load_recipe("tiny").config,
        mirror=SimpleNamespace(fetch=fetch, put_stage=lambda stage: None),
        origin=None,
        dataset=None,
        run=None,
        scratch=[BASE],
        stage=lambda name: SimpleNamespace(name=name, makes_model=True),
    )
    runner.train_stages(session, [])


@pytest.mark.xdist_group("forked")
def test_every_process_begins_a_stage_with_what_the_first_has_fetched(tmp_path: Path) -> None:
    with two(fetch_slowly, tmp_path / "fetched") as ears:
        assert [ear.poll(PATIENCE) and ear.recv() for ear in ears] == [True, True]


def test_a_process_that_never_comes_is_said() -> None:
    with pytest.raises(ProcessLost, match="has not come within 10 s") as caught, answering(SECONDS):
        raise torch.distributed.DistStoreError("wait timeout after 2000ms, keys: /default_pg/0//cpu//0/0")
    assert caught.value.code == 75

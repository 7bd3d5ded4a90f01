"""A process of two that hangs: the other one ends with an error that names it. Two gloo processes."""

import multiprocessing
import os
import signal
import socket
import time
from multiprocessing.connection import Connection

import pytest
import torch

from preftune.errors import ProcessLost
from preftune.training.learner import Learner
from preftune.training.processes import answering

SECONDS = 2.0


def work(rank: int, port: int, number: int, told: Connection) -> None:
    """Two sums over both processes; in between, process 1 gets the signal `number`."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    learner = Learner(process_timeout=SECONDS)
    told.send(learner.total(torch.tensor(1.0)).item())
    if rank == 1:
        os.kill(os.getpid(), number)
    try:
        with answering(SECONDS):
            learner.total(torch.tensor(1.0))
            told.send("answered")
    except ProcessLost as error:
        told.send((error.message, error.code))
    os._exit(0)  # the process group cannot be taken down in order


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGSTOP, "process 1 of 2 (counted from 0) has not answered for 2 s"),
        (signal.SIGKILL, "another process of this run has ended"),
    ],
)
def test_a_process_that_hangs_or_dies_is_noticed_by_the_other(number: int, message: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preftune.training.learner"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    both = [context.Process(target=work, args=(i, port, number, pipes[i][1])) for i in range(2)]
    for process in both:
        process.start()
    try:
        ears = [pipe[0] for pipe in pipes]
        assert [ear.poll(60) and ear.recv() for ear in ears] == [2.0, 2.0]
        began = time.monotonic()
        assert ears[0].poll(60)
        assert ears[0].recv() == (message, 75)
        assert time.monotonic() - began < 30
    finally:
        for process in both:
            process.kill()
            process.join()

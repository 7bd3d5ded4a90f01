"""Processes that have imported torch already: one, or two of one run over gloo, as torchrun starts them."""

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

PRELOAD = [
    *("preftune.cli", "preftune.runs.runner", "preftune.training.learner", "preftune.measure.write_up"),
    *("transformers.models.gpt2.modeling_gpt2", "transformers.models.auto.modeling_auto"),
]


def join(rank: int, port: int) -> None:
    """Make this process one of two, by what torchrun would set."""
    gc.freeze()  # what was imported before the fork is not looked at again
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}


def forkserver() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def begun(work: Callable[..., None], *more: Any) -> ForkServerProcess:
    """`work(*more)` in a process of its own, which may be killed."""
    process = forkserver().Process(target=work, args=more)
    process.start()
    return process


@contextmanager
def two(work: Callable[..., None], *more: Any) -> Iterator[list[Connection]]:
    """`work(rank, port, *more, told)` in two processes; gives what they tell."""
    context = forkserver()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    both = [context.Process(target=work, args=(i, port, *more, pipes[i][1])) for i in range(2)]
    for process in both:
        process.start()
    for _, own in pipes:
        own.close()  # a process that has ended is heard
    try:
        yield [pipe[0] for pipe in pipes]
    finally:
        for process in both:
            process.kill()
            process.join()

"""Passes that do not depend on each other, each on one thread of the processor.

A pass through one short row is mostly small products, which two threads share at little more than half of
their speed; two rows at a time keep both busy. What one thread has computed does not depend, in its last bits
either, on how many there are.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

In = TypeVar("In")
Out = TypeVar("Out")


def side_by_side(function: Callable[[In], Out], items: Sequence[In], device: torch.device) -> list[Out]:
    """function(item) of each, in order: on a CPU as many at a time as torch has threads, elsewhere in turn.

    Autocast is that of the caller; gradient mode and the like are not, and `function` sets them itself. Fewer
    items than threads leave some of them idle: on all of them the last bits would depend on their number.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return [function(item) for item in items]
    mixed, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def alone(item: In) -> Out:
        # All three of this thread of Python alone. To leave `torch.autocast` would empty the cache of all.
        torch.set_num_threads(1)
        torch.set_autocast_enabled("cpu", mixed)
        torch.set_autocast_dtype("cpu", dtype)
        return function(item)

    futures = list[Future[Out]]()
    try:
        for item in items:
            futures.append(_pool(threads).submit(alone, item))
        return [future.result() for future in futures]
    finally:
        for future in futures:  # after an error or a signal: what runs ends here, the others do not begin
            future.cancel()
        wait(futures)
        torch.set_num_threads(threads)  # a thread that begins later takes the last number


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="preftune")


if hasattr(os, "register_at_fork"):  # a child of a fork has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)

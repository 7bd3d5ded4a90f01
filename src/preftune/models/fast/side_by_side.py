"""Passes that do not depend on each other, each on one thread of the processor.

A pass through one short row is mostly small products, which two threads share at little more than half of
their speed; two rows at a time keep both busy. What one thread has computed does not depend, in its last bits
either, on how many there are.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

In, Out = TypeVar("In"), TypeVar("Out")


def side_by_side(function: Callable[[In], Out], items: Sequence[In], device: torch.device) -> list[Out]:
    """function(item) of each, in order: on a CPU as many at a time as torch has threads, elsewhere in turn.

    Autocast is that of the caller; gradient mode and the like are not, and `function` sets them itself.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return [function(item) for item in items]
    mixed, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def alone(item: In) -> Out:
        torch.set_num_threads(1)  # of this thread of Python
        with torch.autocast("cpu", dtype, enabled=mixed):
            return function(item)

    futures = [_pool(threads).submit(alone, item) for item in items]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:  # after an error or a signal: what runs ends here, the others do not begin
            future.cancel()
        wait(futures)
        torch.set_num_threads(threads)  # a thread that begins later takes the last number


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="preftune")

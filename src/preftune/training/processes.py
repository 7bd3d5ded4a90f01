"""The other processes of a run: what it means when one of them does not answer."""

import atexit
import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed
from torch.distributed import distributed_c10d

from preftune.errors import ProcessLost
from preftune.faults import KILL

_SILENT = ("Timed out waiting", "timed out", "Timeout")  # gloo, the store, the NCCL watchdog
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
_GRACE = 3.0  # seconds in which those that wait, too, say so
_met: list[str] = []  # machine, number and parent of each process
_RESUMES = "the same command resumes from the last checkpoint"


def world_size() -> int:
    """How many processes there are."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if several else 1


@contextmanager
def answering(seconds: float) -> Iterator[None]:
    """Turn what a collective operation says of another process that is silent or gone into ProcessLost.

    `seconds` is how long the operation waits, for the message; the process group has the limit itself.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if not torch.distributed.is_initialized():
            if "wait timeout" not in message:  # the store's, where processes look for each other
                raise
            problem = f"another process of this run has not come within {seconds:g} s"
            hint = "see whether it started; process_timeout=SECONDS waits longer"
            raise ProcessLost(problem, hint) from error
        if any(words in message for words in _GONE):
            hint = f"if its own error is not shown above, it was stopped from outside; {_RESUMES}"
            raise ProcessLost("another process of this run has ended", hint) from error
        if any(words in message for words in _SILENT):
            silent = _silent()
            atexit.register(_end, silent)  # once the error has been shown
            names = ", ".join(f"process {rank}" for rank in silent) or "another process"
            world = torch.distributed.get_world_size()
            problem = f"{names} of {world} (counted from 0) has not answered for {seconds:g} s"
            hint = f"see whether it was stopped or its machine hangs; {_RESUMES}"
            raise ProcessLost(problem, f"{hint}; process_timeout=SECONDS waits longer") from error
        raise


def introduce(gather: Callable[[list[str]], list[str]]) -> None:
    """Tell the processes each other's process ids, once: `gather` returns the items of all of them."""
    if not _met:
        _met.extend(gather([f"{platform.node()} {os.getpid()} {os.getppid()}"]))


def _end(ranks: Sequence[int]) -> None:
    """End silent processes that the same launcher has started on this machine: it would give them half a
    minute to answer, and one that is stopped cannot.
    """
    for process in (_met[rank] for rank in ranks if rank < len(_met)):
        node, number, parent = process.rsplit(" ", 2)
        if (node, int(parent)) == (platform.node(), os.getppid()):
            with contextlib.suppress(OSError):
                os.kill(int(number), KILL)


def _silent() -> list[int]:
    """Ranks that do not report that they are waiting, too; [] where that cannot be found out."""
    own_rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        store = distributed_c10d._get_default_store()  # torch has no public name for it
        store.set_timeout(timedelta(seconds=_GRACE))  # it may be kept by the very process that is silent
        store.set(f"preftune/waiting/{own_rank}", "yes")
        time.sleep(_GRACE)
        return [rank for rank in range(world) if not store.check([f"preftune/waiting/{rank}"])]
    except RuntimeError:
        return []

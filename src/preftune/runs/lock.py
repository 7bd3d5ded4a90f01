"""One writer a run directory: an advisory lock that the system itself frees when a process dies."""

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from typing import TextIO

from preftune.errors import PermissionMissing, RunLocked, StorageError
from preftune.rundir import RunDir


def is_main_process() -> bool:
    """False in the other processes of a distributed run, which torchrun numbers in the environment."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def held(run: RunDir) -> Iterator[None]:
    """Hold the run directory. RunLocked if another process does, PermissionMissing if it is read-only."""
    if not is_main_process():
        yield
        return
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        file = run.lock.open("a+", encoding="utf-8")
    except PermissionError as error:
        raise PermissionMissing(
            f"cannot write to {run.path}: permission denied", hint="use another place with --out DIR"
        ) from error
    except OSError as error:
        raise StorageError(
            f"cannot use {run.path}: {error.strerror}", hint="use another --out DIR"
        ) from error
    with file:
        _take(run, file)
        _sweep(run)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": platform.node()}))
            file.flush()
        yield


def refuse_if_held(run: RunDir) -> None:
    """RunLocked if another process works there: to be asked before anything takes long. Writes nothing."""
    if not is_main_process():
        return
    with contextlib.suppress(OSError):  # what is wrong with the path is said where it is written to
        if run.lock.is_file() and os.access(run.lock, os.R_OK):
            with run.lock.open(encoding="utf-8") as file:
                _take(run, file)


def _take(run: RunDir, file: TextIO) -> None:
    """Lock an open file, until it is closed."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise RunLocked(
            f"{run.path} is in use by {_owner(file.read(200))}",
            hint="wait until it ends, or use another --out DIR",
        ) from None
    except OSError as error:  # a mounted drive that knows no locks
        from preftune.runs.console import Console

        warning = f"warning: {run.path} cannot be locked ({error.strerror}): run one process there at a time"
        Console().line(warning)


def _owner(text: str) -> str:
    """The holder of a lock, from what it wrote into the file."""
    try:
        holder = json.loads(text)
        return f"process {int(holder['pid'])} on {holder['host']!s:.80}"
    except (ValueError, TypeError, KeyError):
        return "another process"


def _sweep(run: RunDir) -> None:
    """Remove what writers left behind that were killed: nobody else writes models and checkpoints here."""
    for stale in (*run.models.glob(".tmp-*"), *run.path.glob("stages/*/checkpoints/.tmp-*")):
        shutil.rmtree(stale, ignore_errors=True)
    for folder in (".", "stages/*", "evaluation", "samples", "analysis", "figures"):
        for stale in run.path.glob(f"{folder}/.*.tmp-[0-9]*"):
            pid = stale.name.rpartition("-")[2]
            if pid.isdecimal() and not _is_alive(int(pid)):  # `preftune report` asks for no lock
                stale.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # alive and another user's, or no number of a process
    return True

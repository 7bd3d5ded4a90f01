"""One writer a run directory: an advisory lock that the system itself frees when a process dies."""

import contextlib
import json
import os
import platform
from collections.abc import Iterator

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
    import fcntl

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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).strip() or "another process"
            raise RunLocked(
                f"{run.path} is in use by {owner}", hint="wait until it ends, or use another --out DIR"
            ) from None
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": platform.node()}))
        file.flush()
        yield

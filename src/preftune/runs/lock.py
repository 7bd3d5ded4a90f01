"""One writer a run directory: an advisory lock that the system itself frees when a process dies; and only a
directory of preftune's own, written to directly, never through a link.
"""

import contextlib
import json
import os
import platform
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from preftune.errors import ConfigError, PermissionMissing, RunLocked, StorageError
from preftune.rundir import RunDir
from preftune.sums import WRITTEN_FILES, WRITTEN_FOLDERS, read_sealed, refuse_links, write_sealed
from preftune.version import __version__

_WRITTEN = (*WRITTEN_FILES, "design.json", "request.json", "study.json", "STUDY.md")
_WRITTEN += ("stages/*", "evaluation/*.json*")
_WRITTEN += ("figures/*.svg", "samples/*_samples.jsonl", "analysis/reward_model_mistakes.jsonl")


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
        refuse_links(run)
        file = os.fdopen(_open_file(run.lock), "r+", encoding="utf-8")
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
        _make_own(run)
        _sweep(run)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            file.seek(0)
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": platform.node()}))
            file.flush()
        yield


def refuse_if_held(run: RunDir) -> None:
    """RunLocked if another process works there: called before anything slow. Writes nothing."""
    if not is_main_process():
        return
    with contextlib.suppress(OSError):  # what is wrong with the path is said where it is written to
        if run.lock.is_file() and os.access(run.lock, os.R_OK):
            with run.lock.open(encoding="utf-8") as file:
                _take(run, file, looks=True)


def is_held(run: RunDir) -> bool:
    """Whether another process works there."""
    try:
        refuse_if_held(run)
    except RunLocked:
        return True
    return False


def _open_file(path: Path) -> int:
    """The lock file, made if need be. OSError for a link; ConfigError for a file with a second name."""
    number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(number)
        raise ConfigError(f"{path} is no lock of preftune", hint="remove it, or use another --out DIR")
    return number


def _make_own(run: RunDir) -> None:
    """Put the marker into a directory that has none. ConfigError if something there would be overwritten that
    preftune did not write: it is recognised by its run.json, or a study's request.json.
    """
    if read_sealed(run.marker):
        return
    foreign = [path for pattern in _WRITTEN for path in sorted(run.path.glob(pattern))]
    if foreign and not _is_of_before(run):
        names = ", ".join(str(path.relative_to(run.path)) for path in foreign[:6])
        raise ConfigError(
            f"{run.path} was not made by preftune and holds {names}, which would be overwritten",
            hint="use another --out DIR, or an empty one",
        )
    write_sealed(run.marker, {"made_by": f"preftune {__version__}"})


def _is_of_before(run: RunDir) -> bool:
    """Whether the directory was made by a preftune that wrote no marker yet."""
    for file, key in ((run.run, "versions"), (run.path / "request.json", "recipe_config")):
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(file.read_text(encoding="utf-8"))
            table = record.get(key) if isinstance(record, dict) else None
            if isinstance(table, dict) and (key != "versions" or "preftune" in table):
                return True
    return False


def _take(run: RunDir, file: TextIO, *, looks: bool = False) -> None:
    """Lock an open file until it is closed. `looks`: with a lock that others who only look may hold, too."""
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if looks else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise RunLocked(
            f"{run.path} is in use by {_owner(file.read(200))}",
            hint="wait until it ends, or use another --out DIR",
        ) from None
    except (OSError, ImportError) as error:  # a mounted drive that knows no locks, or Windows
        if looks:
            return
        from preftune.runs.console import Console

        why = getattr(error, "strerror", None) or "this system has no such locks"
        warning = f"warning: {run.path} cannot be locked ({why}): run one process there at a time"
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
    members = "stages/*/member-*"
    for folder in ("models", "models/*", "collected", "stages/*/checkpoints", f"{members}/checkpoints"):
        for stale in run.path.glob(f"{folder}/.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
    nested = ("models/*", "collected/*", "stages/*", members, "stages/*/parts*", "evaluation/*")
    for folder in (".", *WRITTEN_FOLDERS, *nested):
        for stale in run.path.glob(f"{folder}/.*.tmp-[0-9]*"):
            pid = stale.name.rpartition("-")[2]
            if pid.isdecimal() and not is_alive(int(pid)):  # `preftune report` asks for no lock
                stale.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine is there."""
    if os.name == "nt":  # where the question would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # alive and another user's, or no number of a process
    return True

"""What a study hands out: one task is one process, `preftune study-seed`, wherever it runs.

Whoever carries tasks out, processes here, Slurm or Ray, is a `Crew`: it starts a task and says which have
ended. When a task may start, and what happens to one that was lost, is decided here for all of them.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from preftune.errors import PreftuneError, ProcessLost, RunLocked, StorageError
from preftune.runs.console import Console
from preftune.stops import PATIENCE
from preftune.study.places import point_dir, seed_dir

_POLL = 0.5  # seconds between looks at what has ended
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Another try, or another machine, may fare better. All other errors would come again.
_AGAIN = (RunLocked.code, StorageError.code, ProcessLost.code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A seed, or a part of one. Paths are in full, and the same on every machine.

    `stages`: train these alone and measure nothing; none: the whole seed. `point`: the one of them that has a
    run directory of its own, and hands its result on by the mirror. `after`: what has to be done before.
    """

    out: Path
    seed: int
    reports: bool = True
    mirror: Path | None = None
    stages: tuple[str, ...] = ()
    point: str | None = None
    after: tuple["Task", ...] = ()
    threads: int = 1
    keep: Path | None = None  # numbers of other seeds
    folder: str = ""  # where relative paths of modules begin

    @property
    def name(self) -> str:
        return f"seed {self.seed}" + (f", {self.point}" if self.point else "")

    @property
    def log(self) -> Path:
        run = point_dir(self.out, self.seed, self.point) if self.point else seed_dir(self.out, self.seed)
        return run / "study" / "log.txt"

    @property
    def words(self) -> list[str]:
        """The command line."""
        words = [sys.executable, "-m", "preftune", "study-seed", str(self.out), str(self.seed), "--child"]
        words += [] if self.reports else ["--no-reports"]
        words += [] if self.mirror is None else ["--mirror", str(self.mirror)]
        words += [] if self.keep is None else ["--keep", str(self.keep)]
        words += [word for stage in self.stages for word in ("--stage", stage)]
        return words + ([] if self.point is None else ["--point", self.point])


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedTask:
    """A task that runs no more. `code`: the exit code of its process, below 0 for a signal; None if nobody
    knows, since machine or worker are gone. `complaint`: its last words, if any.
    """

    task: Task
    code: int | None
    complaint: str = ""

    @property
    def may_go_on(self) -> bool:
        """Whether it was ended from outside, or met what passes: a new try goes on from its checkpoint."""
        return self.code is None or self.code < 0 or self.code > 128 or self.code in _AGAIN


class Crew(Protocol):
    """Who carries tasks out."""

    def start(self, task: Task) -> None:
        """Hand a task over; does not wait for it."""
        ...

    def ended_tasks(self) -> Sequence[EndedTask]:
        """Tasks that ended since the last call."""
        ...

    def stop(self) -> None:
        """End what still runs, as SIGTERM would: the next call of the study goes on with it."""
        ...


def begin(task: Task) -> "subprocess.Popen[bytes]":
    """Start a task's process. It reads its input until that ends, which the system sees to when this process
    does, however that comes about.
    """
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("ab") as file:
        return subprocess.Popen(  # noqa: S603
            task.words,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **dict.fromkeys(_THREADS, str(task.threads))},
            cwd=task.folder if os.path.isdir(task.folder) else None,
        )


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Wait for a process that was told to end, for as long as it may take to save."""
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def perform(task: Task) -> tuple[int, str]:
    """Carry a task out on the machine that it was given: exit code and complaint.

    A run directory may still be held by an earlier try, which sees late that its worker is gone.
    """
    until = time.monotonic() + PATIENCE
    while True:
        before = task.log.stat().st_size if task.log.is_file() else 0
        process = begin(task)
        try:
            code = process.wait()
        finally:  # Slurm's warning comes as an exception
            assert process.stdin is not None
            process.stdin.close()
            stop(process)
        if code != RunLocked.code or time.monotonic() > until:
            return code, complaint(task, before)
        time.sleep(1.0)


def complaint(task: Task, begins: int = 0) -> str:
    """The last error in a task's log from a byte on, in at most three lines, or its last line."""
    with task.log.open("rb") as file:
        file.seek(begins)
        lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[starts[-1] :][:3] if starts else lines[-1:]).removeprefix("error: ")


def carry_out(tasks: Sequence[Task], crew: Crew, *, at_once: int, retries: int, console: Console) -> None:
    """Have all tasks done, each when what it waits for is. PreftuneError if one fails, after the others."""
    waiting, done, failed = list(tasks), set[Task](), list[EndedTask]()
    tries, began = Counter[Task](), dict[Task, float]()
    try:
        while True:
            for task in [task for task in waiting if done.issuperset(task.after)][: at_once - len(began)]:
                waiting.remove(task)
                crew.start(task)
                tries[task] += 1
                began[task] = time.monotonic()
                console.line(f"{task.name} started, log {task.log}")
            if not began:
                break
            time.sleep(_POLL)
            for end in crew.ended_tasks():
                took = time.monotonic() - began.pop(end.task)
                if end.code == 0:
                    done.add(end.task)
                    console.line(f"{end.task.name} finished in {took:.0f} s")
                elif end.may_go_on and tries[end.task] <= retries:
                    waiting.insert(0, end.task)
                    console.line(
                        f"{end.task.name} {_end_in_words(end)} after {took:.0f} s; it is begun again"
                    )
                else:
                    failed.append(end)
                    console.line(f"{end.task.name} FAILED: {_end_in_words(end)}")
    finally:
        crew.stop()
    if failed:
        raise _failure(failed, len({task.seed for task in tasks}))


def _end_in_words(end: EndedTask) -> str:
    return "was lost" if end.code is None else f"ended with code {end.code}"


def _failure(failed: Sequence[EndedTask], seeds: int) -> PreftuneError:
    """What the first task that failed complained of, with its exit code."""
    first, n_failed = failed[0], len({end.task.seed for end in failed})
    error = PreftuneError(
        f"{n_failed} of {seeds} seeds failed; {first.task.name}: {first.complaint or _end_in_words(first)}",
        hint=f"see {first.task.log}; the same command runs the failed seeds again",
    )
    error.code = first.code if first.code and first.code > 0 else ProcessLost.code
    return error

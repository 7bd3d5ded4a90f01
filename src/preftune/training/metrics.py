"""metrics.jsonl and ledger.jsonl: one row a step, appended as the step ends."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from preftune.algorithms.base import Metrics
from preftune.errors import DataError, StorageError
from preftune.rundir import append_jsonl, read_jsonl, write_jsonl

_QUIET_SECONDS = 60  # between complaints about the same file

Say = Callable[[str], None]


class StepLog:
    """Appends rows; on resume, rows after the checkpoint are dropped, so that none is lost or doubled.

    A full disk does not stop training: rows wait in memory for a later step, with a warning a minute.
    """

    def __init__(self, path: Path, resume_at: int, say: Say = print) -> None:
        self.path, self._say = path, say
        self._waiting: list[Mapping[str, Any]] = []
        self._complained = -float(_QUIET_SECONDS)
        rows = read_jsonl(path) if path.exists() else []
        if bad := [number for number, row in enumerate(rows, 1) if type(row.get("step")) is not int]:
            raise DataError(f"{path}:{bad[0]}: no step", "the file is damaged: restore it, or remove it")
        earlier = [row for row in rows if row["step"] <= resume_at]
        write_jsonl(path, earlier)
        self.last: Mapping[str, Any] = earlier[-1] if earlier else {}

    def append(self, row: Mapping[str, Any]) -> None:
        self._waiting.append(row)
        try:
            while self._waiting:
                append_jsonl(self.path, self._waiting[0])
                del self._waiting[0]
        except StorageError as error:
            self._complain(error)

    def _complain(self, error: StorageError) -> None:
        if time.monotonic() - self._complained >= _QUIET_SECONDS:
            self._complained = time.monotonic()
            self._say(
                f"warning: {error.message}; training continues; rows kept in memory: {len(self._waiting)}"
            )


class MetricsLog(StepLog):
    """Metrics. "time" is seconds of training since the stage began, without the time between attempts."""

    def __init__(self, path: Path, resume_at: int, say: Say = print) -> None:
        super().__init__(path, resume_at, say)
        self._origin = time.monotonic() - self.last.get("time", 0.0)

    def add(self, step: int, metrics: Metrics) -> None:
        self.append({"step": step, "time": time.monotonic() - self._origin, **metrics})


def seconds_until(path: Path, step: int) -> float:
    """Seconds of training up to the end of a step, over all attempts, as the metrics in `path` have them."""
    rows = read_jsonl(path) if step and path.is_file() else []
    return max((float(row.get("time", 0.0)) for row in rows if row["step"] <= step), default=0.0)


class Ledger(StepLog):
    """The data rows that each step consumed, written when the step has been taken."""

    def add(self, step: int, rows: Sequence[str]) -> None:
        self.append({"step": step, "rows": list(rows)})

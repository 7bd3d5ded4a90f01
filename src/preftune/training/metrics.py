"""metrics.jsonl: one row a step, appended as the step ends."""

import time
from pathlib import Path

from preftune.algorithms.base import Metrics
from preftune.rundir import append_jsonl, read_jsonl, write_jsonl


class MetricsLog:
    """Appends rows; on resume, rows after the checkpoint are dropped, so that none is lost or doubled.

    "time" is seconds of training since the stage began, without the time between attempts.
    """

    def __init__(self, path: Path, resume_at: int) -> None:
        self.path = path
        kept = [row for row in read_jsonl(path) if row["step"] <= resume_at] if path.exists() else []
        write_jsonl(path, kept)
        self._origin = time.monotonic() - (kept[-1]["time"] if kept else 0.0)

    def append(self, step: int, metrics: Metrics) -> None:
        append_jsonl(self.path, {"step": step, "time": time.monotonic() - self._origin, **metrics})

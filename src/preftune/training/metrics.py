"""metrics.jsonl: one row a step, appended as the step ends."""

from pathlib import Path

from preftune.algorithms.base import Metrics
from preftune.rundir import append_jsonl, read_jsonl, write_jsonl


class MetricsLog:
    """Appends rows; on resume, rows after the checkpoint are dropped, so that none is lost or doubled."""

    def __init__(self, path: Path, resume_at: int) -> None:
        self.path = path
        kept = [row for row in read_jsonl(path) if row["step"] <= resume_at] if path.exists() else []
        write_jsonl(path, kept)

    def append(self, step: int, metrics: Metrics) -> None:
        append_jsonl(self.path, {"step": step, **metrics})

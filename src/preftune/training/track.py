"""The rows of metrics.jsonl to TensorBoard, trackio or W&B as well, by accelerate's trackers.

A tracker is somebody else's program that asks the network: it lives in a thread of its own, behind a queue.
Training never waits for it; one that fails is said once and left alone.
"""

import math
import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from preftune.training.metrics import Say

Make = Callable[[str, str, Path], GeneralTracker]
WAITING = 10_000  # rows in the queue; further ones are dropped
PATIENCE = 3.0  # seconds at the end of a stage, for what is in the queue

# (run, stage, directory of the run) -> a tracker that is not begun
TRACKERS: dict[str, Make] = {
    "tensorboard": lambda run, stage, directory: TensorBoardTracker(stage, directory / "tensorboard"),
    "trackio": lambda run, stage, directory: TrackioTracker(run, name=stage),
    "wandb": lambda run, stage, directory: WandBTracker(run, name=stage, dir=str(directory)),
}


class Tracked:
    """One stage of a run, as the tracker `kind` shows it."""

    def __init__(self, kind: str, run: str, stage: str, directory: Path, say: Say) -> None:
        self._kind, self._say = kind, say
        self._rows: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(WAITING)
        make = TRACKERS[kind]
        self._thread = threading.Thread(target=self._work, args=(make, run, stage, directory), daemon=True)
        self._thread.start()

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row. Returns at once."""
        with suppress(queue.Full):
            self._rows.put_nowait((step, {k: float(v) for k, v in metrics.items() if math.isfinite(v)}))

    def finish(self, patience: float = PATIENCE) -> None:
        """Give the tracker up to `patience` seconds for the rows in the queue."""
        with suppress(queue.Full):
            self._rows.put_nowait(None)
        self._thread.join(patience)
        if self._thread.is_alive():
            self._say(f"warning: {self._kind} does not answer and is left behind; metrics.jsonl has all rows")

    def _work(self, make: Make, run: str, stage: str, directory: Path) -> None:
        try:
            tracker = make(run, stage, directory)
            tracker.start()
            while (row := self._rows.get()) is not None:
                tracker.log(row[1], step=row[0])
            tracker.finish()
        except BaseException as error:  # SystemExit of a library, too: it ends this thread and no other
            reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            self._say(
                f"warning: {self._kind} failed ({reason}); training continues, metrics.jsonl has all rows"
            )

"""Rows go to a tracker as they are written, and whatever that does, training does not notice."""

import math
import threading
from pathlib import Path
from typing import Any

import pytest

from preftune.training import track
from preftune.training.track import TRACKERS, Tracked


class Fake:
    """A tracker that remembers, or fails where it is told to."""

    def __init__(self, fails_at: str = "", error: BaseException | None = None) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.done, self._fails_at, self._error = False, fails_at, error or RuntimeError("no network")

    def _at(self, place: str) -> None:
        if place == self._fails_at:
            raise self._error

    def start(self) -> None:
        self._at("start")

    def log(self, values: dict[str, float], step: int) -> None:
        self._at("log")
        self.rows.append((step, values))

    def finish(self) -> None:
        self._at("finish")
        self.done = True


def tracked(monkeypatch: pytest.MonkeyPatch, tracker: Any, said: list[str]) -> Tracked:
    monkeypatch.setitem(TRACKERS, "wandb", lambda run, stage, where: tracker)
    return Tracked("wandb", "run", "ppo", Path("/nowhere"), said.append)


def test_every_row_arrives_in_order_without_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, said = Fake(), list[str]()
    rows = tracked(monkeypatch, fake, said)
    for step in range(1, 50):
        rows.add(step, {"loss": 1.0 / step, "ratio": math.nan})
    rows.finish(60)
    assert fake.rows == [(step, {"loss": 1.0 / step}) for step in range(1, 50)]
    assert (fake.done, said) == (True, [])


@pytest.mark.parametrize("place", ["start", "log", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("no network"), SystemExit(1), KeyboardInterrupt()])
def test_a_tracker_that_fails_is_said_once(
    monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException
) -> None:
    said: list[str] = []
    rows = tracked(monkeypatch, Fake(place, error), said)
    rows.add(1, {"loss": 1.0})
    rows.add(2, {"loss": 1.0})
    rows.finish(60)
    assert [line.split(" (")[0] for line in said] == ["warning: wandb failed"]
    assert type(error).__name__ in said[0]


def test_one_that_hangs_is_left_behind_and_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free, fake, said = threading.Event(), Fake(), list[str]()
    monkeypatch.setattr(fake, "start", free.wait)
    monkeypatch.setattr(track, "WAITING", 5)
    rows = tracked(monkeypatch, fake, said)
    for step in range(100):
        rows.add(step, {"loss": 1.0})
    rows.finish(0.01)
    assert "does not answer" in said[0]
    free.set()


def test_tensorboard_writes_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    said: list[str] = []
    rows = Tracked("tensorboard", "run", "ppo", tmp_path, said.append)
    rows.add(1, {"loss": 1.0})
    rows.finish(60)
    assert said == []
    assert [file for file in (tmp_path / "tensorboard" / "ppo").iterdir() if "tfevents" in file.name]

"""Trained runs that many tests look at are made once for all workers of a test session, not once for each.

conftest.py imports this file, and so does the process that only hands out tests, for which the workers wait:
torch is imported where it is used.
"""

import fcntl
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A copy of the directory `name`, filled by `make` in whichever worker comes first; the others wait."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory, done = root / name, root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            directory.mkdir()
            make(directory)
            done.touch()
    return Path(shutil.copytree(directory, base / f"{name}-copy"))


@cache
def drawing(module: str) -> Callable[[Any], dict[str, Any]]:
    """What draws the figures of a report, or of a study, whatever stands in its place since."""
    return importlib.import_module(module).draw


@contextmanager
def figures(*, drawn: bool) -> Iterator[None]:
    """Whether reports and studies have figures. To draw them takes a quarter of a small run's time."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("preftune.report.plots.figures", "preftune.study.figures"):
            own = drawing(module)
            patch.setattr(f"{module}.draw", own if drawn else lambda shown: {})
        yield


@contextmanager
def drawn_once() -> Iterator[None]:
    """The world of a seed and size is made once; whoever gets it has a report of his own."""
    from preftune.world import dataset

    make = cache(dataset.make_world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dataset, "make_world", lambda *asked: replace(made := make(*asked), report=deepcopy(made.report))
        )
        yield


@contextmanager
def small_world() -> Iterator[None]:
    """The built-in world with 100 validation pairs, not 1,000, which takes a quarter of a small run."""
    from preftune.measure import reward_models
    from preftune.world import dataset

    make = dataset.make_world
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "make_world", lambda seed, pairs, *_: make(seed, pairs, 100, 100))
        patch.setattr(reward_models, "world_probes", partial(dataset.world_probes, n=20))
        yield

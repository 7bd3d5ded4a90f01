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
from types import ModuleType
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


@contextmanager
def figures(*, drawn: bool) -> Iterator[None]:
    """Whether reports and studies have figures. To draw them takes a quarter of a small run's time."""
    build, study = map(importlib.import_module, ("preftune.report.build", "preftune.study.figures"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (build, study):
            own = _own(module)
            patch.setattr(module, "draw", own if drawn else lambda shown: {})
        yield


@cache
def _own(module: ModuleType) -> Callable[..., dict[str, Any]]:
    """How it draws, asked before anything stands in the place of that."""
    return module.draw


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

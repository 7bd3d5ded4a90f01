"""One small study, shared by all tests that only look at it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from study_helpers import wanted

from made_once import figures, made_once
from preftune.rundir import read_json
from preftune.study.launch import run_study


@pytest.fixture
def study_of() -> Callable[..., dict[str, Any]]:
    """Run (or resume) a small study and read what it wrote."""

    def made(out: Path, seeds: int = 1, first_seed: int = 0, **changes: Any) -> dict[str, Any]:
        return read_json(run_study(wanted(**changes), out, seeds=seeds, first_seed=first_seed, reports=False))

    return made


@pytest.fixture(scope="session")
def two_seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of seeds 3 and 4. Read only; a test that goes on with it copies it."""
    with figures(drawn=True):
        return made_once(
            tmp_path_factory,
            "study",
            lambda out: run_study(wanted(), out, seeds=2, first_seed=3, reports=False),
        )

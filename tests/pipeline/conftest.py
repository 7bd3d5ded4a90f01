"""One run of the recipe `tiny`, shared by all tests that only look at it."""

from pathlib import Path

import pytest

import preftune
from preftune.rundir import RunDir


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """All stages, evaluation and report. Read only."""
    out: Path = tmp_path_factory.mktemp("tiny") / "run"
    return preftune.run("tiny", out=str(out))

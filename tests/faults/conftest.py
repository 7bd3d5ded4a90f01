"""A place with the shrunk stages made once, for commands that are killed, stopped, or run out of disk."""

from pathlib import Path

import pytest
from faultlab import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    made = Lab(tmp_path_factory.mktemp("lab"))
    made.prepare()
    return made


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a run goes; gone with the test."""
    return tmp_path / "run"

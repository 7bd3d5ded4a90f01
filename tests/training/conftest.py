"""Stages that several tests compare with, each trained in one go, once."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from resuming import Wholes, run
from torch import Tensor

from preftune import faults


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    faults.arm("")


@pytest.fixture(scope="session")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    """Where an algorithm was trained in one go, and the weights it came to. Read only."""

    @cache
    def whole(algorithm: str) -> tuple[Path, dict[str, dict[str, Tensor]]]:
        out = tmp_path_factory.mktemp(algorithm)
        return out, run(algorithm, out)

    return whole

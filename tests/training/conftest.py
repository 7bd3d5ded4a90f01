"""Stages that several tests of a file compare with, each trained in one go, once."""

from functools import cache
from pathlib import Path

import pytest
from resuming import Wholes, run
from torch import Tensor


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    """Where an algorithm was trained in one go, and the weights it came to. Read only."""

    @cache
    def whole(algorithm: str) -> tuple[Path, dict[str, dict[str, Tensor]]]:
        out = tmp_path_factory.mktemp(algorithm)
        return out, run(algorithm, out)

    return whole

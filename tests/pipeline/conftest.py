"""Runs of the recipe `tiny`, shared by all tests that only look at them."""

from pathlib import Path

import pytest

import preftune
from preftune.rundir import RunDir


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """All stages, evaluation and report. Read only."""
    out: Path = tmp_path_factory.mktemp("tiny") / "run"
    return preftune.run("tiny", out=str(out))


@pytest.fixture(scope="session")
def second_judge_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """SFT and DPO, scored by a reward model on half of the prompts and by a second one on the other half."""
    out: Path = tmp_path_factory.mktemp("second") / "run"
    halves = ["stage.rm.part=first", "stage.rm2.algorithm=reward", "stage.rm2.part=second"]
    small = ["stage.rm2.rows=128", "stage.rm2.learning_rate=1e-3", "stage.ppo=none", "stage.grpo=none"]
    return preftune.run("tiny", *halves, *small, "evaluation.prompts=12", out=str(out))

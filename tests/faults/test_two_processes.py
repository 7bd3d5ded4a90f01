"""An error in one process of two, started through torchrun; then one process goes on where they stopped."""

from pathlib import Path

import pytest
from faultlab import Lab
from world_size import POISONED, STAGE, apart, fail_in_one, train

from preftune.rundir import RunDir

pytestmark = pytest.mark.xdist_group("forked")


def test_the_real_error_is_shown_and_one_process_goes_on(lab: Lab, out: Path, tmp_path: Path) -> None:
    error = fail_in_one(lab, out)
    assert "reward function one_bad_row:zero, row " in error["errors"][0]
    assert "ValueError: this row is poisoned" in error["errors"][0]
    assert error["errors"][1:] in ([], ["error: another process of this run has ended"])
    assert error["code_of_the_process"] == 65
    assert error["code"] != 0
    assert error["checkpoint"] == 2
    assert train(lab, out, POISONED) == 0
    assert "resuming with processes 2 -> 1: " in lab.log.read_text(errors="replace")
    whole = lab.fresh(STAGE, tmp_path / "whole")
    assert train(lab, whole) == 0
    gap = apart(RunDir(whole), RunDir(out), error["checkpoint"])
    assert gap["same_rows"]
    assert gap["steps"] == [1, 2, 3, 4, 5]
    assert gap["first_gradient"] < 1e-4
    assert gap["last_loss"] < 1e-4
    assert gap["weights"] < 1e-5

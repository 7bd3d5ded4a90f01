"""Two processes train what one does: the same batches, first gradients and losses to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import preftune
from patience import PATIENCE

OVERRIDES = ["model.scratch.steps=4", "stage.ppo.minibatches=4", "stage.ppo.epochs=1"]


def metrics(run: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()]


def train_two(out: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    words = ("-m", "preftune", "train", "tiny", "ppo", *OVERRIDES, "--out", str(out))
    command = [sys.executable, *launcher, *words]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=4 * PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.xdist_group("distributed")
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    preftune.ppo_train("tiny", *OVERRIDES, out=str(tmp_path / "one"))
    train_two(tmp_path / "two")
    for stage in ("base", "sft", "rm", "ppo"):
        one, two = metrics(tmp_path / "one", stage), metrics(tmp_path / "two", stage)
        assert [row["step"] for row in one] == [row["step"] for row in two]
        assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-4), stage
    assert metrics(tmp_path / "two", "rm")[-1]["loss"] == pytest.approx(
        metrics(tmp_path / "one", "rm")[-1]["loss"], abs=1e-4
    )
    one, two = (metrics(tmp_path / name, "ppo")[0] for name in ("one", "two"))
    times = {"time", "step_seconds", "sampling_seconds"}
    for name in one.keys() - times:  # several minibatches, lowest, highest, sd, sums
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4), name

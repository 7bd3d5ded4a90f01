"""Some of the kills that `make reliability` makes by the hundred: the result is the same, bit for bit."""

import signal
from pathlib import Path

import pytest
from faultlab import EVERY, Lab, consumed

from preftune.rundir import RunDir
from preftune.training.checkpoint import newest_step

pytestmark = pytest.mark.xdist_group("forked")

KILLS = [
    ("rm", "checkpoint.file@step=4:tear", 2),
    ("rm", "model.rename@step=6:kill", 6),
    ("dpo", "forward@step=4,hit=3:kill", 2),
    ("ppo", "update@step=3,hit=3:kill", 2),
    ("ppo", "checkpoint.renamed@step=4:kill", 4),
]
MORE = [
    ("sft", "updated@step=3:kill", 2),
    ("grpo", "rollout.token@step=3,hit=3:kill", 2),
    ("dpo", "checkpoint.manifest@step=4:kill", 2),
    ("grpo", "update@step=4,hit=2:kill", 2),
    ("ppo", "rewards@step=5:kill", 4),
]


@pytest.mark.parametrize(
    ("stage", "fault", "kept"),
    [*KILLS, *(pytest.param(*kill, marks=pytest.mark.slow) for kill in MORE)],
    ids=[f"{stage}-{fault}" for stage, fault, _ in (*KILLS, *MORE)],
)
def test_killed_and_repeated_is_the_same(lab: Lab, out: Path, stage: str, fault: str, kept: int) -> None:
    run = RunDir(lab.fresh(stage, out))
    assert lab.run(stage, out, fault) == -signal.SIGKILL
    assert newest_step(run.checkpoints(stage)) == kept
    assert not run.model_dir(stage, trains_policy=stage != "rm").exists()
    assert lab.run(stage, out) == 0
    assert lab.differs(stage, out) == []
    rows = consumed(run, stage)
    assert len(rows) == len(set(rows)) == len(consumed(lab.whole(stage), stage))
    assert not list(out.rglob("*tmp-*"))


def test_killed_again_and_again_still_comes_to_its_end(lab: Lab, out: Path) -> None:
    """Every life gets one checkpoint further, at most."""
    lab.fresh("grpo", out)
    for fault in ("step@step=3:kill", "step@step=4:kill", "rollout.token@step=5:kill", "model.weights:kill"):
        assert lab.run("grpo", out, fault) == -signal.SIGKILL
    assert lab.run("grpo", out) == 0
    assert lab.differs("grpo", out) == []


def test_another_seed_is_noticed(lab: Lab, out: Path) -> None:
    """The comparison can fail: another order of rows gives other numbers everywhere."""
    lab.lives.run([*lab.words("sft", out), "seed=1"], lab.log)
    assert lab.differs("sft", out) == ["weights", "optimizer", "model", "metrics", "rows"]
    assert EVERY == 2

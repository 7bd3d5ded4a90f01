"""Measured pairs go through the frozen blocks once, for whatever reads them on this machine."""

import json
from pathlib import Path
from typing import Any

import pytest

from preftune import api
from preftune.cli import main
from preftune.models import kept
from preftune.rundir import RunDir, read_json
from preftune.runs import roles
from preftune.world.dataset import make_world

SMALL = ["model.scratch.steps=2", "stage.sft.rows=64", "stage.rm.rows=64", "stage.dpo.rows=64"]
RESULTS = ("reward_model.json", "policy_dpo.json")
MEASURED = ["evaluation.prompts=4", "evaluation.max_new_tokens=4"]


@pytest.mark.usefixtures("small_data")
def test_states_of_measured_pairs_are_computed_once_and_change_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    settings = ["model.trainable=top:1", *SMALL, *MEASURED]
    for train in (api.dpo_train, api.train_reward_model):
        train("tiny", *settings, out=str(run.path))
    before = [index.stat().st_size for index in kept.states_dir().glob("*/rows.idx")]
    pairs = make_world(7, 1, 1, 30).test
    file = tmp_path / "theirs.jsonl"
    rows = [{"prompt": p.prompt.transcript(), "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found, sizes = list[Any](), list[int]()
    for _ in range(2):
        assert main(["evaluate", str(run.path), "--pairs", str(file)]) == 0
        found.append([read_json(run.pairs("theirs") / name) for name in RESULTS])
        (index,) = kept.states_dir().glob("*/rows.idx")  # one trunk, for reward model and policies
        sizes.append(index.stat().st_size)
    assert found[0] == found[1]
    assert before[0] < sizes[0] == sizes[1]
    monkeypatch.setattr(roles, "keep_on_disk", lambda *_: None)
    assert main(["evaluate", str(run.path), "--pairs", str(file)]) == 0
    judge, policy = (read_json(run.pairs("theirs") / name) for name in RESULTS)
    assert judge["score"] == pytest.approx(found[0][0]["score"], rel=1e-3)
    assert judge["accuracy"] == found[0][0]["accuracy"]
    margins = [each["preference"]["mean_margin"]["mean"] for each in (policy, found[0][1])]
    assert margins[0] == pytest.approx(margins[1], abs=1e-3)

"""Results that are stale, missing, foreign or chosen from themselves are never shown as if they were good."""

import shutil
from pathlib import Path

import pytest

import preftune
from preftune.cli import main
from preftune.errors import DataError
from preftune.measure.conditions import held_out_prompts, make_conditions
from preftune.rundir import RunDir, read_json
from preftune.runs.reopen import reopen


def test_best_of_n_does_not_choose_from_the_sample_it_is_compared_with(tiny_run: RunDir) -> None:
    session = reopen(tiny_run.path)
    conditions, _ = make_conditions(session, "sft", held_out_prompts(session), session.gold)
    own = conditions.rows(conditions.reference, lambda n: None)
    pool = conditions.pool(lambda n: None, 4)
    assert [row["row"] for row in pool[::4]] == [row["row"] for row in own]
    assert sum(a["response"] == b["response"] for a, b in zip(own, pool[::4], strict=True)) < len(own) / 2


def test_another_evaluation_replaces_the_earlier_one(tiny_run: RunDir, tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(tiny_run.path, tmp_path / "run"))
    changes = ["evaluation.prompts=8", "stage.dpo=none", "evaluation.best_of=2", "evaluation.pool=2"]
    preftune.run("tiny", *changes, out=str(run.path))
    assert not run.evaluation("policy_dpo").exists()
    assert not run.evaluation("best_of_4").exists()
    assert not run.samples_file("policy_dpo").exists()
    assert {read_json(run.evaluation(p))["n_prompts"] for p in ("base", "policy_sft", "best_of_2")} == {8}
    # All of the pool was chosen from, so that there is nothing of equal length but itself.
    assert read_json(run.evaluation("best_of_2"))["length_controlled"]["n"] == 0
    run.evaluation("policy_ppo").unlink()
    preftune.run("tiny", *changes, out=str(run.path))
    assert run.evaluation("policy_ppo").is_file()


def test_a_reward_model_is_no_policy(tiny_run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="holds a reward model"):
        preftune.load_policy(tiny_run.models / "reward_model")
    assert main(["sample", str(tiny_run.path), "--policy", "rm"]) == 64
    assert "no policy 'rm'" in capsys.readouterr().err


@pytest.mark.usefixtures("small_data")
def test_a_model_of_somebody_else_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "models" / "policy_sft" / "pytorch_model.bin"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"weights")
    words = ["train", "tiny", "sft", "model.scratch.steps=2", f"out={tmp_path}"]
    assert main(words) == 78
    assert "was not made by preftune" in capsys.readouterr().err
    assert main([*words, "--restart"]) == 78
    assert theirs.read_bytes() == b"weights"


def test_a_run_can_be_looked_at_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turn = "\\n\\nHuman: Question {} please\\n\\nAssistant:"
    rows = [f'{{"chosen": "{turn.format(i)} Yes", "rejected": "{turn.format(i)} No"}}' for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    small = ["model.scratch.vocab_size=300", "model.scratch.steps=2", "data.max_prompt_length=30"]
    assert main(["train", "tiny", "sft", "data.name=pairs.jsonl", *small, "out=run"]) == 0
    monkeypatch.chdir("/")
    assert main(["sample", str(tmp_path / "run"), "--prompt", "Hello"]) == 0
    assert "Human: Hello" in capsys.readouterr().out

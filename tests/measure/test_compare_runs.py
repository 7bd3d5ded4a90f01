"""`preftune compare`: two runs by prompt, and nothing compared that has no common unit."""

import re
import shutil
from pathlib import Path

import pytest

import prose
from preftune.cli import main
from preftune.errors import DataError, InputMissing
from preftune.measure.compare import compare_runs
from preftune.rundir import RunDir, read_json, read_jsonl, write_json, write_jsonl
from tiny import without_sums


def test_a_run_does_not_differ_from_its_copy(tiny_run: RunDir, tmp_path: Path) -> None:
    copy = RunDir(shutil.copytree(tiny_run.path, tmp_path / "copy"))
    result = compare_runs(tiny_run, copy, resamples=50)
    assert result["same_reward_model"] is True
    assert result["common_prompts"] == 16
    assert {record["measure"] for record in result["policies"]} >= {"score", "gain", "gold", "kl", "length"}
    for record in result["policies"]:
        assert record["mean"] == 0
        assert record["verdict"] == "no detectable difference"
    assert result["reward_models"]["paired"]["difference"] == 0
    assert result["settings_that_differ"] == []


def test_a_shift_of_one_policy_is_found_with_its_sign(
    tiny_run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = without_sums(RunDir(shutil.copytree(tiny_run.path, tmp_path / "copy")))
    record = read_json(copy.evaluation("policy_ppo"))
    for row in record["prompts"]:
        row["score"] += 1.0
        row["length"] += 3
    record["prompts"].reverse()  # pairing is by prompt, not by place
    write_json(copy.evaluation("policy_ppo"), record)
    found = {
        (record["policy"], record["measure"]): record
        for record in compare_runs(tiny_run, copy, resamples=500)["policies"]
    }
    assert found["policy_ppo", "score"]["mean"] == pytest.approx(1.0)
    assert found["policy_ppo", "score"]["verdict"] == "better"
    assert found["policy_ppo", "gain"]["mean"] == pytest.approx(1.0)
    assert found["policy_ppo", "length"]["verdict"] == "higher"
    assert found["policy_dpo", "score"]["mean"] == 0
    assert main(["compare", str(tiny_run.path), str(copy.path)]) == 0
    said = capsys.readouterr().out
    (same,) = (line for line in said.splitlines() if line.startswith("the same in both"))
    assert re.search(": base, .*, DPO, GRPO, SFT$", same)
    prose.compare("measure/compare_runs: policies that are the same", same)
    rows = [line for line in said.splitlines() if line.startswith("PPO, gold")]
    assert "the same on every prompt" in rows[0]  # an interval of [-inf, inf] says nothing to a reader
    assert rows[-1].endswith(
        "no detectable difference"
    )  # a part of the table that stands alone names the measure


def test_rewards_of_different_reward_models_are_not_compared(
    tiny_run: RunDir, second_judge_run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    words = ["compare", str(tiny_run.path), str(second_judge_run.path), "--json", str(file)]
    assert main(words) == 0
    result = read_json(file)
    assert result["same_reward_model"] is False
    measures = {record["measure"] for record in result["policies"]}
    assert "score" not in measures
    assert {"gain", "gold", "kl"} <= measures
    assert result["common_prompts"] == 12  # the second run asked 12 of the same prompts
    assert set(result["only_in_a"]) == {"policy_ppo", "policy_grpo"}
    assert "evaluation.prompts: 16 -> 12" in result["settings_that_differ"]
    paired = result["reward_models"]["paired"]
    assert paired["n"] == 1000
    ours, theirs = (
        read_json(run.reward_evaluation)["accuracy"]["value"] for run in (tiny_run, second_judge_run)
    )
    assert paired["difference"] == pytest.approx(theirs - ours)
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if "the same judge" in line)
    prose.compare("measure/compare_runs: judges that are not known to be the same", line)
    assert "evaluation.prompts: 16 -> 12" in shown


def test_judge_and_reference_are_those_that_the_runs_name(
    tiny_run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here a stage "judge", whose model another one named "rm" does not stand for, and the base."""
    a, b = (without_sums(RunDir(shutil.copytree(tiny_run.path, tmp_path / name))) for name in "ab")
    for run in (a, b):
        shutil.copytree(run.models / "reward_model", run.models / "reward_model_judge")
        write_json(run.reward_evaluation, read_json(run.reward_evaluation) | {"stage": "judge"})
        rows = [row | {"reference": "base"} for row in read_jsonl(run.comparisons)]
        write_jsonl(run.comparisons, rows)
    (b.models / "reward_model" / "model.safetensors").write_bytes(b"another")
    result = compare_runs(a, b, resamples=50)
    assert result["same_reward_model"] is True
    gains = {record["policy"] for record in result["policies"] if record["measure"] == "gain"}
    assert ("policy_sft" in gains, "base" in gains) == (True, False)
    (b.models / "reward_model_judge" / "model.safetensors").write_bytes(b"another")
    assert main(["compare", str(a.path), str(b.path)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "gains over base are" in line)
    prose.compare("measure/compare_runs: different judges", line)


def test_what_cannot_be_compared_is_said(tiny_run: RunDir, tmp_path: Path) -> None:
    unmeasured = RunDir(tmp_path)
    unmeasured.stages.mkdir()
    with pytest.raises(InputMissing, match="no evaluation"):
        compare_runs(tiny_run, unmeasured)
    copy = without_sums(RunDir(shutil.copytree(tiny_run.path, tmp_path / "copy")))
    record = read_json(copy.evaluation("policy_dpo"))
    for row in record["prompts"]:
        row["prompt"] = "0" * 16
    write_json(copy.evaluation("policy_dpo"), record)
    with pytest.raises(DataError, match="common prompt"):
        compare_runs(tiny_run, copy)


def test_what_is_no_run_is_not_said_to_lack_an_evaluation(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text("<p>", encoding="utf-8")
    for path, words in ((file, "there is no run directory"), (tmp_path, "is not a run directory")):
        with pytest.raises(InputMissing, match=words):
            compare_runs(RunDir(path), RunDir(path))

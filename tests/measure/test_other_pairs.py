"""`preftune evaluate RUN --pairs FILE`: pairs of somebody else, in two forms, the run left as it was."""

import contextlib
import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import preftune
import prose
from preftune.cli import main
from preftune.config import load_recipe
from preftune.measure import pairs as other_pairs
from preftune.report import cautions
from preftune.report.load import load_run
from preftune.rundir import RunDir, read_json, read_jsonl, write_jsonl
from preftune.runs.console import Console
from preftune.runs.sources import dataset_of
from preftune.sums import write_sealed
from preftune.world.dataset import make_world


@pytest.fixture(scope="module")
def pairs() -> list:
    """Pairs of another world, on prompts that the run was not trained on."""
    return list(make_world(7, 1, 1, 60).test)


def hh(pair) -> dict[str, str]:
    prompt = pair.prompt.transcript()
    return {"chosen": prompt + pair.chosen, "rejected": prompt + pair.rejected}


def trl(pair) -> dict[str, str]:
    return {"prompt": pair.prompt.transcript(), "chosen": pair.chosen, "rejected": pair.rejected}


@pytest.fixture(scope="module")
def trained() -> list:
    """Pairs that the run was trained on."""
    return list(dataset_of(load_recipe("tiny", []).config.data, 0).train[:5])


@pytest.fixture(scope="module")
def said(
    second_judge_run: RunDir, pairs: list, trained: list, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """What the command says of both forms, once the run's pairs-theirs-hh and pairs-theirs-trl are there."""
    folder, heard = tmp_path_factory.mktemp("theirs"), io.StringIO()
    before = {p: p.read_bytes() for p in second_judge_run.evaluations.glob("*.json*")}
    kept = second_judge_run.stage_dir("evaluation") / "parts" / "base.json"  # of the run's own evaluation
    kept.parent.mkdir()
    kept.write_text("{}")
    with contextlib.redirect_stdout(heard):
        for form in (hh, trl):
            file = folder / f"theirs-{form.__name__}.jsonl"
            write_jsonl(file, [form(p) for p in [*pairs, *trained]])
            assert main(["evaluate", str(second_judge_run.path), "--pairs", str(file)]) == 0
    assert {p: p.read_bytes() for p in second_judge_run.evaluations.glob("*.json*")} == before
    assert kept.read_text() == "{}"
    shutil.rmtree(kept.parent)
    assert [path.name for path in second_judge_run.stage_dir("evaluation").iterdir()] == ["stage.json"]
    return heard.getvalue()


def test_both_forms_give_the_same_audit_and_leave_the_run_alone(
    second_judge_run: RunDir, pairs: list, said: str
) -> None:
    run = second_judge_run
    first, second = (run.pairs(name) for name in ("theirs-hh", "theirs-trl"))
    result = read_json(first / "reward_model.json")
    for name in ("accuracy", "baselines", "mistake_tags", "sanity", "temperature", "by_turns"):
        assert result[name] == read_json(second / "reward_model.json")[name]
    assert (result["n"], result["seen_in_training"]) == (60, 5)
    model = preftune.load_reward_model(run.models / "reward_model")
    prompts = [p.prompt.transcript() for p in pairs]
    margins = model.raw_score(prompts, [p.chosen for p in pairs]) - model.raw_score(
        prompts, [p.rejected for p in pairs]
    )
    assert result["accuracy"]["value"] == pytest.approx((margins > 0).float().mean().item())
    assert len(read_jsonl(first / "reward_model_mistakes.jsonl")) == result["n_mistakes"]
    assert read_json(first / "pairs.json")["n"] == 60
    assert "rm on 60 pairs" in said
    assert "bag of words" in said


@pytest.mark.usefixtures("said")
def test_policies_are_asked_for_their_own_preference(second_judge_run: RunDir, pairs: list) -> None:
    found = read_json(second_judge_run.pairs("theirs-hh") / "policy_dpo.json")
    assert found["n_prompts"] == 12  # evaluation.prompts of them
    assert found["gold"] is None  # whose prompts they are, nobody knows
    preference = found["preference"]
    policy = preftune.load_policy(second_judge_run.models / "policy_dpo")
    reference = preftune.load_policy(second_judge_run.models / "policy_sft")
    batch = policy.encoder.pairs(pairs)
    sides = [
        policy.logprobs(side).sum(1) - reference.logprobs(side).sum(1)
        for side in (batch.chosen, batch.rejected)
    ]
    expected = (sides[0] > sides[1]).float().mean().item()
    assert preference["accuracy"]["value"] == pytest.approx(expected)
    assert preference["mean_margin"]["mean"] == pytest.approx((sides[0] - sides[1]).mean().item(), abs=1e-4)
    beside = read_json(second_judge_run.pairs("theirs-hh") / "policy_sft.json")
    assert beside["preference"]["accuracy"] is None


def test_pairs_that_were_all_trained_on_say_nothing(
    second_judge_run: RunDir, trained: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trained.jsonl"
    write_jsonl(file, [hh(p) for p in trained])
    assert main(["evaluate", str(second_judge_run.path), "--pairs", str(file)]) == 65
    assert "all 5 pairs" in capsys.readouterr().err
    assert main(["evaluate", str(second_judge_run.path), "--pairs", str(tmp_path / "none.jsonl")]) == 66


def test_another_file_of_the_same_name_has_its_own_directory(
    second_judge_run: RunDir, pairs: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of an earlier evaluation is lost where a new one fails."""
    run, files = second_judge_run, [tmp_path / name / "same.jsonl" for name in "ab"]
    for number, file in enumerate(files):
        file.parent.mkdir()
        write_jsonl(file, [hh(p) for p in pairs[number : number + 20]])
    assert main(["evaluate", str(run.path), "--pairs", str(files[0])]) == 0
    (first,) = run.pairs("same*").parent.glob("pairs-same*")
    before = {path: path.read_bytes() for path in first.iterdir()}

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error", "x")

    with monkeypatch.context() as patched:
        patched.setattr(other_pairs, "measure_policies", fail)
        for file in files:
            assert main(["evaluate", str(run.path), "--pairs", str(file)]) == 74
    assert main(["evaluate", str(run.path), "--pairs", str(files[1])]) == 0
    assert {path: path.read_bytes() for path in first.iterdir()} == before
    (second,) = set(first.parent.glob("pairs-same*")) - {first}
    digest = read_json(second / "pairs.json")["sha256"]
    assert second.name == f"pairs-same-{digest[:8]}"
    for directory in (first, second):
        shutil.rmtree(directory)


def test_numbers_that_are_not_finite_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Pairs that a score separates perfectly have no finite temperature."""
    share = {"value": 1.0, "interval": [0.9, 1.0], "n": 4}
    result = {
        **{"n": 4, "accuracy": share, "baselines": {}, "brier": 0.0, "ece": 0.0, "n_mistakes": 0},
        "temperature": {"value": math.inf},
    }
    other_pairs._show_judge(SimpleNamespace(console=Console()), "rm", result)  # type: ignore[arg-type]
    assert "temperature inf" in capsys.readouterr().out


@pytest.mark.usefixtures("said")
def test_what_was_measured_of_a_model_that_is_no_longer_there_is_left_out(
    second_judge_run: RunDir, tmp_path: Path
) -> None:
    run = RunDir(shutil.copytree(second_judge_run.path, tmp_path / "run"))
    assert not load_run(run).outdated
    assert len(load_run(run).other_pairs) == 2
    (run.pairs("theirs-hh") / "pairs.json").write_text(  # as of a version that did not record it
        json.dumps({"file": "older.jsonl", "n": 60})
    )
    record = read_json(run.stage_json("dpo"))
    for name, entry in record["files"].items():
        entry["sha256"] = entry["sha256"][:: -1 if name.startswith("models/") else 1]
    write_sealed(run.stage_json("dpo"), record | {"status": "running"})  # as if it were trained again
    older, newer = load_run(run).other_pairs
    assert "policy_dpo" in {policy.policy for policy in older.policies}
    assert {policy.policy for policy in newer.policies} == {"base", "policy_sft", "best_of_4"}
    assert [judge.stage for judge in newer.reward_models] == ["rm", "rm2"]
    (found,) = (caution for caution in cautions(load_run(run)) if "theirs-trl.jsonl" in caution)
    assert "of DPO is left out" in found
    assert "preftune evaluate RUN --pairs FILE" in found
    prose.compare("measure/other_pairs: numbers on other pairs of a model that is gone", found)
    record = read_json(run.stage_json("rm"))
    del record["files"]
    write_sealed(run.stage_json("rm"), record)
    assert [each.of.file for each in load_run(run).other_pairs] == ["older.jsonl", "theirs-trl.jsonl"]
    assert [judge.stage for judge in load_run(run).other_pairs[1].reward_models] == ["rm2"]
    assert load_run(run).other_pairs[1].policies == ()

"""What an earlier evaluation left behind: nothing of it may stand beside the numbers of a later one."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import prose
from preftune.cli import main
from preftune.errors import DataError, InputMissing
from preftune.label.store import find_set
from preftune.measure import evaluate
from preftune.measure.compare import compare_runs
from preftune.records.outdated import outdated
from preftune.report import cautions
from preftune.report.doctor import examine
from preftune.report.load import load_run
from preftune.report.sentences import summary
from preftune.rundir import RunDir, read_json
from preftune.runs.overview import show_runs
from preftune.runs.reopen import reopen
from preftune.study import measure as study
from preftune.sums import model_sum, sum_of, sums, write_sealed


def test_audits_of_stages_that_judge_no_more_do_not_stay(copy: RunDir) -> None:
    old = copy.evaluation("reward_model_old")
    shutil.copyfile(copy.reward_evaluation, old)
    before = read_json(copy.reward_evaluation)
    shutil.rmtree(copy.stage_dir("evaluation"))
    assert main(["evaluate", str(copy.path)]) == 0
    assert not old.exists()
    assert read_json(copy.reward_evaluation) == before
    assert copy.mistakes.is_file()


def test_without_a_judge_to_audit_neither_its_audit_nor_its_mistakes_stay(copy: RunDir) -> None:
    """As where reward functions alone score now."""
    for stage in ("rm", "ppo", "grpo", "evaluation"):
        shutil.rmtree(copy.stage_dir(stage))
    for model in ("reward_model", "policy_ppo", "policy_grpo"):
        shutil.rmtree(copy.models / model)
    assert main(["evaluate", str(copy.path)]) == 0
    assert not copy.reward_evaluation.exists()
    assert not copy.mistakes.exists()
    assert copy.evaluation("policy_dpo").is_file()


def depends_on(run: RunDir) -> dict[str, str]:
    """What each part of an evaluation is known by."""
    session, asked = reopen(run.path), dict[str, Any]()
    cache = evaluate.cache_of(session, ["sft", "ppo", "grpo", "dpo"], [], session.gold)

    def take(name: str, of: Any, make: Any) -> Any:
        asked[name] = sum_of({**cache.inputs, "of": of})
        return [], []

    kept: Any = SimpleNamespace(take=take)
    nothing: Any = None
    evaluate._replies_and_kl(session, nothing, nothing, "sft", ["base", "sft", "ppo", "dpo"], kept)
    assert list(evaluate.examinations(session, ["rm"], [], kept, own_data=True)) == [("rm", ([], []))]
    return asked


def with_other_bits(run: RunDir, stage: str) -> None:
    """The stage as another machine would have trained it: of the same key."""
    record = read_json(run.stage_json(stage))
    (weights,) = (run.path / name for name in record["files"] if name.endswith(".safetensors"))
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1
    weights.write_bytes(content)
    write_sealed(run.stage_json(stage), record | {"files": record["files"] | sums(run, [weights])})
    for child in run.path.glob("stages/*/stage.json"):  # which would have been made of it
        record = read_json(child)
        if child.parent.name != "evaluation" and stage in record["made_from"]:
            made_from = record["made_from"] | {stage: model_sum(run, stage)}
            write_sealed(child, record | {"made_from": made_from})


def test_a_part_of_a_model_of_the_same_key_and_other_bits_is_measured_again(copy: RunDir) -> None:
    before = depends_on(copy)
    assert depends_on(copy) == before
    with_other_bits(copy, "dpo")
    after = depends_on(copy)
    assert {name for name in before if after[name] != before[name]} == {"policy_dpo"}
    for shared in ("rm", "sft"):  # the judge, and what all are compared with
        before = after
        with_other_bits(copy, shared)
        after = depends_on(copy)
        assert {name for name in before if after[name] != before[name]} == set(before)


def test_a_studys_policy_of_other_bits_is_measured_again(
    copy: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[dict[str, str]] = []
    monkeypatch.setattr(study, "_is_measured", lambda *_: False)
    monkeypatch.setattr(study, "_grounds", lambda *_: [])
    monkeypatch.setattr(study, "_fresh_accuracy", lambda *_: None)
    monkeypatch.setattr(study, "_measure", lambda *given: keys.append(given[-1]))
    design: Any = SimpleNamespace(replies=2, fresh_pairs=2)
    for stage in ("", "dpo", "rm"):
        if stage:
            with_other_bits(copy, stage)
        study.measure_seed(reopen(copy.path), design)
    assert [name for name in keys[0] if keys[0][name] != keys[1][name]] == ["dpo"]
    assert not set(keys[1].values()) & set(keys[2].values())


@pytest.fixture(scope="module")
def redone(tiny_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The finished run, DPO trained again with another beta, and not evaluated since."""
    run = RunDir(shutil.copytree(tiny_run.path, tmp_path_factory.mktemp("redone") / "run"))
    words = ["train", "tiny", "dpo", "stage.dpo.beta=0.5", "--redo", "dpo", "--out", str(run.path)]
    assert main(words) == 0
    return run


def test_nothing_shows_the_old_numbers_of_a_stage_that_was_trained_again(redone: RunDir) -> None:
    view = load_run(redone)
    assert {policy.policy for policy in view.policies} == {
        *("base", "policy_sft", "policy_ppo", "policy_grpo", "best_of_4")
    }
    assert {row.policy for row in view.comparisons} & {"policy_dpo", "policy_ppo"} == {"policy_ppo"}
    assert "policy_dpo" not in view.samples
    assert view.reward_model is not None
    assert view.mistakes
    assert view.best_of
    (missing,) = (words for words in view.missing if "policy_dpo" in words)
    assert "preftune evaluate RUN" in missing
    (words,) = view.outdated
    assert "of DPO is left out" in words
    assert cautions(view)[0] == words
    assert examine(redone.path).startswith(words)
    prose.compare("measure/earlier_evaluation: numbers of a model that is gone", words, missing)


def test_the_card_of_the_new_model_has_no_numbers_of_the_old_one(redone: RunDir) -> None:
    cards = {name: (redone.models / name / "README.md").read_text() for name in ("policy_dpo", "policy_ppo")}
    assert "Not evaluated yet: `preftune evaluate" in cards["policy_dpo"]
    assert "Not evaluated yet" not in cards["policy_ppo"]
    assert "model-index" not in cards["policy_dpo"]
    assert "model-index" in cards["policy_ppo"]


def test_lists_of_runs_say_that_the_numbers_are_of_an_old_model(redone: RunDir, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(redone.path, runs / "one")
    (line,) = [line.strip() for line in show_runs(runs).splitlines() if line.strip().startswith("dpo: ")]
    assert "is of a model of dpo" in line
    prose.compare("measure/earlier_evaluation: the line of such a stage in a list of runs", line)
    assert main(["report", "--all", str(runs)]) == 0
    gains = (runs / "runs.html").read_text().split('<section id="gains">')[1].split("</section>")[0]
    assert "of DPO is left out" in gains
    assert "<td>DPO" not in gains
    assert "PPO" in gains


def test_an_old_evaluation_is_not_compared(redone: RunDir, tiny_run: RunDir) -> None:
    with pytest.raises(DataError, match="measured of DPO is of a model of dpo that is no longer") as caught:
        compare_runs(tiny_run, redone, resamples=10)
    assert f"preftune evaluate {redone.path}" in caught.value.hint


def test_people_are_not_asked_about_replies_of_the_old_model(redone: RunDir) -> None:
    with pytest.raises(InputMissing, match="sampled of sft and dpo is of a model of dpo that is no longer"):
        find_set(redone, None, "sft,dpo")


def test_after_another_reference_or_judge_no_number_stands(copy: RunDir) -> None:
    assert not outdated(copy).stages
    with_other_bits(copy, "rm")
    view = load_run(copy)
    assert (view.policies, view.comparisons, view.best_of, view.mistakes) == ((), (), (), ())
    assert view.reward_model is None
    assert not view.samples
    assert "of a model of rm" in view.outdated[0]
    assert view.reference == "policy_sft"
    assert "no longer there" in summary(view)
    prose.compare("measure/earlier_evaluation: another judge", *view.outdated, summary(view))
    record = read_json(copy.stage_json("evaluation"))  # as of an evaluation that does not say whom all share
    write_sealed(copy.stage_json("evaluation"), {k: v for k, v in record.items() if k != "shared"})
    assert outdated(copy).all
    with_other_bits(copy, "sft")
    assert outdated(copy).all
    record["made_from"] = {**record["made_from"], "rm": None, "sft": None}  # from before sums were kept
    write_sealed(copy.stage_json("evaluation"), record)
    assert not outdated(copy).stages


def test_what_a_killed_evaluation_has_not_replaced_is_still_old(
    copy: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_other_bits(copy, "dpo")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    session = reopen(copy.path)
    monkeypatch.setattr(evaluate, "_evaluate_reward_models", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate_run(session, ["rm", "sft", "ppo", "grpo", "dpo"])
    assert read_json(copy.stage_json("evaluation"))["status"] == "running"
    assert outdated(copy).stages == ("dpo",)

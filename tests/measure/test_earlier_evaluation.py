"""What an earlier evaluation left behind: nothing of it may stand beside the numbers of a later one."""

import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from preftune.cli import main
from preftune.measure import evaluate
from preftune.rundir import RunDir, read_json
from preftune.runs.reopen import reopen
from preftune.runs.stages import model_sum
from preftune.study import measure as study
from preftune.sums import sum_of, sums, write_sealed


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
    evaluate._measured(session, nothing, nothing, "sft", ["base", "sft", "ppo", "dpo"], kept)
    assert list(evaluate.audits(session, ["rm"], [], kept, own_data=True)) == [("rm", ([], []))]
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

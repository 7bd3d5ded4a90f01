"""`preftune compare` on runs of files alone: whose scores have a common unit, and what gains are over."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import prose
from preftune.measure.compare import compare_runs, show_comparison
from preftune.rundir import RunDir, write_json, write_text
from preftune.runs.console import Console

STAGES = '[stage.warm]\nalgorithm = "sft"\n[stage.dpo]\nalgorithm = "dpo"\n'


def made(path: Path, evaluation: Mapping[str, str], data: str = "pairs.jsonl") -> RunDir:
    """A run with two policies that were measured on 12 prompts, and a reward model."""
    run = RunDir(path)
    settings = "".join(f'{key} = "{value}"\n' for key, value in evaluation.items())
    write_text(run.config, f'[data]\nname = "{data}"\n[evaluation]\n{settings}{STAGES}')
    model = run.model_dir("rm", trains_policy=False)
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    write_json(model / "preftune.json", {"mean": 0.0, "std": 1.0})
    for policy in ("base", "policy_warm", "policy_dpo"):
        prompts = [{"prompt": f"{i}", "score": 0.1 * i, "gold": 0.2 * i, "kl": 0.0} for i in range(12)]
        record = {"policy": policy, "label": policy, "prompts": prompts}
        write_json(run.evaluation(policy), record)
    return run


def measures(result: Mapping[str, Any]) -> set[str]:
    return {record["measure"] for record in result["policies"]}


def test_scores_beside_other_functions_are_not_compared(tmp_path: Path) -> None:
    a, b = made(tmp_path / "a", {"reward_functions": "none"}), made(tmp_path / "b", {})
    assert compare_runs(a, b, resamples=10)["same_reward_model"] is True
    other = made(tmp_path / "c", {"reward_functions": "2 * mine:f"})
    result = compare_runs(a, other, resamples=10)
    assert result["same_reward_model"] is False
    assert not measures(result) & {"score"}


@pytest.mark.parametrize(
    ("golds", "data", "same"),
    [
        (("m:f", "m:f, ./judge"), "pairs.jsonl", True),  # "gold" is the first one's
        (("m:f", "m:g"), "pairs.jsonl", False),
        (("m:f", "m:g"), "world", True),  # there it is the world's own score
    ],
)
def test_gold_of_different_judges_is_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], golds: tuple[str, str], data: str, same: bool
) -> None:
    a, b = (made(tmp_path / gold[-1:], {"gold": gold}, data) for gold in golds)
    result = compare_runs(a, b, resamples=10)
    assert ("gold" in measures(result)) is same
    show_comparison(Console(), result)
    found = [line for line in capsys.readouterr().out.splitlines() if "the same gold" in line]
    assert bool(found) is not same
    if found:
        prose.compare("measure/compare_judges: gold of different judges", *found)


def test_gains_are_over_the_stage_that_imitates_whatever_its_name(tmp_path: Path) -> None:
    """Where no comparison says so: a run without a judge has none."""
    a, b = (made(tmp_path / name, {}) for name in "ab")
    assert compare_runs(a, b, resamples=10)["references"] == ["policy_warm", "policy_warm"]
    for run in (a, b):
        run.evaluation("policy_warm").unlink()
    assert compare_runs(a, b, resamples=10)["references"] == ["base", "base"]


def judged(run: RunDir, judge: str | None = None, **recorded: Any) -> RunDir:
    """As by an evaluation that notes what scored."""
    evaluation = {"stage": "evaluation", "algorithm": "evaluation", "status": "finished"}
    write_json(run.stage_json("evaluation"), {**evaluation, "judged_by": {"judge": judge, **recorded}})
    return run


def test_gains_without_a_common_unit_are_shown_and_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (made(tmp_path / name, {"reward_functions": f"{w} * m:f"}) for name, w in (("a", 1), ("b", 10)))
    result = compare_runs(a, b, resamples=10)
    (gain,) = [r for r in result["policies"] if (r["policy"], r["measure"]) == ("policy_dpo", "gain")]
    assert gain["a"]["mean"] == gain["b"]["mean"] == 0
    for name in ("difference", "mean", "interval", "win_rate", "p_value", "p_holm", "verdict"):
        assert gain[name] is None
    assert result["no_common_unit"] == "evaluation.reward_functions: 1 * m:f -> 10 * m:f"
    show_comparison(Console(), result)
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if "in the two runs" in line)
    assert "(evaluation.reward_functions: 1 * m:f -> 10 * m:f)" in line
    prose.compare("measure/compare_judges: gains without a common unit", line)
    rows = [line for line in said.splitlines() if line.startswith("policy_dpo, score - ")]
    assert "no common unit" in rows[0]
    assert rows[-1].endswith("–")
    neither = made(tmp_path / "c", {})
    assert "m:f -> none" in compare_runs(a, neither, resamples=10)["no_common_unit"]
    assert compare_runs(neither, made(tmp_path / "d", {}), resamples=10)["no_common_unit"] is None
    bare = made(tmp_path / "e", {"reward_functions": "m:f"})
    assert compare_runs(a, bare, resamples=10)["no_common_unit"] is None


@pytest.mark.parametrize(
    ("ours", "theirs", "same", "why"),
    [
        ({"functions": {"m:f": "1"}}, {"functions": {"m:f": "1"}}, True, None),
        ({"functions": {"m:f": "1"}}, {"functions": {"m:f": "2"}}, False, "the source of m:f has changed"),
        ({"functions": {"m:f": "1"}, "judge": "rm", "key": "k"}, {"functions": {"m:f": "1"}}, False, "alone"),
        ({"functions": {"m:f": "1"}}, None, False, "functions alone"),  # an older run has a reward model
        (None, None, True, None),  # by name, where neither says more
    ],
    ids=["same", "edited", "model", "older", "both older"],
)
def test_functions_are_known_by_their_source(
    tmp_path: Path, ours: Any, theirs: Any, same: bool, why: str | None
) -> None:
    a, b = (made(tmp_path / name, {"reward_functions": "m:f"}) for name in "ab")
    for run, recorded in ((a, ours), (b, theirs)):
        if recorded is not None:
            judged(run, **recorded)
    result = compare_runs(a, b, resamples=10)
    assert result["same_reward_model"] is same
    assert (why or "") in (result["no_common_unit"] or "")
    assert (result["no_common_unit"] is None) is (why is None)


def test_the_judge_is_that_which_the_evaluation_recorded(tmp_path: Path) -> None:
    """Without an audit, as of data without pairs, it was taken for one of the name rm."""
    a, b = (made(tmp_path / name, {}) for name in "ab")
    other = a.model_dir("judge", trains_policy=False)
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"others")
    write_json(other / "preftune.json", {"mean": 0.0, "std": 1.0})
    assert compare_runs(judged(a, "rm", key="1"), judged(b, "rm", key="1"), resamples=10)["same_reward_model"]
    assert not compare_runs(judged(a, "judge", key="1"), b, resamples=10)["same_reward_model"]
    for key, same in (("1", True), ("2", False)):  # from elsewhere: whatever lies there now
        result = compare_runs(judged(a, "./x", key="1"), judged(b, "./y", key=key), resamples=10)
        assert result["same_reward_model"] is same


def test_gold_is_known_by_what_it_consists_of(tmp_path: Path) -> None:
    a, b = (made(tmp_path / name, {"gold": "m:f"}) for name in "ab")
    assert compare_runs(a, b, resamples=10)["same_gold"] is True
    judged(a, golds={"m:f": {"m:f": "1"}})
    assert compare_runs(a, b, resamples=10)["same_gold"] is True  # the other is older
    assert compare_runs(a, judged(b, golds={"m:f": {"m:f": "2"}}), resamples=10)["same_gold"] is False
    assert compare_runs(a, judged(b, golds={"m:f": {"m:f": "1"}}), resamples=10)["same_gold"] is True
    tenfold = judged(made(tmp_path / "c", {"gold": "10 * m:f"}), golds={"10 * m:f": {"m:f": "1"}})
    assert compare_runs(a, tenfold, resamples=10)["same_gold"] is False

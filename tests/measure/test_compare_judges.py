"""`preftune compare` on runs of files alone: whose scores have a common unit, and what gains are over."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

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
    assert ("the same gold: it is not compared" in capsys.readouterr().out) is not same


def test_gains_are_over_the_stage_that_imitates_whatever_its_name(tmp_path: Path) -> None:
    """Where no comparison says so: a run without a judge has none."""
    a, b = (made(tmp_path / name, {}) for name in "ab")
    assert compare_runs(a, b, resamples=10)["references"] == ["policy_warm", "policy_warm"]
    for run in (a, b):
        run.evaluation("policy_warm").unlink()
    assert compare_runs(a, b, resamples=10)["references"] == ["base", "base"]

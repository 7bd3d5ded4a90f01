"""Each kind of finding is found where its numbers are planted, and there alone."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_run

from preftune.records.base import Estimate
from preftune.records.policy import Comparison
from preftune.records.stage import MetricsRow, StageRecord
from preftune.report.doctor import examine
from preftune.report.doctor.diagnose import PATHOLOGIES, diagnose
from preftune.report.load import load_run
from preftune.report.view import RunView, StageView

STEPS = 30
HEALTHY: dict[str, Any] = {
    "skipped": 0.0,
    "first/val/ratio": 1.0,
    "policy/approxkl_avg": 0.005,
    "policy/clipfrac_avg": 0.05,
    "completions/clipped_ratio": 0.05,
    "completions/mean_length": 20.0,
    "policy/entropy_avg": 2.0,
    "tokens/sampled": 640.0,
    "val/explained_variance": 0.5,
    "frac_reward_zero_std": 0.05,
    "frac_reward_masked": 0.0,
}
PAIRS: dict[str, Any] = {"loss": 0.65, "rewards/chosen": -0.05, "rewards/margins": 0.2}


def rises(low: float, high: float) -> list[float]:
    return [low + (high - low) * step / (STEPS - 1) for step in range(STEPS)]


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> RunView:
    return load_run(make_run(tmp_path_factory.mktemp("run")))


def run_with(view: RunView, rows: dict[str, Any], **changed: Any) -> RunView:
    """A run whose one stage wrote these metrics, each a number or one number a step."""
    table = {key: value if isinstance(value, list) else [value] * STEPS for key, value in rows.items()}
    metrics = tuple({"step": i + 1} | {key: table[key][i] for key in table} for i in range(STEPS))
    record = StageRecord.model_validate({"algorithm": "ppo", "status": "finished", "steps": STEPS})
    rows = tuple(MetricsRow.model_validate({"step": step, **row}) for step, row in enumerate(metrics, 1))
    stage = StageView(name="own", status="finished", record=record, metrics=rows)
    empty = {"stages": (stage,), "policies": (), "reward_model": None, "comparisons": ()}
    return dataclasses.replace(view, **empty | changed)


def kinds(run: RunView) -> list[str]:
    return [finding.kind for finding in diagnose(run)]


@pytest.mark.parametrize("rows", [HEALTHY, PAIRS, {"loss": rises(3.0, 2.5), "entropy": rises(3.0, 1.0)}])
def test_a_healthy_stage_shows_nothing(view: RunView, rows: dict[str, Any]) -> None:
    assert kinds(run_with(view, rows)) == []


@pytest.mark.parametrize(
    ("kind", "planted"),
    [
        ("numbers that are not finite", {"skipped": [0.0] * 29 + [1.0]}),
        ("first ratio not 1", {"first/val/ratio": [1.0] * 29 + [1.01]}),
        ("first ratio not 1", {"sampling/kl_k3": rises(0.001, 0.02)}),
        ("learning rate too high", {"policy/approxkl_avg": rises(0.01, 0.4)}),
        ("learning rate too high", {"policy/clipfrac_avg": rises(0.1, 0.6)}),
        ("learning rate without effect", {"policy/approxkl_avg": 1e-9}),
        ("ends are falling", {"completions/clipped_ratio": rises(0.05, 0.6)}),
        ("replies are cut off", {"completions/clipped_ratio": 1.0}),
        ("length runs away", {"completions/mean_length": rises(20, 60)}),
        ("length runs away", {"completions/mean_length": rises(20, 4)}),
        ("entropy collapses", {"policy/entropy_avg": rises(2.0, 0.1)}),
        ("groups without variance", {"frac_reward_zero_std": rises(0.1, 1.0)}),
        ("critic explains nothing", {"val/explained_variance": -0.5}),
        ("replies without a reward", {"frac_reward_masked": 0.1}),
    ],
)
def test_what_an_online_stage_shows_is_found_alone(view: RunView, kind: str, planted: dict[str, Any]) -> None:
    assert kinds(run_with(view, HEALTHY | planted)) == [kind]


@pytest.mark.parametrize(
    ("kind", "planted"),
    [
        ("chosen log-probability falls", {"rewards/chosen": rises(0, -2.0)}),
        ("learning rate without effect", {"rewards/margins": 0.0001}),
        ("learning rate too high", {"loss": rises(0.69, 1.4)}),
    ],
)
def test_what_pairs_show_is_found_alone(view: RunView, kind: str, planted: dict[str, Any]) -> None:
    assert kinds(run_with(view, PAIRS | planted)) == [kind]


def policy(name: str, **fields: Any) -> dict[str, Any]:
    usual = {"distinct_2": 0.6, "repetition_4": 0.01, "empty_share": 0.0, "role_leakage": 0.0}
    return {"policy": name, "label": name, **usual} | fields


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high, n=100)


@pytest.mark.parametrize(
    ("kind", "planted"),
    [
        (
            "score outside what the reward model saw",
            {"score": {"value": 5.0, "interval": [4.8, 5.2], "n": 100}},
        ),
        ("KL beyond budget", {"kl": {"exact_per_sequence": {"value": 80.0, "interval": [70, 90], "n": 100}}}),
        ("diversity collapses", {"distinct_2": 0.2}),
        ("repetition", {"repetition_4": 0.5}),
        ("broken replies", {"empty_share": 0.4}),
        ("broken replies", {"role_leakage": 0.4}),
    ],
)
def test_what_a_policy_shows_is_found_alone(view: RunView, kind: str, planted: dict[str, Any]) -> None:
    kind_of = type(view.policies[0])
    both = [policy("policy_sft"), policy("policy_ppo")]
    healthy = tuple(kind_of.model_validate(row) for row in both)
    assert kinds(run_with(view, HEALTHY, policies=healthy)) == []
    ill = (healthy[0], kind_of.model_validate(both[1] | planted))
    assert kinds(run_with(view, HEALTHY, policies=ill)) == [kind]


@pytest.mark.parametrize(("low", "kinds_found"), [(0.09, []), (0.21, ["broken replies"])])
def test_broken_replies_that_chance_may_have_made_are_no_finding(
    view: RunView, low: float, kinds_found: list[str]
) -> None:
    """2 of 32 of SFT's replies speak for the human, [0.02, 0.20]; 6 of 32 of the policy's, from 0.09 on."""
    kind_of = type(view.policies[0])
    usual = {"role_leakage": 0.0625, "role_leakage_rate": {"value": 0.0625, "interval": [0.02, 0.2], "n": 32}}
    more = {"role_leakage": 0.1875, "role_leakage_rate": {"value": 0.1875, "interval": [low, 0.36], "n": 32}}
    rows = policy("policy_sft", **usual), policy("policy_ppo", **more)
    policies = tuple(kind_of.model_validate(row) for row in rows)
    assert kinds(run_with(view, HEALTHY, policies=policies)) == kinds_found


def test_a_score_that_rises_while_gold_falls_is_over_optimisation(view: RunView) -> None:
    kind_of = type(view.policies[0])
    policies = tuple(kind_of.model_validate(policy(name)) for name in ("policy_sft", "policy_ppo"))

    def row(measure: str, low: float, high: float) -> Comparison:
        difference = estimate((low + high) / 2, low, high)
        return Comparison(
            policy="policy_ppo", reference="policy_sft", measure=measure, difference=difference, p_holm=0.001
        )

    falls = (row("score", 0.5, 0.9), row("gold", -0.9, -0.5))
    rises_too = (row("score", 0.5, 0.9), row("gold", 0.5, 0.9))
    found = kinds(run_with(view, HEALTHY, policies=policies, comparisons=falls))
    assert found == ["over-optimisation"]
    assert kinds(run_with(view, HEALTHY, policies=policies, comparisons=rises_too)) == []


def test_reward_models_at_chance_by_heart_and_by_length(view: RunView) -> None:
    model = view.reward_model
    assert model is not None
    sound = {"accuracy": estimate(0.7, 0.65, 0.75), "correlation_score_length": estimate(0.1, 0.0, 0.2)}

    def found(**changed: Any) -> list[str]:
        own = model.model_copy(update=sound | changed)
        rows = {"loss": rises(0.69, 0.5), "accuracy": rises(0.5, 0.75)}
        return kinds(run_with(view, rows, reward_model=own))

    assert found() == []
    assert found(correlation_score_length=estimate(0.8, 0.7, 0.9)) == ["score is explained by length"]
    assert found(accuracy=estimate(0.55, 0.5, 0.6)) == ["reward model at chance"]
    by_heart = found(accuracy=estimate(0.4, 0.3, 0.45), stage="own")
    assert [kind for kind in by_heart if kind.endswith("by heart")]
    assert found(accuracy=estimate(0.54, 0.51, 0.57), stage="other") == []  # another's pairs


def test_every_kind_says_why_and_what_to_do() -> None:
    assert len({pathology.kind for pathology in PATHOLOGIES}) == len(PATHOLOGIES) >= 16
    assert all(pathology.reason and pathology.remedy for pathology in PATHOLOGIES)


def test_examine_writes_what_it_says(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    said = examine(run.path, tmp_path / "findings.json")
    rows = json.loads((tmp_path / "findings.json").read_text())
    assert all(row["evidence"] in said and row["remedy"] in said for row in rows)
    assert f"{len(PATHOLOGIES)} kinds looked for" in said

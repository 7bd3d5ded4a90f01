"""`preftune selftest`: it passes here, it is quick, and it notices when one function is wrong."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import preftune.algorithms.dpo
import preftune.algorithms.grpo
import preftune.algorithms.reward
import preftune.training.learner
from preftune import functional, selftest
from preftune.cli import main
from preftune.evaluation import stats
from preftune.selftest import updates
from preftune.selftest.maths import COMPARISONS, compare_entry, dtypes
from preftune.selftest.record import Comparison
from preftune.selftest.updates import UPDATES, compare_update, weights
from preftune.selftest.vectors import DATA, vectors

CPU = torch.device("cpu")


def failing_entries() -> set[str]:
    made = [compare_entry(name, dtypes(name)[0], CPU).row for name in vectors()]
    return {found.what for found in made if not found.ok}


def a_little_more(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with results that are larger by about one part in a million; masks are turned around."""

    def changed(result: Any) -> Any:
        if isinstance(result, Tensor):
            if result.dtype == torch.bool:
                return ~result
            return result * (1 + 1e-6) if result.is_floating_point() else result + 1
        if isinstance(result, stats.Interval):
            return stats.Interval(*map(changed, result))
        return tuple(map(changed, result)) if isinstance(result, tuple) else result + 1e-6

    def wrong(*arguments: Any, **named: Any) -> Any:
        return changed(function(*arguments, **named))

    return wrong


def another_gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with the same values and gradients that are larger by one part in a million."""

    def wrong(*arguments: Any, **named: Any) -> Tensor:
        result = function(*arguments, **named)
        return result + 1e-6 * (result - result.detach())

    return wrong


def test_everything_agrees_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, began = torch.random.get_rng_state(), time.monotonic()
    path = tmp_path / "result.json"
    assert main(["selftest", "--json", str(path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    result = json.loads(path.read_text())
    assert result["ok"] is True
    assert result["failed"] == 0
    assert 0 < result["seconds"] <= round(time.monotonic() - began, 1) + 0.1
    made = result["comparisons"]
    assert len(made) == sum(len(dtypes(name)) for name in vectors()) + len(UPDATES) == 74
    assert result["values"] == sum(row["values"] for row in made)
    assert all(row["values"] and row["error"] <= row["allowed"] for row in made)
    assert len(shown) == 76
    assert shown[-1].startswith("all 74 ok")
    for row, line in zip(made, shown[1:-1], strict=True):
        assert line.startswith("ok ")
        assert row["what"] in line
        assert line.endswith(row["reference"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_one_wrong_function_fails_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(functional, "gae", a_little_more(functional.gae))
    monkeypatch.setattr(selftest, "UPDATES", {})
    assert main(["selftest", "--json", str(tmp_path / "result.json")]) == 70
    shown = capsys.readouterr().out
    assert "FAIL  gae_gamma1.0_lam0.95 " in shown
    assert "advantages: off by" in shown
    assert "ok    orpo " in shown
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ok"] is False
    assert {row["what"] for row in result["comparisons"] if not row["ok"]} == {
        "gae_gamma1.0_lam0.95", "gae_gamma0.9_lam0.8", "gae_gamma1.0_lam1.0"
    }  # fmt: skip


@pytest.mark.parametrize("name", [n for n in functional.__all__ if n != "AdaptiveKL"])
def test_a_wrong_function_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, name, a_little_more(getattr(functional, name)))
    assert any(not compare_entry(entry, dtypes(entry)[0], CPU).row.ok for entry in vectors())


def test_a_wrong_controller_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.AdaptiveKL.observe
    monkeypatch.setattr(functional.AdaptiveKL, "observe", a_little_more(right))
    assert failing_entries() == {"adaptive_kl_controller"}


@pytest.mark.parametrize(
    "name", ["win_rate", "wilson", "paired_difference", "ece", "brier", "distinct_n", "repetition_n"]
)
def test_a_wrong_statistic_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, name, a_little_more(getattr(stats, name)))
    assert failing_entries() == {"evaluation_stats"}


@pytest.mark.parametrize("name", ["bradley_terry_loss", "preference_loss", "ppo_policy_loss"])
def test_a_wrong_gradient_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, name, another_gradient(getattr(functional, name)))
    assert any(not compare_entry(entry, dtypes(entry)[0], CPU).row.ok for entry in vectors())


@pytest.mark.parametrize(
    ("module", "name", "what"),
    [
        (preftune.algorithms.dpo, "preference_loss", {"DPO, sigmoid", "DPO, ipo", "DPO, hinge"}),
        (preftune.algorithms.reward, "bradley_terry_loss", {"reward model", "reward model, centred"}),
        (preftune.algorithms.grpo, "ppo_policy_loss", {w for w in UPDATES if w.startswith("GRPO")}),
        (preftune.training.learner, "weighted_sum", set(UPDATES)),
    ],
)
def test_a_wrong_update_is_noticed(
    module: Any, name: str, what: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: 1.001 * right(*a, **k))
    failed = {update for update in UPDATES if not compare_update(update, CPU).ok}
    assert what <= failed
    assert len(failed) <= len(what) + 1  # besides "DPO at the reference"


def test_a_wrong_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient are right, the optimizer is not."""
    monkeypatch.setattr(updates, "adamw", lambda p: torch.optim.AdamW(p, lr=1.01e-3, weight_decay=0.0))
    found = compare_update("SFT, completion only", CPU)
    assert found.failures
    assert all("after the step" in line or "parameters differ" in line for line in found.failures)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.1])
def test_a_comparison_fails_for_what_is_not_near(value: float) -> None:
    found = Comparison(what="x", reference="y", dtype="float64")
    found.near("number", torch.tensor([1.0, value]), [1.0, 1.0], atol=1e-3)
    assert not found.ok
    assert found.values == 2


def test_a_comparison_fails_for_shapes_errors_and_nothing() -> None:
    found = Comparison(what="x", reference="y", dtype="float64")
    assert not found.ok  # nothing was compared
    found.near("number", torch.zeros(2), [0.0], atol=1.0)
    assert "shape (2,) instead of (1,)" in found.failures[0]
    found.under(lambda: [][1])
    assert "IndexError" in found.failures[1]
    found.same("count", torch.tensor([1, 2]), [1, 3])
    assert "[1, 2] instead of [1, 3]" in found.failures[2]
    near = Comparison(what="x", reference="y", dtype="float64")
    near.near("number", torch.tensor([1.0, 2.0]), [1.0, 2.001], rtol=1e-3, atol=1e-9)
    assert near.ok
    assert near.error == pytest.approx(1e-3)
    assert near.allowed == pytest.approx(2.001e-3 + 1e-9)


def test_an_entry_that_nothing_compares_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(COMPARISONS, "orpo")
    assert failing_entries() == {"orpo"}


def test_the_shipped_numbers_are_those_of_the_reference_material(shared: Path) -> None:
    golden = shared / "golden"
    for ours, theirs in (("vectors.json", "vectors.json"), ("end_to_end.json", "end_to_end/e2e_golden.json")):
        assert json.loads((DATA / ours).read_text()) == json.loads((golden / theirs).read_text())
    body = weights("policy")
    for ours, theirs in (
        (body, "policy"),
        (weights("reference"), "ref"),
        (body | weights("reward_model"), "reward_model"),
        (weights("after_dpo"), "policy_after_dpo_step"),
        (weights("after_sft"), "policy_after_sft_step"),
    ):
        original = load_file(golden / "end_to_end" / f"{theirs}.safetensors")
        assert ours.keys() == original.keys()
        assert all(torch.equal(ours[name], original[name]) for name in original)

"""KTO: mismatched rows, z, labels and weights, against hand calculation and TRL's golden vectors."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from preftune.algorithms.base import Loss, Metrics
from preftune.algorithms.kto import KTO
from preftune.config.algorithms.kto import KTOConfig
from preftune.data import Sequences, Unpaired, pad_unpaired
from preftune.data import unpaired as labelled
from preftune.data.batch import PairIds
from preftune.functional import weighted_sum
from preftune.models.roles import Reference
from tiny import EOS, causal_lm, flat, gradients, relative, roles, runner, unpaired

# KTOTrainer._compute_loss of TRL 1.16, β = 0.1
POLICY = [-5.761964, -16.83748, -16.096641, -8.924051, -21.922403, -12.688712]
REFERENCE = [-0.805722, -20.336259, -16.396436, -7.671179, -20.934728, -14.523043]
LABELS = [True, False, True, True, False, True]
KL_POLICY = [-21.062898, -16.205173, -10.287176, -8.0836, -10.01674, -27.162605]
KL_REFERENCE = [-21.721083, -17.007003, -11.61751, -8.493515, -11.791238, -28.901751]
KL = 1.118984666666667


def numbered(first: int) -> Sequences:
    """Six rows whose first id is a number of their own, with a response of one token."""
    ids = torch.stack([torch.arange(first, first + 6), torch.zeros(6, dtype=torch.long)], 1)
    real = torch.ones(6, 2, dtype=torch.bool)
    return Sequences(ids, real, real & torch.tensor([False, True]))


def looked_up(rows: list[float], mismatched: list[float]) -> Any:
    table = torch.tensor([*rows, *mismatched], dtype=torch.float64)
    return SimpleNamespace(
        module=torch.nn.Identity(),  # in no parts
        logprobs=lambda batch: torch.stack([torch.zeros(len(batch)), table[batch.ids[:, 0]]], 1),
    )


class Reader:
    """A learner that works the loss out and changes nothing."""

    def total(self, count: Tensor) -> Tensor:
        return count

    def gather(self, values: Tensor) -> Tensor:
        return values

    def update(self, role: str, batch: Any, weights: Tensor, loss: Callable[[Any], Loss]) -> Metrics:
        out = loss(batch)
        metrics = {name: float(value.mean()) for name, value in out.metrics.items()}
        return {"loss": float(weighted_sum(out.terms, weights)), **metrics}


@pytest.mark.parametrize(("weight", "loss"), [(1.0, 0.5359551344193726), (1.33, 0.5913260037711341)])
def test_loss_and_kl_of_a_step_are_trls(weight: float, loss: float) -> None:
    models: Any = {
        "policy": looked_up(POLICY, KL_POLICY),
        "reference": looked_up(REFERENCE, KL_REFERENCE),
    }
    made = KTO(KTOConfig(undesirable_weight=weight, microbatch_size=4), models, Reader())  # type: ignore[arg-type]
    batch = Unpaired(numbered(0), torch.tensor(LABELS), numbered(6))
    metrics = made.step(batch)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["kl"] == pytest.approx(KL, rel=1e-6)
    gains = [0.1 * (p - r) for p, r in zip(POLICY, REFERENCE, strict=True)]
    chosen = sum(g for g, liked in zip(gains, LABELS, strict=True) if liked) / 4
    rejected = sum(g for g, liked in zip(gains, LABELS, strict=True) if not liked) / 2
    assert metrics["rewards/chosen"] == pytest.approx(chosen, rel=1e-6)  # means over rows of one label
    assert metrics["rewards/rejected"] == pytest.approx(rejected, rel=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(chosen - rejected, rel=1e-6)
    assert metrics["logps/rejected"] == pytest.approx((POLICY[1] + POLICY[4]) / 2, rel=1e-6)


def test_at_the_reference_the_loss_is_a_half_and_nothing_has_moved() -> None:
    models = roles("kto")
    models["reference"] = Reference(causal_lm(1))
    got, metrics = gradients("kto", unpaired(5), models=models)
    assert metrics["loss"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert flat(got["policy"]).norm() > 1e-3


def test_a_step_raises_desirable_responses_and_lowers_the_others() -> None:
    """The gradient of either kind alone, with the other's weight 0, is opposite in sign along the logits."""
    batch = unpaired(5)
    policy = roles("kto")["policy"]
    with torch.no_grad():
        before = policy.logprobs(batch.sequences).sum(1)  # type: ignore[union-attr]
    models = roles("kto")
    made, recorders = runner("kto", models)
    recorders["policy"].step = torch.optim.SGD(models["policy"].model.parameters(), lr=0.05).step  # type: ignore[method-assign]
    made.step(batch)
    with torch.no_grad():
        moved = models["policy"].logprobs(batch.sequences).sum(1) - before  # type: ignore[union-attr]
    assert moved[batch.desirable].mean() > 0 > moved[~batch.desirable].mean()


def test_the_kl_term_has_no_gradient_of_its_own() -> None:
    """Other mismatched rows with the same z leave the gradient as it is."""
    batch = unpaired(5)
    shuffled = Unpaired(batch.sequences, batch.desirable, batch.mismatched[torch.tensor([2, 0, 1, 5, 4, 3])])
    plain, _ = gradients("kto", batch)
    other, _ = gradients("kto", shuffled)
    assert relative(other["policy"], plain["policy"]) < 1e-6


def test_z_is_that_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = runner("kto", roles("kto"))
    batch = unpaired(5)
    own = made.sums(made.policy, batch.mismatched) - made.sums(made.reference, batch.mismatched)
    assert made.distance(batch).item() == pytest.approx(max(own.mean().item(), 0.0), abs=1e-5)
    other = torch.tensor([40.0] * 6)  # what a second process holds
    pooled = iter([other, torch.zeros(6)])
    monkeypatch.setattr(made.learner, "gather", lambda values: torch.cat([values, next(pooled)]))
    expected = max((own.sum().item() + 240) / 12, 0.0)
    assert made.distance(batch).item() == pytest.approx(expected, rel=1e-5)


def test_mismatched_rows_hold_the_response_before_and_keep_to_the_context() -> None:
    batch = pad_unpaired([[1], [2, 2, 2], [3]], [[4, 4, 4], [5], [6, 6]], [True, False, True], EOS, 4)
    ids, real = batch.mismatched.ids, batch.mismatched.attention
    found = [row[keep].tolist() for row, keep in zip(ids, real, strict=True)]
    assert found == [[1, 6, 6], [2, 4, 4, 4], [3, 5]]
    assert batch.mismatched.response.sum(1).tolist() == [2, 3, 1]
    assert batch.sequences.attention.sum(1).tolist() == [4, 4, 3]


def test_no_mismatched_row_of_a_batch_from_pairs_is_an_answer_to_its_own_prompt() -> None:
    batch = labelled([PairIds([10 + i], [i], [5 + i]) for i in range(3)], EOS)
    assert batch.desirable.tolist() == [True] * 3 + [False] * 3
    assert batch.sequences.ids.tolist() == [[10, 0], [11, 1], [12, 2], [10, 5], [11, 6], [12, 7]]
    for prompt, response in batch.mismatched.ids.tolist():
        assert response % 5 != prompt - 10

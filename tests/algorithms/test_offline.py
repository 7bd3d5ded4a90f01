"""SFT, reward model and DPO against plain computations on full logits."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from preftune.data import Pairs, Sequences, pad_sequences
from preftune.models.roles import Policy, Reference, RewardModel
from tiny import (
    EOS,
    VOCABULARY,
    causal_lm,
    classifier,
    flat,
    gradients,
    pairs,
    relative,
    roles,
    runner,
    sequences,
    widened_batch,
)


def summed(model: torch.nn.Module, batch: Sequences) -> Tensor:
    """Σ log π over the response, row by row from full logits, no padding: (B,)."""
    rows = []
    for ids, real, own in zip(batch.ids, batch.attention, batch.response, strict=True):
        row, start = ids[real], int(own.int().argmax())
        logp = torch.log_softmax(model(row.unsqueeze(0)).logits[0, :-1], -1)
        rows.append(logp[torch.arange(len(row) - 1), row[1:]][start - 1 :].sum())
    return torch.stack(rows)


def gradient_of(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_sft_is_cross_entropy_with_ignored_labels() -> None:
    """-100 on prompt and padding, the shift done by hand; EOS is a label."""
    batch, model = sequences(5, 8), causal_lm(1).eval()
    labels = torch.where(batch.response, batch.ids, -100)
    logits = model(batch.ids, attention_mask=batch.attention.long()).logits[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    got, metrics = gradients("sft", batch, models={"policy": Policy(causal_lm(1))}, microbatch_size=3)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert relative(got["policy"], gradient_of(expected, model)) < 2e-6
    assert metrics["grad_norm"] == pytest.approx(flat(got["policy"]).norm().item(), rel=1e-5)


def test_sft_starts_at_the_log_of_the_vocabulary_size() -> None:
    """With weights so small that every token is as likely as any other."""
    model = causal_lm(1)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1e-3)  # the head is tied to it
    _, metrics = gradients("sft", sequences(5, 8), models={"policy": Policy(model)})
    assert metrics["loss"] == pytest.approx(math.log(VOCABULARY), abs=1e-2)


def test_dpo_sums_log_ratios_over_the_response() -> None:
    batch, model, reference = pairs(5), causal_lm(1).eval(), causal_lm(2).eval()
    chosen = summed(model, batch.chosen) - summed(reference, batch.chosen).detach()
    rejected = summed(model, batch.rejected) - summed(reference, batch.rejected).detach()
    expected = -logsigmoid(0.3 * (chosen - rejected)).mean()
    got, metrics = gradients("dpo", batch, microbatch_size=4, beta=0.3)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(0.3 * chosen.mean().item(), abs=1e-5)
    assert metrics["rewards/rejected"] == pytest.approx(0.3 * rejected.mean().item(), abs=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0.3 * (chosen - rejected).mean().item(), abs=1e-5)
    assert metrics["rewards/accuracies"] == (chosen > rejected).float().mean().item()
    assert metrics["logps/chosen"] == pytest.approx(summed(model, batch.chosen).mean().item(), abs=1e-4)
    assert metrics["logps/rejected"] == pytest.approx(summed(model, batch.rejected).mean().item(), abs=1e-4)
    assert relative(got["policy"], gradient_of(expected, model)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("sigmoid", math.log(2)), ("robust", math.log(2)), ("hinge", 1.0), ("ipo", 1 / (4 * 0.2**2))],
)
def test_dpo_at_the_reference(kind: str, expected: float) -> None:
    models = {"policy": Policy(causal_lm(1)), "reference": Reference(causal_lm(1))}
    _, metrics = gradients("dpo", pairs(5), models=models, kind=kind, beta=0.2, microbatch_size=4)
    assert metrics["loss"] == pytest.approx(expected, abs=2e-6)
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


def test_dpo_at_the_reference_is_exact_in_equal_batches() -> None:
    """Policy and reference go through the same forward on the same rows: no rounding, and no accuracy by
    luck.
    """
    models = {"policy": Policy(causal_lm(1)), "reference": Reference(causal_lm(1))}
    _, metrics = gradients("dpo", pairs(5), models=models)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["rewards/margins"] == 0.0
    assert metrics["rewards/accuracies"] == 0.0


def test_dpo_can_smooth_labels() -> None:
    batch, model, reference = pairs(5), causal_lm(1).eval(), causal_lm(2).eval()
    chosen, rejected = (
        summed(model, side) - summed(reference, side) for side in (batch.chosen, batch.rejected)
    )
    h = 0.3 * (chosen - rejected)
    _, metrics = gradients("dpo", batch, beta=0.3, label_smoothing=0.2)
    expected = -(0.8 * logsigmoid(h) + 0.2 * logsigmoid(-h)).mean().item()
    assert metrics["loss"] == pytest.approx(expected, abs=1e-5)


def test_dpo_can_average_over_length() -> None:
    batch, model, reference = pairs(5), causal_lm(1).eval(), causal_lm(2).eval()
    sides = []
    for side in (batch.chosen, batch.rejected):
        sides.append((summed(model, side) - summed(reference, side)) / side.response.sum(1))
    _, metrics = gradients("dpo", batch, beta=0.3, length_average=True)
    assert metrics["loss"] == pytest.approx(-logsigmoid(0.3 * (sides[0] - sides[1])).mean().item(), abs=1e-5)


def test_dpo_can_add_the_likelihood_of_chosen_responses() -> None:
    """Of a token, each response alike; gradients are those of both losses together, in any microbatches."""
    batch, model = pairs(5), causal_lm(1).eval()
    nll = -summed(model, batch.chosen) / batch.chosen.response.sum(1)
    plain, before = gradients("dpo", batch, beta=0.3)
    both, metrics = gradients("dpo", batch, beta=0.3, sft_coef=0.7, microbatch_size=2)
    assert metrics["nll_loss"] == pytest.approx(nll.mean().item(), abs=1e-5)
    assert metrics["loss"] == pytest.approx(before["loss"] + 0.7 * nll.mean().item(), abs=1e-5)
    assert "nll_loss" not in before
    (0.7 * nll.mean()).backward()
    (policy,) = both
    own = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
    torch.testing.assert_close(flat(both[policy]), flat(plain[policy]) + own, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("algorithm", ["reward", "dpo"])
def test_an_identical_pair_teaches_nothing(algorithm: str) -> None:
    same = pad_sequences([[1, 2], [3]], [[4, 5, EOS], [6, EOS]], EOS)
    got, metrics = gradients(algorithm, Pairs(same, same))
    assert flat(got[next(iter(got))]).abs().max() < 1e-7
    if algorithm == "reward":
        assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert metrics["accuracy"] == 0.0  # a tie is no success


@pytest.mark.parametrize("center", [0.0, 0.01])
def test_the_reward_loss_reads_the_last_real_token(center: float) -> None:
    batch, model = pairs(5), classifier(3).eval()

    def score(side: Sequences) -> Tensor:
        hidden = [
            model.base_model(ids[real].unsqueeze(0)).last_hidden_state[0, -1] for ids, real, _ in rows(side)
        ]
        return torch.stack(hidden) @ model.score.weight[0]

    def rows(side: Sequences) -> list[tuple[Tensor, Tensor, Tensor]]:
        return list(zip(side.ids, side.attention, side.response, strict=True))

    chosen, rejected = score(batch.chosen), score(batch.rejected)
    expected = (-logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2).mean()
    got, metrics = gradients("reward", batch, microbatch_size=4, center_coef=center)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert metrics["accuracy"] == (chosen > rejected).float().mean().item()
    assert metrics["margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert metrics["mean_reward"] == pytest.approx((chosen + rejected).mean().item() / 2, abs=1e-5)
    assert relative(got["reward_model"], gradient_of(expected, model)) < 1e-5


def test_swapping_a_pair_changes_the_reward_loss_by_the_margin() -> None:
    """-ls(d) - (-ls(-d)) = -d."""
    batch, role = pairs(5), RewardModel(classifier(3))
    with torch.no_grad():
        margin = (role.raw_scores(batch.chosen) - role.raw_scores(batch.rejected)).mean().item()
    _, plain = gradients("reward", batch)
    _, swapped = gradients("reward", Pairs(batch.rejected, batch.chosen))
    assert plain["loss"] - swapped["loss"] == pytest.approx(-margin, abs=1e-5)


def test_dpo_asks_the_reference_once_for_each_pair_of_several_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it remembers depends on the pair alone, not on its neighbours or its padding."""
    batch = pairs(3, 6)
    asked: list[int] = []
    once, _ = runner("dpo", roles("dpo"))
    many, _ = runner("dpo", roles("dpo"), epochs=2)
    wide, _ = runner("dpo", roles("dpo"), epochs=2)
    usual = type(many).reference_sums
    monkeypatch.setattr(type(many), "reference_sums", lambda self, p: asked.append(len(p)) or usual(self, p))
    expected = once.with_reference(batch)
    first, again = many.with_reference(batch), many.with_reference(batch[torch.tensor([4, 1])])
    assert asked == [6, *[1] * 6]
    for side in ("reference_chosen", "reference_rejected"):
        torch.testing.assert_close(getattr(first, side), getattr(expected, side), atol=1e-5, rtol=1e-6)
        assert torch.equal(getattr(again, side), getattr(first, side)[[4, 1]])
        moved = wide.with_reference(widened_batch(batch[torch.tensor([4, 2])], 5))
        assert torch.equal(getattr(moved, side), getattr(first, side)[[4, 2]])

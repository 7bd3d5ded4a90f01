"""One pass gives what two models' own log-probabilities and full distributions give."""

import math

import pytest
import torch
from torch import Tensor

from preftune.data import Sequences
from preftune.evaluation.divergence import divergences
from preftune.models.roles import Policy, Reference
from tiny import VOCABULARY, causal_lm, sequences, widened

TEMPERATURE = 0.7


def pair() -> tuple[Policy, Reference]:
    return Policy(causal_lm(1)), Reference(causal_lm(2))


def exact_kl(policy: Policy, other: Reference, batch: Sequences) -> Tensor:
    return torch.tensor(divergences(policy, other, batch, TEMPERATURE)[1])


def test_k1_is_the_difference_of_the_log_probabilities() -> None:
    (policy, other), batch = pair(), sequences(3)
    k1, _ = divergences(policy, other, batch, TEMPERATURE)
    ratio = policy.logprobs(batch, TEMPERATURE) - other.logprobs(batch, TEMPERATURE)
    assert k1 == pytest.approx(ratio.sum(1).tolist(), abs=1e-5)


@torch.no_grad()
def test_exact_kl_equals_the_sum_over_the_vocabulary() -> None:
    (policy, other), batch = pair(), sequences(6)
    got = exact_kl(policy, other, batch)
    for i, (ids, real, written) in enumerate(zip(batch.ids, batch.attention, batch.response, strict=True)):
        row, start = ids[real][None], int(written.int().argmax())
        ours, theirs = (
            torch.log_softmax(role.model(row).logits[0].double() / TEMPERATURE, -1).tolist()
            for role in (policy, other)
        )
        terms = [
            math.exp(a) * (a - b)
            for t in range(start, row.shape[1])
            for a, b in zip(ours[t - 1], theirs[t - 1], strict=True)
        ]
        assert len(terms) == VOCABULARY * int(written.sum())
        assert got[i].item() == pytest.approx(sum(terms), abs=1e-5)
    assert (got > 0.01).all()


@pytest.mark.parametrize("seed", range(5))
def test_kl_of_a_policy_to_itself_is_exactly_zero(seed: int) -> None:
    batch = sequences(seed)
    k1, exact = divergences(Policy(causal_lm(seed)), Reference(causal_lm(seed)), batch, TEMPERATURE)
    assert k1 == exact == [0.0] * len(batch)


def test_padding_order_and_split_change_nothing() -> None:
    (policy, other), batch = pair(), sequences(3, 7)
    plain, order = exact_kl(policy, other, batch), torch.tensor([4, 0, 6, 2, 1, 5, 3])
    split = torch.cat([exact_kl(policy, other, part) for part in (batch[:3], batch[3:])])
    for again in (exact_kl(policy, other, widened(batch, 5)), split):
        torch.testing.assert_close(again, plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(exact_kl(policy, other, batch[order]), plain[order], atol=1e-5, rtol=0)


def test_it_is_computed_where_the_inputs_are() -> None:
    """Here they are elsewhere than tensors made without a device, as on a GPU."""
    (policy, other), batch = pair(), sequences(3)
    wanted = divergences(policy, other, batch, TEMPERATURE)
    with torch.device("meta"):
        assert divergences(policy, other, batch, TEMPERATURE) == wanted

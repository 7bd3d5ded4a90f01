"""One pass gives what two models' own log-probabilities and full distributions give."""

import pytest
import torch

from preftune.evaluation.divergence import divergences
from preftune.functional import full_kl
from preftune.models.roles import Policy, Reference
from tiny import causal_lm, sequences, widened


def test_k1_and_exact_kl_are_those_of_the_logits() -> None:
    policy, other, batch, temperature = Policy(causal_lm(1)), Reference(causal_lm(2)), sequences(3), 0.7
    k1, exact = divergences(policy, other, batch, temperature)
    ratio = policy.logprobs(batch, temperature) - other.logprobs(batch, temperature)
    assert k1 == pytest.approx(ratio.sum(1).tolist(), abs=1e-5)
    with torch.no_grad():
        attention = batch.attention.long()
        ours, theirs = (role.model(batch.ids, attention_mask=attention).logits for role in (policy, other))
    expected = (full_kl(ours, theirs, temperature) * batch.response).sum(1)
    assert exact == pytest.approx(expected.tolist(), abs=1e-5)
    assert min(exact) > 0


def test_a_model_does_not_differ_from_itself_and_padding_changes_nothing() -> None:
    policy, other, batch = Policy(causal_lm(1)), Reference(causal_lm(2)), sequences(3)
    k1, exact = divergences(policy, Reference(causal_lm(1)), batch, 1.0)
    assert k1 == exact == [0.0] * len(batch)
    plain, wide = (divergences(policy, other, b, 1.0) for b in (batch, widened(batch, 4)))
    for before, after in zip(plain, wide, strict=True):
        assert after == pytest.approx(before, abs=1e-5)

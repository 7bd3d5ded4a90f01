"""Log-probabilities, entropy and exact KL: alignment and invariants."""

import math

import pytest
import torch
import torch.nn.functional as F

from preftune.functional import entropy, full_kl, token_logprobs
from preftune.functional.logprobs import categorical_entropy, gather_logprobs

B, T, V = 3, 5, 11


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(B, T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))


def test_column_t_reads_the_logits_before_it(logits: torch.Tensor, ids: torch.Tensor) -> None:
    out = token_logprobs(logits, ids)
    nll = F.cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1), reduction="none")
    torch.testing.assert_close(out[:, 1:], -nll.view(B, T - 1), rtol=0, atol=1e-12)
    assert out.shape == (B, T)
    assert (out[:, 0] == 0).all()


def test_last_logits_are_unused(logits: torch.Tensor, ids: torch.Tensor) -> None:
    poisoned = logits.clone()
    poisoned[:, -1] = float("nan")
    poisoned.requires_grad_()
    for clean, out in (
        (token_logprobs(logits, ids), token_logprobs(poisoned, ids)),
        (entropy(logits), entropy(poisoned)),
        (full_kl(logits, logits * 2), full_kl(poisoned, poisoned * 2)),
    ):
        assert torch.equal(clean, out)
        (grad,) = torch.autograd.grad(out.square().sum(), poisoned)
        assert (grad[:, -1] == 0).all()
        assert (grad[:, :-1] != 0).any()


def test_temperature_divides_the_logits(logits: torch.Tensor, ids: torch.Tensor) -> None:
    tau, other = 0.7, logits.flip(-1)
    torch.testing.assert_close(token_logprobs(logits, ids, tau), token_logprobs(logits / tau, ids))
    torch.testing.assert_close(entropy(logits, tau), entropy(logits / tau))
    torch.testing.assert_close(full_kl(logits, other, tau), full_kl(logits / tau, other / tau))
    assert not torch.allclose(token_logprobs(logits, ids, tau), token_logprobs(logits, ids))


def test_probabilities_sum_to_one(logits: torch.Tensor) -> None:
    per_token = [token_logprobs(logits, torch.full((B, T), v)).exp() for v in range(V)]
    total = torch.stack(per_token).sum(0)[:, 1:]
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def test_entropy_of_known_distributions() -> None:
    uniform = torch.zeros(1, 2, 8)
    assert entropy(uniform)[0].tolist() == pytest.approx([0.0, math.log(8)])
    certain = torch.tensor(
        [[[0.0, -math.inf, -math.inf]] * 2]
    ).requires_grad_()  # forbidden tokens: 0 log 0 = 0
    out = entropy(certain)
    assert out[0].tolist() == [0.0, 0.0]
    assert torch.autograd.grad(out.sum(), certain)[0].isfinite().all()


def test_kl_of_a_policy_to_itself_is_exactly_zero(logits: torch.Tensor) -> None:
    assert (full_kl(logits.float(), logits.float()) == 0).all()
    assert (full_kl(logits, logits, 0.3) == 0).all()


def test_kl_is_not_negative_not_symmetric_and_known(logits: torch.Tensor) -> None:
    other = logits.roll(1, -1)
    kl = full_kl(logits.float(), other.float())
    assert (kl[:, 1:] > 0).all()
    assert (kl[:, 0] == 0).all()
    assert not torch.allclose(kl, full_kl(other.float(), logits.float()))
    near = full_kl(logits.float(), logits.float() + 1e-4 * other.float())
    assert (near >= 0).all()  # the plain float32 sum gives -1e-7 here
    p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    two = full_kl(p.log().expand(1, 2, 2), q.log().expand(1, 2, 2))
    assert two[0, 1].item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5)


def test_kl_keeps_its_gradient_where_rounding_took_its_value(logits: torch.Tensor) -> None:
    reference = logits.float() + 1e-4 * logits.roll(1, -1).float()
    policy = logits.float().requires_grad_()
    kl = full_kl(policy, reference)
    assert (kl[:, 1:] == 0).any()  # cut off at 0
    (grad,) = torch.autograd.grad(kl.sum(), policy)
    exact = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(full_kl(exact, reference.double()).sum(), exact)
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-6)
    assert expected.abs().amax(-1)[:, :-1].min() > 5e-6  # so that a missing gradient would be seen


def test_kl_ignores_what_the_policy_cannot_say() -> None:
    policy = torch.tensor([[[0.0, 0.0, -math.inf]] * 2]).requires_grad_()
    reference = torch.tensor([[[0.0, 1.0, -math.inf]] * 2])
    out = full_kl(policy, reference)
    expected = full_kl(policy[..., :2], reference[..., :2])
    torch.testing.assert_close(out, expected)
    assert torch.autograd.grad(out.sum(), policy)[0].isfinite().all()
    assert (
        full_kl(torch.zeros(1, 2, 3), reference)[0, 1] == math.inf
    )  # it says what the reference never would


def test_rows_and_columns_are_independent(logits: torch.Tensor, ids: torch.Tensor) -> None:
    out = token_logprobs(logits, ids)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(token_logprobs(logits[order], ids[order]), out[order])
    assert torch.equal(token_logprobs(logits[:, :3], ids[:, :3]), out[:, :3])
    assert token_logprobs(logits[:, :1], ids[:, :1]).tolist() == [[0.0]] * B


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[1e4, 0.0, -1e4]] * 2])
    assert token_logprobs(logits, torch.tensor([[0, 0]]))[0, 1] == 0
    assert token_logprobs(logits, torch.tensor([[0, 1]]))[0, 1] == -1e4
    assert entropy(logits)[0, 1] == 0


def test_the_parts_have_temperature_1_by_default() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 4, 2])
    assert torch.equal(categorical_entropy(logits), categorical_entropy(logits, 1.0))
    assert torch.equal(gather_logprobs(logits, ids), gather_logprobs(logits, ids, 1.0))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_any_temperature_divides_the_logits(temperature: float) -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 4, 2])
    warm = gather_logprobs(logits, ids, temperature)
    torch.testing.assert_close(warm, gather_logprobs(logits / temperature, ids), rtol=0, atol=1e-6)
    assert (warm - gather_logprobs(logits, ids)).abs().min() > 1e-3

"""Losses: closed forms, symmetries, limits and gradients."""

import math

import pytest
import torch
from torch import Tensor

from preftune.functional import (
    bradley_terry_loss,
    kto_kl,
    kto_loss,
    masked_mean,
    masked_whiten,
    orpo_odds_term,
    ppo_policy_loss,
    ppo_value_loss,
    preference_loss,
    sequence_mean,
    simpo_loss,
    token_mean,
    weighted_sum,
)

LN2 = math.log(2)
ALL_KINDS = (
    "sigmoid", "robust", "hinge", "ipo", "reference_free", "nca_pair", "apo_zero", "apo_down", "sppo_hard",
    "bco_pair",
)  # fmt: skip


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor | float, atol: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# ---- reward model


def test_bradley_terry_invariants() -> None:
    c, r = rand(6), rand(6, seed=1)
    close(bradley_terry_loss(c, c), LN2)
    close(bradley_terry_loss(c, r) - bradley_terry_loss(r, c), r - c)
    close(bradley_terry_loss(c + 5, r + 5), bradley_terry_loss(c, r))
    close(bradley_terry_loss(c, r, margin=0.7), bradley_terry_loss(c - 0.7, r))
    close(bradley_terry_loss(c, r, center_coef=0.1), bradley_terry_loss(c, r) + 0.1 * (c + r) ** 2)


def test_centring_that_is_off_has_no_say_where_it_would_overflow() -> None:
    assert bradley_terry_loss(torch.tensor([1e30]), torch.zeros(1)).item() == 0.0


def test_bradley_terry_gradient_and_extremes() -> None:
    c, r = rand(6).requires_grad_(), rand(6, seed=1)
    (grad,) = torch.autograd.grad(bradley_terry_loss(c, r).sum(), c)
    close(grad, -torch.sigmoid(r - c.detach()))
    far = torch.tensor([-1000.0], requires_grad=True)  # log(sigmoid(x)) would be -inf here
    loss = bradley_terry_loss(far, torch.zeros(1))
    assert loss.item() == 1000.0
    assert torch.autograd.grad(loss.sum(), far)[0].item() == -1.0


# ---- preferences


def logps(seed: int = 0) -> list[Tensor]:
    return [-30 + 5 * rand(5, seed=seed + i) for i in range(4)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sigmoid", LN2), ("robust", LN2), ("hinge", 1.0), ("ipo", 1 / (4 * 0.3**2)), ("nca_pair", 2 * LN2),
        ("apo_zero", 1.0), ("apo_down", 1.0), ("sppo_hard", 2 / (4 * 0.3**2)), ("bco_pair", 2 * LN2),
    ],
)  # fmt: skip
def test_at_the_reference(kind: str, expected: float) -> None:
    pc, pr, _, _ = logps()
    close(preference_loss(pc, pr, pc, pr, beta=0.3, kind=kind), expected)
    if kind in ("sigmoid", "robust"):
        close(preference_loss(pc, pr, pc, pr, beta=0.3, kind=kind, label_smoothing=0.2), LN2)


def sig(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_kinds_by_definition(kind: str) -> None:
    pc, pr, rc, rr = logps()
    beta, (a, b) = 0.3, (pc - rc, pr - rr)
    h, log = a - b, torch.log
    expected = {
        "sigmoid": -log(sig(beta * h)),
        "robust": -log(sig(beta * h)),
        "hinge": (1 - beta * h).clamp(min=0),
        "ipo": (h - 1 / (2 * beta)) ** 2,
        "reference_free": -log(sig(beta * (pc - pr))),
        "nca_pair": -log(sig(beta * a)) - 0.5 * log(sig(-beta * a)) - 0.5 * log(sig(-beta * b)),
        "apo_zero": 1 - sig(beta * a) + sig(beta * b),
        "apo_down": sig(beta * a) + 1 - sig(beta * h),
        "sppo_hard": (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2,
        "bco_pair": -log(sig(beta * a)) - log(sig(-beta * b)),
    }[kind]
    close(preference_loss(pc, pr, rc, rr, beta=beta, kind=kind), expected)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_lengths_divide_policy_and_reference_for_every_kind(kind: str) -> None:
    pc, pr, rc, rr = logps()
    n_c, n_r = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([7, 6, 5, 4, 3])
    out = preference_loss(pc, pr, rc, rr, beta=0.3, kind=kind, chosen_lengths=n_c, rejected_lengths=n_r)
    close(out, preference_loss(pc / n_c, pr / n_r, rc / n_c, rr / n_r, beta=0.3, kind=kind))
    assert not torch.allclose(out, preference_loss(pc, pr, rc, rr, beta=0.3, kind=kind))


@pytest.mark.parametrize("kind", [k for k in ALL_KINDS if k != "reference_free"])
def test_a_constant_in_policy_and_reference_is_invisible(kind: str) -> None:
    pc, pr, rc, rr = logps()
    moved = preference_loss(pc - 9, pr - 4, rc - 9, rr - 4, beta=0.3, kind=kind)
    close(moved, preference_loss(pc, pr, rc, rr, beta=0.3, kind=kind))


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "hinge", "ipo"])
def test_the_prompts_log_probability_cancels(kind: str) -> None:
    pc, pr, rc, rr = logps()
    out = preference_loss(pc - 9, pr - 9, rc, rr, beta=0.3, kind=kind)
    close(out, preference_loss(pc, pr, rc, rr, beta=0.3, kind=kind))


def test_swapping_negates_h() -> None:
    pc, pr, rc, rr = logps()
    h = (pc - rc) - (pr - rr)
    forth = preference_loss(pc, pr, rc, rr, beta=0.3)
    back = preference_loss(pr, pc, rr, rc, beta=0.3)
    close(forth - back, -0.3 * h)


def test_dpo_gradient_and_identical_pairs() -> None:
    pc, pr, rc, rr = logps()
    pc, pr = pc.requires_grad_(), pr.requires_grad_()
    grad_c, grad_r = torch.autograd.grad(preference_loss(pc, pr, rc, rr, beta=0.3).sum(), (pc, pr))
    h = ((pc - rc) - (pr - rr)).detach()
    close(grad_c, -0.3 * torch.sigmoid(-0.3 * h))
    close(grad_r, -grad_c)
    (same,) = torch.autograd.grad(preference_loss(pc, pc, rc, rc, beta=0.3).sum(), pc)
    close(same, 0.0)


def test_label_smoothing() -> None:
    pc, pr, rc, rr = logps()
    plain, flipped = preference_loss(pc, pr, rc, rr, beta=0.3), preference_loss(pr, pc, rr, rc, beta=0.3)
    cdpo = preference_loss(pc, pr, rc, rr, beta=0.3, label_smoothing=0.2)
    robust = preference_loss(pc, pr, rc, rr, beta=0.3, kind="robust", label_smoothing=0.2)
    close(cdpo, 0.8 * plain + 0.2 * flipped)
    close(robust, (0.8 * plain - 0.2 * flipped) / 0.6)
    # robust is unbiased: labels flipped at rate 0.2 give back the loss of clean ones
    robust_flipped = preference_loss(pr, pc, rr, rc, beta=0.3, kind="robust", label_smoothing=0.2)
    close(0.8 * robust + 0.2 * robust_flipped, plain)


def test_half_smoothing_is_least_at_h_zero() -> None:
    h, zero = torch.linspace(-3, 3, 61, dtype=torch.float64), torch.zeros(61, dtype=torch.float64)
    loss = preference_loss(h, zero, zero, zero, beta=1.0, label_smoothing=0.5)
    assert loss.argmin().item() == 30
    close(loss, loss.flip(0))


@pytest.mark.parametrize("kind", [k for k in ALL_KINDS if k not in ("ipo", "sppo_hard")])
def test_far_from_the_reference_nothing_overflows(kind: str) -> None:
    far = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    loss = preference_loss(far, -far, torch.zeros(2), torch.zeros(2), beta=1.0, kind=kind)
    (grad,) = torch.autograd.grad(loss.sum(), far)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    if kind != "nca_pair":  # which pulls the chosen log-ratio back
        assert loss[0] > loss[1] or kind == "apo_down"


def test_empty_responses_have_mean_zero() -> None:
    zero, n = torch.zeros(1), torch.tensor([0])
    loss = preference_loss(zero, zero, zero, zero, beta=0.1, chosen_lengths=n, rejected_lengths=n)
    assert loss.item() == pytest.approx(LN2)


# ---- SimPO, ORPO, KTO


def test_simpo() -> None:
    c, r = -rand(5).abs(), -rand(5, seed=1).abs()
    close(simpo_loss(c, c, beta=2.0, gamma=0.0), LN2)
    close(simpo_loss(c, r, beta=2.0, gamma=1.0), bradley_terry_loss(2 * c, 2 * r, margin=1.0))


def test_orpo_is_its_definition_and_not_negative() -> None:
    c, r = -rand(50).abs() - 1e-3, -rand(50, seed=1).abs() - 1e-3

    def odds(x: Tensor) -> Tensor:
        return x.exp() / (1 - x.exp())

    term = orpo_odds_term(c, r)
    close(term, torch.log(1 + odds(r) / odds(c)), atol=1e-10)
    assert (term > 0).all()
    close(orpo_odds_term(c, c), LN2)


@pytest.mark.parametrize("logp", [-1e-9, -1e-6, -0.01, -LN2, -5.0, -90.0])
def test_orpo_is_exact_at_both_ends_in_float32(logp: float) -> None:
    """Against float64: log(1 - exp(x)) computed plainly has no digits left at -1e-6 in float32."""
    c = torch.tensor([logp]).requires_grad_()
    r = torch.tensor([-0.3])
    loss = orpo_odds_term(r, c)
    (grad,) = torch.autograd.grad(loss.sum(), c)
    c64 = c.detach().double().requires_grad_()
    exact = orpo_odds_term(r.double(), c64)
    (grad64,) = torch.autograd.grad(exact.sum(), c64)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), grad64, rtol=1e-4, atol=1e-6)
    by_hand = math.log1p(math.exp(logp - math.log(-math.expm1(logp)) + 0.3 + math.log(-math.expm1(-0.3))))
    assert exact.item() == pytest.approx(by_hand, rel=1e-6)


def test_orpo_at_probability_one_is_finite() -> None:
    c, r = torch.zeros(2, requires_grad=True), torch.tensor([0.0, -1.0], requires_grad=True)
    loss = orpo_odds_term(c, r)
    assert loss.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), (c, r)))


def test_kto() -> None:
    lp, ref = rand(4).requires_grad_(), rand(4, seed=1)
    kl = kto_kl(lp, ref)
    assert not kl.requires_grad
    assert kl.shape == ()
    assert kl.item() == pytest.approx(max(0.0, (lp - ref).mean().item()))
    assert kto_kl(ref - 1, ref).item() == 0.0
    assert kto_kl(ref + 1, ref).item() == pytest.approx(1.0)
    good = torch.tensor([1, 1, 0, 0])
    close(kto_loss(ref, ref, good, 0.0, beta=0.1), 0.5)
    out = kto_loss(lp, ref, good, 0.4, beta=0.1, desirable_weight=2.0, undesirable_weight=3.0).detach()
    g = (lp - ref).detach()
    close(out[:2], 2 * (1 - sig(0.1 * (g[:2] - 0.4))))
    close(out[2:], 3 * (1 - sig(0.1 * (0.4 - g[2:]))))
    close(kto_loss(lp, ref, good, torch.tensor(0.4, dtype=torch.float64), beta=0.1)[:2].detach(), out[:2] / 2)


# ---- PPO

MASK = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0), (1.1, 2.0, -2.2), (1.5, 2.0, -2.4), (0.5, 2.0, -1.0),
        (1.5, -2.0, 3.0), (0.5, -2.0, 1.4), (0.9, -2.0, 1.8), (1.25, 1.0, -1.2),
    ],
)  # fmt: skip
def test_clipping_by_hand(ratio: float, advantage: float, expected: float) -> None:
    """clip_low 0.3, clip_high 0.2: gains are cut at 1.2, and losses below 0.7."""
    lp = torch.tensor([[math.log(ratio)]], dtype=torch.float64)
    terms = ppo_policy_loss(
        lp, torch.zeros_like(lp), torch.tensor([[advantage]], dtype=torch.float64), 0.3, 0.2
    )
    assert terms.item() == pytest.approx(expected, rel=1e-12)


def test_gradient_stops_where_clipped_and_only_there() -> None:
    lp = torch.tensor([[0.5, -0.5, 0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    (grad,) = torch.autograd.grad(ppo_policy_loss(lp, torch.zeros_like(lp), advantages).sum(), lp)
    close(grad, torch.tensor([[0.0, -math.exp(-0.5), math.exp(0.5), 0.0]], dtype=torch.float64))


def test_delta_caps_the_loss_of_bad_tokens_only() -> None:
    lp = torch.full((1, 2), math.log(10.0), dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    close(
        ppo_policy_loss(lp, torch.zeros_like(lp), advantages),
        torch.tensor([[-1.2, 10.0]], dtype=torch.float64),
    )
    capped = ppo_policy_loss(lp, torch.zeros_like(lp), advantages, delta=3.0)
    close(capped, torch.tensor([[-1.2, 3.0]], dtype=torch.float64))
    low = ppo_policy_loss(
        lp, torch.zeros_like(lp), advantages, delta=1.1
    )  # below the clip, it holds for gains too
    close(low, torch.tensor([[-1.1, 1.2]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
def test_a_ratio_that_overflows_has_no_say_where_the_loss_is_flat(level: str, dtype: torch.dtype) -> None:
    """Good and indifferent rows, and bad ones under `delta`, have gradient 0; a bad one without has inf."""
    lp = torch.full((3, 2), 2000.0, dtype=dtype, requires_grad=True)
    old, advantages = torch.zeros(3, 2, dtype=dtype), torch.tensor([2.0, 0.0, -2.0], dtype=dtype)
    for delta, expected in ((3.0, [-2.4, 0.0, 6.0]), (None, [-2.4, 0.0, math.inf])):
        terms = ppo_policy_loss(lp, old, advantages, delta=delta, level=level, mask=torch.ones(3, 2))
        assert terms[:, 0].tolist() == pytest.approx(expected)
        (grad,) = torch.autograd.grad(terms.sum(), lp)
        assert (grad[:2] == 0).all()
        assert (grad[2] == (0 if delta else math.inf)).all()


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
def test_first_minibatch(level: str) -> None:
    """ratio 1: the loss is minus the advantage, its gradient that of REINFORCE."""
    lp = rand(3, 5).requires_grad_()
    advantages = masked_whiten(rand(3, 5, seed=1), MASK)
    terms = ppo_policy_loss(lp, lp.detach(), advantages, level=level, mask=MASK)
    assert torch.equal(terms.detach(), -advantages)
    weights = token_mean(MASK.double())
    loss = weighted_sum(terms, weights)
    close(loss.detach(), 0.0)
    if level == "token":
        close(torch.autograd.grad(loss, lp)[0], -advantages * weights)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
def test_advantages_of_a_row_spread_over_it(level: str) -> None:
    new, old, advantages = rand(3, 5), rand(3, 5, seed=1), rand(3, seed=2)
    by_row = ppo_policy_loss(new, old, advantages, level=level, mask=MASK)
    by_token = ppo_policy_loss(new, old, advantages[:, None].expand(3, 5), level=level, mask=MASK)
    assert torch.equal(by_row, by_token)
    assert by_row.shape == (3, 5)
    square = ppo_policy_loss(new[:, :3], old[:, :3], advantages)  # B == T: still one advantage a row
    assert torch.equal(square, ppo_policy_loss(new[:, :3], old[:, :3], advantages[:, None].expand(3, 3)))


def test_sequence_levels_by_definition() -> None:
    new, old, advantages = 0.1 * rand(3, 5), 0.1 * rand(3, 5, seed=1), rand(3, seed=2)
    active = MASK.bool()
    log_ratio = torch.where(active, new - old, 0.0).sum(1)
    for level, lr in (("sequence", log_ratio / MASK.sum(1)), ("sequence_sum", log_ratio)):
        r = lr.exp()
        value = -torch.minimum(r * advantages, r.clamp(0.9, 1.05) * advantages)
        terms = ppo_policy_loss(new, old, advantages, 0.1, 0.05, level=level, mask=MASK)
        close(terms, torch.where(active, value[:, None], 0.0))
        close(weighted_sum(terms, sequence_mean(MASK.double())), value.mean())


def test_gspo_gradient_reaches_every_token_of_a_row() -> None:
    new, advantages = rand(3, 5).requires_grad_(), torch.ones(3, dtype=torch.float64)
    terms = ppo_policy_loss(new, new.detach(), advantages, level="sequence", mask=MASK)
    (grad,) = torch.autograd.grad(weighted_sum(terms, sequence_mean(MASK.double())), new)
    close(grad, -sequence_mean(MASK.double()))


def test_without_mask_every_column_counts() -> None:
    new, old, advantages = rand(3, 5), rand(3, 5, seed=1), rand(3, 5, seed=2)
    ones = torch.ones(3, 5)
    assert torch.equal(
        ppo_policy_loss(new, old, advantages), ppo_policy_loss(new, old, advantages, mask=ones)
    )
    assert torch.equal(ppo_value_loss(new, old, advantages), ppo_value_loss(new, old, advantages, mask=ones))


@pytest.mark.parametrize(
    ("value", "old", "target", "expected"),
    [
        (1.0, 1.0, 3.0, 2.0),  # not clipped
        (2.0, 1.0, 3.0, 0.5 * 1.8**2),  # moved too far towards the target: the clipped error counts
        (2.0, 1.0, 0.0, 2.0),  # moved too far away: the larger, unclipped error counts
        (1.1, 1.0, 1.1, 0.0),
    ],
)
def test_value_clipping_by_hand(value: float, old: float, target: float, expected: float) -> None:
    inputs = [torch.tensor([[x]], dtype=torch.float64) for x in (value, old, target)]
    assert ppo_value_loss(*inputs).item() == pytest.approx(expected, rel=1e-12)
    unclipped = ppo_value_loss(*inputs, clip=None)
    assert unclipped.item() == pytest.approx(0.5 * (value - target) ** 2, rel=1e-12)


def test_value_loss_and_its_gradient() -> None:
    values, returns = rand(3, 5).requires_grad_(), rand(3, 5, seed=1)
    assert (ppo_value_loss(returns, returns, returns, mask=MASK) == 0).all()
    loss = ppo_value_loss(values, values.detach(), returns, mask=MASK).sum()
    close(torch.autograd.grad(loss, values)[0], torch.where(MASK.bool(), values - returns, 0.0).detach())


def test_permuting_rows_permutes_losses() -> None:
    new, old, advantages = rand(3, 5), rand(3, 5, seed=1), rand(3, seed=2)
    order = torch.tensor([2, 0, 1])
    for level in ("token", "sequence", "sequence_sum"):
        terms = ppo_policy_loss(new, old, advantages, level=level, mask=MASK)
        permuted = ppo_policy_loss(new[order], old[order], advantages[order], level=level, mask=MASK[order])
        close(permuted, terms[order])
    assert masked_mean(terms, MASK).isfinite()

"""KL estimators and the adaptive controller."""

import pytest
import torch

from preftune.functional import AdaptiveKL, full_kl, kl_estimate
from preftune.functional.kl import categorical_kl


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("k1", [0.0, 1.0, -1.0]), ("k2", [0.0, 0.5, 0.5]), ("k3", [0.0, 0.36787944, 0.71828183])],
)
def test_by_hand(kind: str, expected: list[float]) -> None:
    lp, ref = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -2.0, -2.0])
    assert kl_estimate(lp, ref, kind).tolist() == pytest.approx(expected, abs=1e-6)


def test_k3_keeps_its_digits_near_zero() -> None:
    d = torch.tensor([1e-3, -1e-3])
    expected = (
        d.double().neg().exp() - 1 + d.double()
    )  # about 5e-7: below the rounding of exp(-d) - 1 in float32
    torch.testing.assert_close(kl_estimate(d, torch.zeros(2), "k3").double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_zero_for_equal_policies(kind: str) -> None:
    lp = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert (kl_estimate(lp, lp, kind) == 0).all()


def test_signs() -> None:
    g = torch.Generator().manual_seed(0)
    lp, ref = torch.randn(500, generator=g), torch.randn(500, generator=g)
    assert (kl_estimate(lp, ref, "k2") >= -1e-7).all()
    assert (kl_estimate(lp, ref, "k3") >= -1e-7).all()
    assert torch.equal(kl_estimate(lp, ref, "k1"), -kl_estimate(ref, lp, "k1"))
    assert (kl_estimate(lp, ref, "k1") < 0).any()


def test_the_exact_kl_is_that_at_temperature_1_unless_told_otherwise() -> None:
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logp, reference = logits.log_softmax(-1)
    expected = (logp.exp() * (logp - reference)).sum(-1)
    torch.testing.assert_close(categorical_kl(*logits), expected)
    torch.testing.assert_close(full_kl(*logits)[:, 1:], expected[:, :-1])


def test_k3_times_the_ratio_has_the_gradient_of_the_reverse_kl_at_any_ratio() -> None:
    """E_old[∇(ρ k3)] = E_old[ρ (k3 + 1 - exp(-d)) ∇log π] = E_π[d ∇log π] = ∇KL(π || π_ref): exact sums over
    seven tokens. k2 has it at ρ = 1 alone.
    """
    g = torch.Generator().manual_seed(0)
    logits, old, reference = torch.randn(3, 7, generator=g, dtype=torch.float64)
    logits.requires_grad_()
    logp, old, reference = (x.log_softmax(-1) for x in (logits, old, reference))

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    exact = gradient((logp.exp() * (logp - reference)).sum())
    k2, k3 = (kl_estimate(logp, reference, kind) for kind in ("k2", "k3"))
    torch.testing.assert_close(gradient((old.exp() * (logp - old).exp() * k3).sum()), exact)
    torch.testing.assert_close(gradient((logp.detach().exp() * k2).sum()), exact)
    assert (gradient((old.exp() * k2).sum()) - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.0, 1.0), (6.6, 1.001), (60.0, 1.002), (0.0, 0.998), (-5.0, 0.998)]
)
def test_controller_moves_towards_the_target_by_bounded_steps(kl: float, factor: float) -> None:
    controller = AdaptiveKL(0.5, target=6.0, horizon=10_000)
    assert controller.observe(kl, 100) == pytest.approx(0.5 * factor, rel=1e-12)
    assert controller.coef == pytest.approx(0.5 * factor, rel=1e-12)


def test_controller_accepts_a_tensor_and_stays_a_number() -> None:
    controller = AdaptiveKL(0.5, 6.0, 1000)
    assert isinstance(controller.observe(torch.tensor(3.0), 10), float)

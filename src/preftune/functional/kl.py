"""Distances between the policy and its reference, and the controller that steers by them.

Always KL(policy || reference), the policy's samples first. Shapes: B rows, T columns, V vocabulary.
"""

import math

import torch
from torch import Tensor

from .checks import check_positive, check_range, check_shapes
from .logprobs import log_softmax, predicting, shift_in
from .masked import promote, zero_off


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, kind: str) -> Tensor:
    """Estimators of KL from tokens that the policy wrote, with d = log π - log π_ref.

    k1 = d (unbiased, of either sign) · k2 = d² / 2 (biased, >= 0) · k3 = exp(-d) - 1 + d (unbiased, >= 0).
    Schulman, "Approximating KL Divergence", 2020. Elementwise and unreduced, any shape.
    ValueError: unknown kind, shapes differ.
    """
    check_shapes(logprobs=logprobs, reference_logprobs=reference_logprobs)
    logprobs, reference_logprobs = promote(logprobs, reference_logprobs)
    d = logprobs - reference_logprobs
    match kind:
        case "k1":
            return d
        case "k2":
            return d.square() / 2
        case "k3":
            return torch.expm1(-d) + d  # expm1: near d = 0, exp(-d) - 1 would lose all digits
    raise ValueError(f"unknown KL estimator {kind!r}; one of k1, k2, k3")


def categorical_kl(logits: Tensor, reference_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL = Σ_a π(a) (log π(a) - log π_ref(a)), >= 0, no shift: logits, reference_logits (..., V) -> (...)."""
    logits, reference_logits = promote(logits, reference_logits)
    logp = log_softmax(logits, temperature)
    log_ratio = logp - log_softmax(reference_logits, temperature)
    kl = (logp.exp() * zero_off(log_ratio, logp > -torch.inf)).sum(-1)
    # Rounding can take a KL near 0 below it; the gradient stays.
    return torch.where(kl < 0, kl - kl.detach(), kl)


def full_kl(logits: Tensor, reference_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Exact KL_t = Σ_a π_t(a) (log π_t(a) - log π_ref,t(a)) over the vocabulary, at the temperature of both.

    Summed over a response that the policy wrote it has the mean of Σ k1 and a smaller variance
    (Rao–Blackwell). Shifted as `token_logprobs`. logits, reference_logits (B, T, V) -> (B, T).
    ValueError: other shapes, temperature not above 0.
    """
    check_shapes(logits=logits, reference_logits=reference_logits)
    return shift_in(categorical_kl(predicting(logits), predicting(reference_logits), temperature))


class AdaptiveKL:
    """Proportional controller: coef ← coef · (1 + clip(kl / target - 1, ±0.2) · n / horizon).

    Ziegler et al. 2019 (arXiv:1909.08593), section 2.2. `kl` is the mean over sequences of the KL summed over
    tokens, `n` the number of those sequences, `horizon` is counted in sequences too.
    ValueError: target or horizon not above 0, a measurement of NaN, or of so many sequences (5 horizons) that
    one step would turn the penalty into a bonus.
    """

    def __init__(self, initial: float, target: float, horizon: float) -> None:
        check_positive(target=target, horizon=horizon)
        self.coef = initial
        self.target = target
        self.horizon = horizon

    def observe(self, kl: float, n: int) -> float:
        """Take one measurement in and return the new coefficient."""
        kl = float(kl)
        check_range(-math.inf, math.inf, kl=kl)  # one NaN would stay in the coefficient
        if n >= 5 * self.horizon:
            raise ValueError(
                f"horizon is {self.horizon:g}; for {n} sequences a step it must be above {n / 5:g}"
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / self.horizon
        return self.coef

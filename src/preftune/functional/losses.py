"""Losses: minimised, unreduced, pure. A scalar is `weighted_sum(terms, weights)`.

Log-probabilities of responses are sums over response tokens, EOS included, unless a name says mean. Shapes: B
rows, T columns. σ is the logistic function; log σ is always `logsigmoid`, since log(sigmoid(x)) is -inf from
x = -104 on.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from preftune.kinds import PREFERENCE_KINDS, SMOOTHED_KINDS

from .checks import check_positive, check_range, check_shapes
from .masked import as_mask, masked_mean, or_all, promote, zero_off

_LARGEST = {torch.float32: 88.0, torch.float64: 709.0}  # exp of more is infinite


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None, center_coef: float = 0.0
) -> Tensor:
    """-log σ(c - r - margin) + center_coef (c + r)², for a reward model.

    Under Bradley and Terry (1952) P(chosen ≻ rejected) = σ(c - r). Only differences are learned; the second
    term (Eisenstein et al. 2023, arXiv:2312.09244) pins the level. All (B,) -> (B,).
    ValueError: shapes differ.
    """
    check_shapes(chosen=chosen, rejected=rejected, margin=margin)
    c, r, m = promote(chosen, rejected, 0.0 if margin is None else margin)
    loss = -F.logsigmoid(c - r - m)
    return loss + center_coef * (c + r).square() if center_coef else loss


def preference_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """DPO and its relatives: -log σ(β h), h = a - b, with a, b = log π / π_ref of chosen and rejected.

    "sigmoid" is eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290), with `label_smoothing` ε its conservative
    form (cDPO); the other kinds and their papers are at the lines. The lengths, if given, divide policy and
    reference first, for every kind.
    All (B,): sums over the response -> (B,).
    ValueError: unknown kind, label_smoothing for a kind without it (or 0.5 for robust) or outside [0, 1], one
    of two lengths, beta not above 0, shapes differ.
    """
    _check_preference(kind, label_smoothing, chosen_lengths, rejected_lengths)
    check_positive(beta=beta)
    check_shapes(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    pc, pr, rc, rr, n_c, n_r = promote(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, chosen_lengths, rejected_lengths
    )
    if n_c is not None:
        pc, rc = pc / n_c.clamp(min=1), rc / n_c.clamp(min=1)  # an empty response has sum 0, so mean 0
        pr, rr = pr / n_r.clamp(min=1), rr / n_r.clamp(min=1)
    if kind == "reference_free":
        return -F.logsigmoid(beta * (pc - pr))
    return _preference_terms(pc - rc, pr - rr, beta, kind, label_smoothing)


def _preference_terms(a: Tensor, b: Tensor, beta: float, kind: str, eps: float) -> Tensor:
    """The kinds that see the log-ratios a (chosen) and b (rejected) only, (B,) each."""
    ls, sigmoid, h = F.logsigmoid, torch.sigmoid, a - b
    match kind:
        case "sigmoid":
            return -(1 - eps) * ls(beta * h) - eps * ls(-beta * h)
        case "robust":  # Chowdhury et al. 2024, arXiv:2403.00409: unbiased under labels flipped at rate ε
            return (-(1 - eps) * ls(beta * h) + eps * ls(-beta * h)) / (1 - 2 * eps)
        case "hinge":  # SLiC-HF, Zhao et al. 2023, arXiv:2305.10425
            return torch.relu(1 - beta * h)
        case "ipo":  # Azar et al. 2023, arXiv:2310.12036, eq. 17
            return (h - 1 / (2 * beta)).square()
        case "nca_pair":  # Chen et al. 2024, arXiv:2402.05369
            return -ls(beta * a) - 0.5 * ls(-beta * a) - 0.5 * ls(-beta * b)
        case "apo_zero":  # D'Oosterlinck et al. 2024, arXiv:2408.06266
            return 1 - sigmoid(beta * a) + sigmoid(beta * b)
        case "apo_down":  # same
            return sigmoid(beta * a) + 1 - sigmoid(beta * h)
        case "sppo_hard":  # Wu et al. 2024, arXiv:2405.00675
            return (a - 1 / (2 * beta)).square() + (b + 1 / (2 * beta)).square()
        case "bco_pair":  # Jung et al. 2024, arXiv:2404.04656, without the moving reward shift
            return -ls(beta * a) - ls(-beta * b)
    raise AssertionError(f"{kind!r} was checked by the caller")


def _check_preference(
    kind: str, label_smoothing: float, chosen_lengths: Tensor | None, rejected_lengths: Tensor | None
) -> None:
    if kind not in PREFERENCE_KINDS:
        raise ValueError(f"unknown preference loss {kind!r}; one of {', '.join(PREFERENCE_KINDS)}")
    check_range(0, 1, label_smoothing=label_smoothing)
    if label_smoothing and kind not in SMOOTHED_KINDS:
        raise ValueError(f"label_smoothing is for {' and '.join(SMOOTHED_KINDS)}, not for {kind!r}")
    if kind == "robust" and label_smoothing == 0.5:
        raise ValueError("robust divides by 1 - 2 · label_smoothing: 0.5 is undefined")
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError("give chosen_lengths and rejected_lengths, or neither")


def simpo_loss(chosen_mean: Tensor, rejected_mean: Tensor, *, beta: float, gamma: float) -> Tensor:
    """-log σ(β (c - r) - γ) of the mean log-probabilities: no reference, a target margin γ.

    Meng et al. 2024 (arXiv:2405.14734), eq. 6. All (B,) -> (B,). ValueError: shapes differ, beta not above 0.
    """
    check_positive(beta=beta)
    check_shapes(chosen_mean=chosen_mean, rejected_mean=rejected_mean)
    chosen_mean, rejected_mean = promote(chosen_mean, rejected_mean)
    return -F.logsigmoid(beta * (chosen_mean - rejected_mean) - gamma)


def orpo_odds_term(chosen_mean: Tensor, rejected_mean: Tensor) -> Tensor:
    """-log σ(log odds_c - log odds_r) >= 0, odds = p / (1 - p), p = exp(mean log-probability).

    ORPO's loss is NLL(chosen) + λ · this. Hong et al. 2024 (arXiv:2403.07691), eq. 7. All (B,) -> (B,).
    ValueError: shapes differ.
    """
    check_shapes(chosen_mean=chosen_mean, rejected_mean=rejected_mean)
    chosen_mean, rejected_mean = promote(chosen_mean, rejected_mean)
    return -F.logsigmoid(_log_odds(chosen_mean) - _log_odds(rejected_mean))


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p <= 0. At p = 1 it stops at a large finite number, with gradient 0."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    return logp - _log1mexp(logp)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, each branch where it is exact.

    Mächler 2012, "Accurately computing log(1 - exp(-|a|))". The branch not taken sees -ln 2, so that its
    gradient is finite.
    """
    near = x > -math.log(2)
    near_x = torch.where(near, x, -math.log(2))
    far_x = torch.where(near, -math.log(2), x)
    return torch.where(near, torch.log(-torch.expm1(near_x)), torch.log1p(-torch.exp(far_x)))


def kto_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """z = max(0, mean(log π - log π_ref)) over mismatched prompts and responses; detached. (B,) -> scalar.

    ValueError: shapes differ.
    """
    check_shapes(policy=policy, reference=reference)
    policy, reference = promote(policy, reference)
    return (policy - reference).mean().clamp(min=0).detach()


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Desirable: w_D (1 - σ(β (g - z))), undesirable: w_U (1 - σ(β (z - g))).

    g = log π - log π_ref, z = `kl`. Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 8. policy, reference,
    desirable (bool or 0/1) (B,) -> (B,). ValueError: shapes differ, beta not above 0.
    """
    check_positive(beta=beta)
    check_shapes(policy=policy, reference=reference, desirable=desirable, kl=kl)
    policy, reference, kl, desirable = promote(policy, reference, kl, desirable)
    g = policy - reference
    return torch.where(
        as_mask(desirable),
        desirable_weight * (1 - torch.sigmoid(beta * (g - kl))),
        undesirable_weight * (1 - torch.sigmoid(beta * (kl - g))),
    )


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    delta: float | None = None,
    level: str = "token",
    mask: Tensor | None = None,
) -> Tensor:
    """L_t = -min(min(r_t, delta) A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t), r_t = π(y_t) / π_old(y_t).

    Schulman et al. 2017 (arXiv:1707.06347), eq. 7; `delta` is the dual clip's cap (Ye et al. 2020,
    arXiv:1912.09729). `level` "sequence" has r = exp(mean_t log r_t) (GSPO, Zheng et al. 2025,
    arXiv:2507.18071), "sequence_sum" r = exp(Σ_t log r_t) (RLOO), the same in every response column of a row.
    logprobs, old_logprobs, mask (B, T), advantages (B,) or (B, T) -> (B, T), 0 off the mask.
    ValueError: unknown level, a sequence level without mask, a negative clip or delta, shapes that differ.
    """
    if level not in ("token", "sequence", "sequence_sum"):
        raise ValueError(f"unknown level {level!r}; one of token, sequence, sequence_sum")
    if mask is None and level != "token":
        raise ValueError(f"level {level!r} needs the mask: it reduces over the response")
    check_range(0, math.inf, clip_low=clip_low, clip_high=clip_high, delta=delta)
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    logprobs, old_logprobs, advantages, mask = promote(logprobs, old_logprobs, advantages, mask)
    active = or_all(mask, logprobs)
    advantages = zero_off(_by_row_or_token(advantages, logprobs), active)  # (B, T)
    log_ratio = zero_off(logprobs - old_logprobs, active)
    if level == "sequence":
        log_ratio = masked_mean(log_ratio, active, dim=1).unsqueeze(1)
    elif level == "sequence_sum":
        log_ratio = log_ratio.sum(1, keepdim=True)
    # A large ratio leaves the loss flat, save for bad tokens without `delta`: inf would make that 0 · inf.
    unbounded = advantages < 0 if delta is None else torch.zeros_like(active)
    ratio = torch.where(unbounded, log_ratio, log_ratio.clamp(max=_LARGEST[log_ratio.dtype])).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    capped = ratio if delta is None else ratio.clamp(max=delta)
    return zero_off(-torch.minimum(capped * advantages, clipped * advantages), active)


def _by_row_or_token(advantages: Tensor, logprobs: Tensor) -> Tensor:
    """Advantages as (B, 1) or (B, T). ValueError: neither one a row of `logprobs` (B, T) nor one a token."""
    rows = logprobs.shape[:1]
    if logprobs.dim() != 2 or advantages.shape not in (rows, (*rows, 1), logprobs.shape):
        raise ValueError(
            f"advantages {tuple(advantages.shape)} are neither one a row nor one a token of logprobs "
            f"{tuple(logprobs.shape)}"
        )
    return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    clip: float | None = 0.2,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """½ max((V - G)², (clip(V, V_old ± clip) - G)²); `clip=None`: ½ (V - G)². The ½ is inside.

    The clipped form is that of OpenAI's baselines (Ziegler et al. 2019 use it). All (B, T) -> (B, T), 0 off
    the mask. ValueError: a negative clip, shapes differ.
    """
    check_range(0, math.inf, clip=clip)
    check_shapes(values=values, old_values=old_values, returns=returns, mask=mask)
    values, old_values, returns, mask = promote(values, old_values, returns, mask)
    active = or_all(mask, values)
    values, old_values, returns = (zero_off(x, active) for x in (values, old_values, returns))
    error = (values - returns).square()
    if clip is not None:
        near = torch.clamp(values, old_values - clip, old_values + clip)
        error = torch.maximum(error, (near - returns).square())
    return 0.5 * error

"""From scores to rewards, advantages and returns.

A *score* is the reward model's number for a response, (B,); a *reward* is what one token earned, (B, T).
Shapes: B rows, T columns, K responses a group, groups in successive rows.
"""

import math

import torch
from torch import Tensor

from .checks import check_positive, check_range, check_shapes
from .kl import kl_estimate
from .masked import as_mask, last_response_index, masked_mean, masked_var, or_all, promote, zero_off


def missing_eos_scores(
    scores: Tensor, ended: Tensor, *, replace: float | None = None, penalty: float = 0.0
) -> Tensor:
    """Scores under the missing-EOS rule: a response that did not end gets `replace`, else score - `penalty`.

    Replacing is the rule of Huang et al. 2024 (arXiv:2403.17031), subtracting that of TRL. A fixed number is
    mild only against normalised scores. scores (B,), ended bool or 0/1 (B,) -> (B,).
    ValueError: shapes differ.
    """
    check_shapes(scores=scores, ended=ended)
    scores, ended = promote(scores, ended)
    missing = scores - penalty if replace is None else torch.full_like(scores, replace)
    return torch.where(as_mask(ended), scores, missing)


def shaped_rewards(
    scores: Tensor, logprobs: Tensor, reference_logprobs: Tensor, response: Tensor, kl_coef: float
) -> Tensor:
    """R_t = -kl_coef (log π_t - log π_ref,t) + [t = last response column] score; detached.

    The penalty is part of the reward, not of the loss: as a loss, k1 has gradient 0 in expectation.
    Ziegler et al. 2019 (arXiv:1909.08593), eq. 2. scores (B,), the rest (B, T) -> (B, T).
    ValueError: a row without response, where the score would be lost, or shapes that do not fit.
    """
    check_shapes(logprobs=logprobs, reference_logprobs=reference_logprobs, response=response)
    if scores.shape != response.shape[:1]:
        raise ValueError(f"scores {tuple(scores.shape)} are not one a row of {tuple(response.shape)}")
    scores, logprobs, reference_logprobs, response = promote(scores, logprobs, reference_logprobs, response)
    active = as_mask(response)
    last = last_response_index(active)
    if bool((last < 0).any()):
        rows = (last < 0).nonzero().flatten().tolist()
        raise ValueError(f"rows {rows[:8]} have no response token, so there is no column for their score")
    penalty = zero_off(-kl_coef * kl_estimate(logprobs, reference_logprobs, "k1"), active)
    columns = torch.arange(active.shape[1], device=active.device)
    at_last = columns == last.unsqueeze(1)  # (B, T)
    return (penalty + zero_off(scores.unsqueeze(1), at_last)).detach()


def gae(rewards: Tensor, values: Tensor, response: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the response columns; (advantages, returns), not whitened.

    δ_t = R_t + γ V_{t+1} - V_t · A_t = δ_t + γλ A_{t+1} · G_t = A_t + V_t, with V and A after the last column
    0. `values[:, t]` is V(ids_<t), the state *before* token t. Schulman et al. 2016 (arXiv:1506.02438), eq.
    16.
    All (B, T); `response` is one run of columns a row, beginning anywhere.
    ValueError: shapes differ, γ or λ outside [0, 1].
    """
    check_shapes(rewards=rewards, values=values, response=response)
    check_range(0, 1, gamma=gamma, lam=lam)
    rewards, values, response = promote(rewards, values, response)
    active = as_mask(response)
    rewards, values = zero_off(rewards, active), zero_off(values, active)
    advantage = next_value = torch.zeros_like(values[:, 0])  # (B,)
    columns, width = [], values.shape[1]
    used = active.any(0)  # (T,); the columns of prompts would be launches for nothing
    first, last = (used.cumsum(0) == 0).sum(), (used.flip(0).cumsum(0) > 0).sum()
    start, end = divmod(int(first * (width + 1) + last), width + 1)  # a GPU is waited for once
    for t in reversed(range(start, end)):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = zero_off(delta + gamma * lam * advantage, active[:, t])
        next_value = values[:, t]
        columns.append(advantage)
    advantages = torch.zeros_like(values)
    if columns:
        advantages[:, start:end] = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def centred_groups(scores: Tensor, group_size: int, valid: Tensor | None = None) -> Tensor:
    """Scores minus the mean of their group, (B,) -> (B / K, K); exactly 0 where all of a group are equal
    (NaN where they are equally infinite: that is a fault, and must show).

    Without that rule the rounding of the mean is left over, and a division by a tiny std makes it a signal.
    Rows off `valid` (B,) are in no mean and come out as 0.
    ValueError: K < 2, B not a multiple of K, or scores that are not (B,).
    """
    if scores.dim() != 1:
        raise ValueError(f"scores {tuple(scores.shape)} are not one a response")
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}; a group needs 2 responses to compare")
    if len(scores) % group_size:
        raise ValueError(f"{len(scores)} scores are not a multiple of group_size {group_size}")
    groups = scores.reshape(-1, group_size)
    active = or_all(valid, scores).view_as(groups)
    highest = groups.where(active, -math.inf).amax(1, keepdim=True)
    lowest = groups.where(active, math.inf).amin(1, keepdim=True)
    centred = groups - masked_mean(groups, active, dim=1).unsqueeze(1)
    return zero_off(centred, active & ((highest != lowest) | highest.isinf()))


def group_advantages(
    scores: Tensor, group_size: int, scale: str = "group", eps: float = 1e-4, valid: Tensor | None = None
) -> Tensor:
    """A_i = (s_i - mean_group) / (std + eps), for GRPO.

    `scale`: "group" the std of the group (Shao et al. 2024, arXiv:2402.03300), "batch" the std of all scores,
    "none" no division (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783). Standard deviations divide by n - 1.
    Rows off `valid` (bool or 0/1, None: all are valid) are in no statistic and get exactly 0.
    scores (B,) -> (B,).
    ValueError: unknown scale, K < 2, B not a multiple of K, a negative eps.
    """
    check_range(0, math.inf, eps=eps)
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"unknown scale {scale!r}; one of group, batch, none")
    (scores,) = promote(scores)
    active = or_all(valid, scores)
    centred = centred_groups(scores, group_size, active)
    if scale == "group":
        n_others = active.view_as(centred).sum(1, keepdim=True) - 1
        centred = centred / ((centred.square().sum(1, keepdim=True) / n_others.clamp(min=1)).sqrt() + eps)
    elif scale == "batch":
        centred = centred / (masked_var(scores, active).sqrt() + eps)
    return centred.flatten()


def leave_one_out_advantages(scores: Tensor, group_size: int, valid: Tensor | None = None) -> Tensor:
    """A_i = s_i - mean_{j≠i} s_j = K / (K - 1) · (s_i - mean_group), for RLOO.

    Subtract kl_coef · Σ_t k1 from the scores first. Ahmadian et al. 2024 (arXiv:2402.14740), eq. 7.
    Rows off `valid` (bool or 0/1, None: all are valid) are in no mean and get exactly 0; K counts the others.
    scores (B,) -> (B,). ValueError: K < 2, B not a multiple of K.
    """
    (scores,) = promote(scores)
    centred = centred_groups(scores, group_size, valid)
    active = or_all(valid, scores)
    count = active.view_as(centred).sum(1, keepdim=True, dtype=centred.dtype)
    return (centred * (count / (count - 1).clamp(min=1))).flatten()


def importance_weights(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    cap: float,
    *,
    level: str = "token",
    mask: Tensor | None = None,
) -> Tensor:
    """min(π / π_sampler, cap): what makes a mean over another sampler's tokens one over the policy's, cut off
    where it would be all variance. π is the policy that the step began with; detached.

    Truncated importance sampling (Ionides 2008, J. Comput. Graph. Stat. 17:295; between samplers and learners
    Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"; `level` "token"
    is TRL's token_truncate). With "sequence_sum" a response is one action: min(exp(Σ_t log ratio), cap).
    Since weights are >= 0, an advantage times its weight gives the clipped objective times that weight.
    logprobs, sampler_logprobs, mask (B, T) -> (B, T), 1 off the mask; (B, 1) by sequence.
    ValueError: cap not above 0, shapes differ, "sequence_sum" without a mask.
    """
    check_positive(cap=cap)
    check_shapes(logprobs=logprobs, sampler_logprobs=sampler_logprobs, mask=mask)
    logprobs, sampler_logprobs = promote(logprobs, sampler_logprobs)
    log_ratio = (logprobs - sampler_logprobs).detach()
    log_ratio = log_ratio if mask is None else zero_off(log_ratio, as_mask(mask))
    if level == "sequence_sum":
        if mask is None:
            raise ValueError("level 'sequence_sum' needs the mask: it sums over the response")
        log_ratio = log_ratio.sum(1, keepdim=True)
    return log_ratio.clamp(max=math.log(cap)).exp()

"""Entries about losses: values, and gradients where an entry has them."""

import torch
import torch.nn.functional as F

from preftune import functional as pf
from preftune.selftest.signals import per_row
from preftune.selftest.vectors import Entry

# The entry's name for a loss on sums of log-probabilities, and ours.
SUM_KINDS = {
    "hinge": "hinge", "ipo_sum": "ipo", "reference_free": "reference_free", "nca_pair": "nca_pair",
    "apo_zero": "apo_zero", "apo_down": "apo_down", "bco_pair_no_shift": "bco_pair", "sppo_hard": "sppo_hard",
    "sigmoid": "sigmoid",
}  # fmt: skip


def bradley_terry(e: Entry) -> None:
    c, r = e["chosen_rewards"].requires_grad_(), e["rejected_rewards"].requires_grad_()
    center = e.params["center_rewards_coefficient"]
    loss = pf.bradley_terry_loss(c, r)
    e.check("per_pair", loss)
    e.check("loss", loss.mean())
    e.check("loss_margin", pf.bradley_terry_loss(c, r, e["margin"]).mean())
    e.check("loss_center", pf.bradley_terry_loss(c, r, None, center).mean())
    e.check("loss_margin_center", pf.bradley_terry_loss(c, r, e["margin"], center).mean())
    grad_c, grad_r = torch.autograd.grad(loss.mean(), (c, r))
    e.check("grad_loss_wrt_chosen", grad_c)
    e.check("grad_loss_wrt_rejected", grad_r)
    e.check("accuracy_strict", (c > r).to(e.dtype).mean())
    e.check("accuracy_ties_half", ((c > r).to(e.dtype) + 0.5 * (c == r)).mean())
    e.check("mean_margin", (c - r).mean())


def dpo_family(e: Entry) -> None:
    beta, eps = e.params["beta"], e.params["label_smoothing"]
    roles = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    sums = [per_row(e[f"{role}_token_logps"], e[f"{role.split('_')[1]}_mask"]) for role in roles]
    for role, value in zip(roles, sums, strict=True):
        e.check(f"{role}_logps", value)
    sums = [value.requires_grad_() for value in sums]
    lengths = {f"{side}_lengths": e[f"{side}_mask"].sum(1) for side in ("chosen", "rejected")}

    losses = {key: pf.preference_loss(*sums, beta=beta, kind=kind) for key, kind in SUM_KINDS.items()}
    losses["cdpo"] = pf.preference_loss(*sums, beta=beta, label_smoothing=eps)
    losses["robust"] = pf.preference_loss(*sums, beta=beta, kind="robust", label_smoothing=eps)
    losses["ipo_avg"] = pf.preference_loss(*sums, beta=beta, kind="ipo", **lengths)
    losses["sigmoid_norm"] = pf.preference_loss(*sums, beta=beta, **lengths)
    e.row.same("the kinds of loss are theirs", set(losses) == set(e.expected("per_pair")), True)
    for key, loss in losses.items():
        e.check(f"per_pair.{key}", loss)
        e.check(f"loss.{key}", loss.mean())

    grads = torch.autograd.grad(losses["sigmoid"].mean(), sums[:2])
    e.check("grad_sigmoid_wrt_policy_chosen_logps", grads[0])
    e.check("grad_sigmoid_wrt_policy_rejected_logps", grads[1])
    a, b = sums[0] - sums[2], sums[1] - sums[3]
    e.check("logits_h", a - b)
    e.check("chosen_rewards", beta * a)
    e.check("rejected_rewards", beta * b)
    e.check("reward_margin_mean", (beta * (a - b)).mean())
    e.check("reward_accuracy", (a > b).to(e.dtype).mean())


def ppo(e: Entry) -> None:
    ppo_policy(e)
    p, mask = e.params, e.mask()
    by_token = pf.token_mean(mask)
    v, v_old, returns = e["new_values"], e["old_values"], e["returns"]
    clipped = pf.ppo_value_loss(v, v_old, returns, p["cliprange_value"], mask=mask)
    plain = pf.ppo_value_loss(v, v_old, returns, None, mask=mask)
    e.check("value_loss_clipped", pf.weighted_sum(clipped, by_token))
    e.check("value_loss_unclipped", pf.weighted_sum(plain, by_token))
    e.check("value_clipfrac", pf.masked_mean(clipped > plain, mask))
    terms = pf.ppo_policy_loss(
        e["new_logps"], e["old_logps"], e["advantages"], p["clip_low"], p["clip_high"], mask=mask
    )
    total = pf.weighted_sum(terms, by_token) + p["vf_coef"] * pf.weighted_sum(clipped, by_token)
    e.check("total_loss_vf0_1", total)


def ppo_policy(e: Entry) -> None:
    p, mask = e.params, e.mask()
    new, old, advantages = e["new_logps"].requires_grad_(), e["old_logps"], e["advantages"]
    by_token = pf.token_mean(mask)
    terms = pf.ppo_policy_loss(new, old, advantages, p["clip_low"], p["clip_high"], mask=mask)
    loss = pf.weighted_sum(terms, by_token)
    e.check("policy_loss", loss)
    e.check("grad_policy_loss_wrt_new_logps", torch.autograd.grad(loss, new)[0])
    terms = terms.detach()
    e.check("policy_loss_seq_mean", pf.weighted_sum(terms, pf.sequence_mean(mask)))
    e.check("policy_loss_seq_sum_mean", pf.weighted_sum(terms, mask / len(mask)))
    dual = pf.ppo_policy_loss(
        new, old, advantages, p["clip_low"], p["clip_high"], delta=p["dual_clip"], mask=mask
    )
    e.check("policy_loss_dual_clip3", pf.weighted_sum(dual, by_token))
    unclipped = pf.ppo_policy_loss(new, old, advantages, 1e9, 1e9, mask=mask)
    e.check("clipfrac", pf.masked_mean(terms > unclipped, mask))
    e.check("ratio_mean", pf.masked_mean((new - old).exp(), mask))
    for key, kind in (("k1_old_minus_new", "k1"), ("k2", "k2"), ("k3_old_new", "k3")):
        e.check(f"approx_kl_{key}", pf.masked_mean(pf.kl_estimate(old, new, kind), mask))


def grpo(e: Entry) -> None:
    p, mask = e.params, e.mask()
    new, old, advantages = e["new_logps"].requires_grad_(), e["old_logps"], e["advantages"]
    terms = pf.ppo_policy_loss(
        new, old, advantages, p["clip_low"], p["clip_high"],
        delta=p["delta"], level=p["importance_sampling_level"], mask=mask,
    )  # fmt: skip
    if p["beta"]:
        ratio = (new - old).exp() if p["use_bias_correction_kl"] else 1.0
        terms = terms + p["beta"] * ratio * pf.kl_estimate(new, e["ref_logps"], "k3")
    weights = {
        "grpo": pf.sequence_mean(mask),
        "bnpo": pf.token_mean(mask),
        "dapo": pf.token_mean(mask, p["num_items_in_batch"]),
        "dr_grpo": pf.constant_length(mask, p["max_completion_length"]),
    }
    for key, weight in weights.items():
        loss = pf.weighted_sum(terms, weight)
        e.check(f"loss_{key}", loss)
        (grad,) = torch.autograd.grad(loss, new, retain_graph=True)
        e.check(f"grad_{key}", grad)
    if e.has("clip_low_frac"):
        ratio, a = (new - old).exp(), advantages.unsqueeze(1)
        low, high = (ratio < 1 - p["clip_low"]) & (a < 0), (ratio > 1 + p["clip_high"]) & (a > 0)
        e.check("clip_low_frac", pf.masked_mean(low, mask))
        e.check("clip_high_frac", pf.masked_mean(high, mask))


def rloo(e: Entry) -> None:
    p, mask = e.params, e.mask()
    new, old, advantages = e["new_logps"], e["old_logps"], e["advantages"]
    terms = pf.ppo_policy_loss(
        new, old, advantages, p["clip_low"], p["clip_high"], level="sequence_sum", mask=mask
    )
    e.check("loss", pf.weighted_sum(terms, pf.sequence_mean(mask)))
    negative = torch.full_like(advantages, -1.0)  # A = -1 and no clipping: the loss is the ratio
    ratio = pf.ppo_policy_loss(new, old, negative, 1.0, 1e9, level="sequence_sum", mask=mask)
    e.check("seq_ratio", ratio[:, 0])


def simpo(e: Entry) -> None:
    beta, gamma = e.params["beta"], e.params["gamma"]
    c, r = e["avg_chosen_logps"], e["avg_rejected_logps"]
    loss = pf.simpo_loss(c, r, beta=beta, gamma=gamma)
    e.check("per_pair", loss)
    e.check("loss", loss.mean())
    e.check("chosen_rewards", beta * c)
    sums = (e["sum_chosen_logps"], e["sum_rejected_logps"])
    e.check("cpo_sigmoid_per_pair", pf.simpo_loss(*sums, beta=beta, gamma=0.0))


def orpo(e: Entry) -> None:
    mask = e.mask("chosen_mask")
    term = pf.orpo_odds_term(e["avg_chosen_logps"], e["avg_rejected_logps"])
    e.check("or_term", -term)
    log_odds = torch.tensor(e.expected("log_odds_ratio"), dtype=torch.float64)
    e.check("log_odds_ratio", term, expected=-F.logsigmoid(log_odds))
    nll = pf.weighted_sum(-e["chosen_token_logps"], pf.token_mean(mask))
    e.check("nll_chosen_token_mean", nll)
    e.check("loss", nll + e.params["lambda_"] * term.mean())


def kto(e: Entry) -> None:
    kl = pf.kto_kl(e["kl_policy_logps"], e["kl_ref_logps"])
    e.check("kl", kl)
    loss = pf.kto_loss(e["policy_logps"], e["ref_logps"], e["labels"], kl, **e.params)
    e.check("per_example", loss)
    e.check("loss", loss.mean())

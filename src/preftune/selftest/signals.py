"""Entries about what goes into a loss: log-probabilities, masks, KL, rewards, advantages, statistics."""

import numpy as np
import torch
from torch import Tensor

from preftune import functional as pf
from preftune.evaluation import stats
from preftune.selftest.vectors import Entry


def per_row(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), x, 0.0).sum(1)


def shifted(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Our layout of logits that stand at the column of the action they produced: one more column in front."""
    logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1)
    return logits, torch.cat([torch.zeros_like(actions[:, :1]), actions], dim=1)


def selective_logprobs(e: Entry) -> None:
    labels = e["labels"]
    response, ids = (labels != -100).to(e.dtype), labels.clamp(min=0)
    scored = response.bool()[:, 1:]
    logps = pf.token_logprobs(e["logits"], ids)
    e.check("token_logps", torch.where(scored, logps[:, 1:], 0.0))
    cooler = pf.token_logprobs(e["logits"], ids, 0.7)[:, 1:]
    e.check("token_logps_temp0_7", torch.where(scored, cooler, 0.0))
    e.check("entropy", pf.entropy(e["logits"])[:, 1:])
    e.check("sum_logps", per_row(logps, response))
    e.check("mean_logps", pf.masked_mean(logps, response, dim=1))
    e.same("n_scored", response.sum(1).long())
    e.check("nll_token_mean", pf.weighted_sum(-logps, pf.token_mean(response)))
    e.check("nll_seq_mean", pf.weighted_sum(-logps, pf.sequence_mean(response)))


def kl_estimators(e: Entry) -> None:
    mask = e.mask()
    policy, ids = shifted(e["policy_logits"], e["actions"])
    reference, _ = shifted(e["ref_logits"], e["actions"])
    lp, ref = pf.token_logprobs(policy, ids)[:, 1:], pf.token_logprobs(reference, ids)[:, 1:]
    e.check("logp", lp)
    e.check("ref_logp", ref)
    for kind in ("k1", "k2", "k3"):
        estimate = pf.kl_estimate(lp, ref, kind)
        e.check(kind, estimate)
        e.check(f"{kind}_masked_token_mean", pf.masked_mean(estimate, mask))
    k1 = per_row(lp - ref, mask)
    e.check("k1_seq_sum", k1)
    e.check("k1_seq_sum_mean", k1.mean())
    full = pf.full_kl(policy, reference)[:, 1:]
    e.check("full_kl_pi_ref", full)
    e.check("full_kl_ref_pi", pf.full_kl(reference, policy)[:, 1:])
    e.check("full_kl_pi_ref_masked_mean", pf.masked_mean(full, mask))
    e.check("full_kl_pi_ref_seq_sum_mean", per_row(full, mask).mean())
    log_p, log_q = e["policy_logits"].log_softmax(-1), e["ref_logits"].log_softmax(-1)
    for kind in ("k1", "k3"):
        mean = (log_p.exp() * pf.kl_estimate(log_p, log_q, kind)).sum(-1)
        e.check(f"expectation_{kind}_under_pi", mean)


def gae(e: Entry) -> None:
    mask = e["mask"]
    advantages, returns = pf.gae(e["rewards"], e["values"], mask, e.params["gamma"], e.params["lam"])
    e.check("advantages", advantages)
    e.check("returns", returns)
    for key, unbiased in (("whitened_unbiased", True), ("whitened_biased", False)):
        whitened = pf.masked_whiten(advantages, mask, unbiased=unbiased, eps=e.params["whiten_eps"])
        e.check(key, whitened, on=mask)


def masked_whiten(e: Entry) -> None:
    values, mask = e["values"], e["mask"]
    for key, unbiased in (("unbiased", True), ("biased", False)):
        e.check(key, pf.masked_whiten(values, mask, unbiased=unbiased), on=mask)
        scaled = pf.masked_whiten(values, mask, shift_mean=False, unbiased=unbiased)
        e.check(f"{key}_keep_mean", scaled, on=mask)
        e.check(f"masked_var_{key}", pf.masked_var(values, mask, unbiased))
    e.check("masked_mean", pf.masked_mean(values, mask))


def reward_assembly(e: Entry) -> None:
    """They place the score one column later than we do, so only what comes before that is compared."""
    p, ids = e.params, e["responses"]
    mask = pf.response_mask(ids, p["eos_token_id"])
    e.same("action_mask", mask.long())
    last = pf.last_response_index(mask)
    e.same("last_token_index", last)
    ended = ids.gather(1, last.unsqueeze(1)).squeeze(1) == p["eos_token_id"]
    e.same("contains_eos", ended.long())
    rule = {"replace": -1.0} if p["no_eos_rule"] == "score := -1" else {"penalty": 1.0}
    scores = pf.missing_eos_scores(e["scores"], ended, **rule)
    e.check("scores_after_eos_rule", scores)
    e.check("kl_seq_sum", per_row(pf.kl_estimate(e["logprobs"], e["ref_logprobs"], "k1"), mask))
    rewards = pf.shaped_rewards(scores, e["logprobs"], e["ref_logprobs"], mask, p["kl_coef"])
    e.check("rlhf_reward_mean", rewards.sum(1).mean())


def reward_at_last_token(e: Entry) -> None:
    inputs = (e["scores"], e["logprobs"], e["ref_logprobs"], e["action_mask"])
    e.check("token_rewards", pf.shaped_rewards(*inputs, e.params["kl_coef"]))


def response_mask(e: Entry) -> None:
    ids, eos = e["responses"], e.params["eos_token_id"]
    mask = pf.response_mask(ids, eos)
    e.row.same("dtype is bool", mask.dtype == torch.bool, True)
    e.same("mask", mask.long())
    e.same("lengths", pf.last_response_index(mask) + 1)
    e.same("contains_eos", ((ids == eos) & mask).any(1).long())


def adaptive_kl_controller(e: Entry) -> None:
    p = e.params
    controller = pf.AdaptiveKL(p["init_kl_coef"], p["target"], p["horizon"])
    coefs = [controller.observe(kl, p["n_steps"]) for kl in e.raw["inputs"]["observed_kl"]]
    e.check("kl_coef_after_update", torch.tensor(coefs, dtype=torch.float64))
    e.row.same("the coefficient is kept", controller.coef == coefs[-1], True)


def group_advantages(e: Entry) -> None:
    scores, k = e["rewards"], e.params["num_generations"]
    for exponent in (4, 6):
        e.check(f"group_std_eps1e_{exponent}", pf.group_advantages(scores, k, eps=10.0**-exponent))
    tiny = pf.group_advantages(scores, k, eps=1e-9)
    e.check("group_std_eps1e_9", tiny)
    e.check("group_no_std", pf.group_advantages(scores, k, "none"))
    e.check("batch_std_eps1e_4", pf.group_advantages(scores, k, "batch"))
    e.check("zero_std_group_fraction", (tiny.view(-1, k) == 0).all(1).to(e.dtype).mean())
    e.check("rloo", pf.leave_one_out_advantages(scores, k))
    penalised = pf.leave_one_out_advantages(scores - e.params["rloo_beta"] * e["seq_kl"], k)
    e.check("rloo_kl_in_reward", penalised)
    e.check("rloo_kl_normalized", (penalised - penalised.mean()) / (penalised.std() + 1e-4))


def evaluation_stats(e: Entry) -> None:
    """`preftune.evaluation.stats`, which works in float64 whatever the machine."""
    inputs = e.raw["inputs"]
    a, b, labels, tokens = (inputs[k] for k in ("rewards_a", "rewards_b", "pair_labels", "tokens"))
    rate = stats.win_rate(a, b)
    e.same("win_rate_ties_half", rate)
    interval = stats.wilson(rate * len(a), len(a), e.params["z"])
    e.number("wilson_low", interval.low)
    e.number("wilson_high", interval.high)
    e.row.same("z is 1.96 by default", stats.wilson(rate * len(a), len(a)) == interval, True)
    mean, standard_error = stats.paired_difference(a, b)
    e.number("mean_diff", mean)
    e.number("paired_se", standard_error)
    p = 1 / (1 + np.exp(-(np.array(a) - np.array(b))))
    e.number("ece", stats.ece(p, labels, e.params["ece_bins"]))
    e.number("brier", stats.brier(p, labels))
    e.number("distinct1", stats.distinct_n(tokens, 1))
    e.number("distinct2", stats.distinct_n(tokens, 2))
    e.same("rep4", stats.repetition_n(tokens, 4))
